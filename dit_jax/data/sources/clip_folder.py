"""Video files, animated GIF and WebP, and folders of frames, in one folder per class or in a single folder, with captions."""

import collections
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.data.sources.folder import IMAGE_SUFFIXES
from dit_jax.data.sources.listing import (
    CAPTION_SUFFIX,
    LONG_SUFFIX,
    caption_file,
    files_below,
    is_dir,
    of_slice,
    parse_split,
    say_numbering,
    say_what_is_left_out,
    sizes_of,
)
from dit_jax.data.sources.source import Example, caption_text, fingerprint, is_strange
from dit_jax.data.stored_clips import ANIMATIONS, CLIP_SUFFIXES, FILMS, FrameFiles, StoredClip, check_av, check_bytes
from dit_jax.errors import Unavailable, UserError
from dit_jax.storage.paths import local_path

FRAMES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in ANIMATIONS)  # of images that are frames of a clip


class ClipFolder:
    """Clips in one folder per class, with labels that number the sorted class folders; or in a single folder.

    A clip is a file (CLIP_SUFFIXES), or a folder that directly contains images other than GIF and WebP: its frames, in the order
    of their names with numbers as numbers. Class folders are searched recursively. A folder that contains clips but no class
    folders is a data set without labels: num_classes is 0 and every label is 0, which is the null label of a network for 0
    classes. Clips are numbered by sorted relative path. The text in `name.txt` next to `name.mp4`, or next to the folder `name`,
    is the caption of that clip, that in `name.long.txt` its long caption. Other files, names that begin with a dot, and folders
    such as @eaDir are not part of the data set; they are counted and said.

    Args:
        path: the folder that contains the class folders or clips, or one that contains such a folder per split.
        split: name of that folder, or a slice, as of `ImageFolder`.
        fps: frames per second of the clips that are folders of frames; None if it is not known.

    Raises:
        UserError: the folder does not exist or has no clips, or mixes clips and class folders; a class has no clips; the slice is
            none; PyAV is needed and not installed; and from `source[i]`, a file cannot be read (Unavailable), is larger than
            MOST_BYTES or damaged, or a caption is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike, split: str = "", fps: float | None = None):
        if not str(path):
            raise UserError("data.path is empty; give a folder of clips, or one that holds one sub-folder of clips per class")
        if fps is not None and not 0 < fps < float("inf"):
            raise UserError(f"data.fps={fps} must be above 0 frames per second, or None if it is not known")
        split, part = parse_split(split)
        self.path = path = local_path(path) / split
        self.fps = fps
        layout = f"{path}: expected <path>/<class name>/*.mp4, or <path>/*.mp4 (suffixes {', '.join(CLIP_SUFFIXES)})"
        if not path.is_dir():
            raise UserError(f"clip folder {path} {'is not a folder' if path.exists() else 'does not exist'}")
        others: collections.Counter[str] = collections.Counter()
        with os.scandir(path) as entries:
            folders = {entry.name for entry in entries if not is_strange(entry.name) and is_dir(entry)}
        files = sorted(files_below(path, "", (*CLIP_SUFFIXES, *FRAMES), others, {}))
        clips = _clips([name for name, _ in files if not name.endswith(CAPTION_SUFFIX)], others, f"{path}")
        texts = {name: size for name, size in files if name.endswith(CAPTION_SUFFIX)}
        loose = [name for name in clips if "/" not in name]
        self.class_names = tuple(sorted(folders - set(loose)))
        self.num_classes = len(self.class_names)
        if loose and self.class_names:
            raise UserError(f"{len(loose)} clips such as {loose[0]} are in no class folder of {layout}; move them")
        if not clips:
            raise UserError(f"no clips in {layout}")
        of_class = collections.Counter(name.partition("/")[0] for name in clips)
        if empty := [name for name in self.class_names if not of_class[name]]:
            raise UserError(f"class folder {empty[0]!r} holds no clips, in {layout}; fill or remove it")
        names = sorted(clips)
        if part is not None:
            names = [names[i] for i in of_slice(names, part, f"{path}", "clips")]
        if films := [name for name in names if name.lower().endswith(FILMS) and not clips[name]]:
            check_av(str(path / films[0]))
        self._names = tuple(names)
        self._frames = {name: clips[name] for name in names if clips[name]}
        sizes = dict(files)
        self._bytes = {name: sum(sizes[file] for file in frames) for name, frames in self._frames.items()}
        numbers = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([numbers.get(name.partition("/")[0], 0) for name in names], np.int32)
        wanted = {self._caption_file(name, suffix) for name in names for suffix in (CAPTION_SUFFIX, LONG_SUFFIX)}
        captions = sorted((text, texts[text]) for text in wanted & texts.keys())
        self._captions = frozenset(text for text, _ in captions)
        self.has_captions = bool(captions)
        say_what_is_left_out(path, others, "clips")
        say_numbering(path, self.class_names)
        listed = {name for clip in names for name in clips[clip] or (clip,)}
        facts = {"class_names": self.class_names, "count": len(names), "files": [file for file in files if file[0] in listed]}
        self.fingerprint = fingerprint(name="clip_folder", **facts, captions=captions, fps=fps)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        """Example with `video`, a `StoredClip` or `FrameFiles`, and `fps`, 0 where it is not known."""
        name = self._names[index]
        clip = self._clip(name)
        label = int(self.labels[index])
        example: Example = {"video": clip, "fps": clip.fps, "label": label, "name": str(self.path / name)}
        short, long = (self._caption_file(name, suffix) for suffix in (CAPTION_SUFFIX, LONG_SUFFIX))
        if short in self._captions:
            example["caption"] = caption_text(self._read(short), str(self.path / short))
        if long in self._captions:
            example["caption_long"] = caption_text(self._read(long), str(self.path / long))
        return example

    def sizes(self, upright: bool = False) -> np.ndarray:
        """See `Source`: from the files, of which the first frame is decoded; films are always upright."""
        return sizes_of(len(self), lambda index: self._clip(self._names[index]).facts())

    def _clip(self, name: str) -> Any:
        what = str(self.path / name)
        if name not in self._frames:
            return StoredClip(self._read(name), what)
        files = self._frames[name]
        check_bytes(self._bytes[name], what)
        return FrameFiles([self._read(file) for file in files], what, self.fps or 0.0)

    def _caption_file(self, name: str, suffix: str) -> str:
        return name + suffix if name in self._frames else caption_file(name, suffix)

    def _read(self, name: str) -> bytes:
        file = self.path / name
        try:
            with open(file, "rb") as opened:
                check_bytes(os.fstat(opened.fileno()).st_size, str(file))
                return opened.read()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise Unavailable(f"{file}: {error.strerror}; the folder changed after it was listed, restore it", missing) from error


def _clips(files: list[str], others: collections.Counter[str], what: str) -> dict[str, tuple[str, ...]]:
    """{name of a clip: its frames}, of the files below a folder; () for a clip that is a file.

    others: counts the images beside clips, which are no frames.

    Raises:
        UserError: the folder itself has frames.
    """
    clips: dict[str, tuple[str, ...]] = {name: () for name in files if not name.lower().endswith(FRAMES)}
    with_clips = {name.rpartition("/")[0] for name in clips}
    frames: dict[str, list[str]] = collections.defaultdict(list)
    for name in files:
        if name not in clips and (folder := name.rpartition("/")[0]) not in with_clips:
            frames[folder].append(name)
        elif name not in clips:
            others["images beside clips"] += 1
    if "" in frames:
        raise UserError(
            f"{what} contains images such as {frames[''][0]}, which are frames of one clip; give the folder above, or set "
            "data.name=folder for a data set of images"
        )
    return clips | {folder: tuple(sorted(names, key=_by_number)) for folder, names in frames.items()}


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key by which frame_2 comes before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", Path(name).name)]
