"""Image files in one folder per class or in a single folder, with captions in text files."""

import collections
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dit_jax.data.sources.source import Example, caption_text, fingerprint, is_strange
from dit_jax.errors import Unavailable, UserError
from dit_jax.runtime.console import say
from dit_jax.storage.paths import local_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")
CAPTION_SUFFIX, LONG_SUFFIX = ".txt", ".long.txt"
SLICE = re.compile(r"(?P<folder>[^\[\]]*)\[(?P<start>\d+%?|):(?P<stop>\d+%?|)\]")


class ImageFolder:
    """Image files in one folder per class, with labels that number the sorted class folders; or in a single folder.

    Class folders are searched recursively. A folder that contains images but no folders is a data set without labels:
    num_classes is 0 and every label is 0, which is the null label of a network for 0 classes. Images are numbered by
    sorted relative path. The text in `name.txt` next to `name.jpg` is the caption of that image, that in `name.long.txt` its long
    caption. Files with other suffixes or none, names that begin with a dot, and folders such as @eaDir and __MACOSX are not part
    of the data set; they are counted and said.

    Args:
        path: the folder that contains the class folders or images, or one that contains such a folder per split.
        split: name of that folder, such as `train`; empty if there are no splits. A slice at its end, as in `train[:90%]` or
            `[300:]`, takes that part of the images in the order of the SHA-256 of their relative paths, whatever their classes
            and names are; `[:300]` and `[300:]` have no image in common.

    Raises:
        UserError: the folder does not exist or has no images, the slice takes none or more than there are, it mixes images and
            class folders, or a class has no images or reaches one folder by two paths, as through a link to a folder above it;
            and from `source[i]`, a file cannot be read (Unavailable) or a caption is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike, split: str = ""):
        if not str(path):
            raise UserError("data.path is empty; give a folder of images, or one that holds one sub-folder of images per class")
        split, part = _parse_split(split)
        self.path = path = local_path(path) / split
        layout = f"{path}: expected <path>/<class name>/*.jpg, or <path>/*.jpg (suffixes {', '.join(IMAGE_SUFFIXES)})"
        if not path.is_dir():
            raise UserError(f"image folder {path} {'is not a folder' if path.exists() else 'does not exist'}")
        with os.scandir(path) as entries:
            visible = sorted((e for e in entries if not is_strange(e.name)), key=lambda e: e.name)
        loose = [e.name for e in visible if e.name.lower().endswith(IMAGE_SUFFIXES) and not _is_dir(e)]
        self.class_names = tuple(e.name for e in visible if _is_dir(e))
        self.num_classes = len(self.class_names)
        if loose and self.class_names:
            raise UserError(f"{len(loose)} images such as {loose[0]} are in no class folder of {layout}; move them")
        if not loose and not self.class_names:
            raise UserError(f"no class folders and no images in {layout}")
        images, labels, texts = [], [], {}
        others: collections.Counter[str] = collections.Counter()
        for label, name in enumerate(self.class_names or [""]):
            files = sorted(_files_below(path, name, others, {}))
            images += (of_class := [file for file in files if file[0].lower().endswith(IMAGE_SUFFIXES)])
            if not of_class:
                raise UserError(f"class folder {name!r} holds no images, in {layout}; fill or remove it")
            labels += [label] * len(of_class)
            texts |= {text: size for text, size in files if text.endswith(CAPTION_SUFFIX)}
        if part is not None:
            kept = _of_slice([name for name, _ in images], part, f"{path}")
            images, labels = [images[i] for i in kept], [labels[i] for i in kept]
        self._files = tuple(name for name, _ in images)
        self.labels = np.asarray(labels, np.int32)
        wanted = {_caption_file(name, suffix) for name in self._files for suffix in (CAPTION_SUFFIX, LONG_SUFFIX)}
        captions = sorted((text, texts[text]) for text in wanted & texts.keys())
        self._captions = frozenset(text for text, _ in captions)
        self.has_captions = bool(captions)
        _say_what_is_left_out(path, others)
        _say_numbering(path, self.class_names)
        facts = {"class_names": self.class_names, "count": len(images), "files": images}
        self.fingerprint = fingerprint(name="image_folder", **facts, **({"captions": captions} if captions else {}))

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path of an example within the folder, without reading it."""
        return self._files[index]

    def __getitem__(self, index: int) -> Example:
        name = self._files[index]
        example: Example = {"image": self._read(name), "label": int(self.labels[index]), "name": str(self.path / name)}
        short, long = (_caption_file(name, suffix) for suffix in (CAPTION_SUFFIX, LONG_SUFFIX))
        if short in self._captions:
            example["caption"] = caption_text(self._read(short), str(self.path / short))
        if long in self._captions:
            example["caption_long"] = caption_text(self._read(long), str(self.path / long))
        return example

    def _read(self, name: str) -> bytes:
        file = self.path / name
        try:
            return file.read_bytes()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise Unavailable(f"{file}: {error.strerror}; the folder changed after it was listed, restore it", missing) from error


def _parse_split(split: str) -> tuple[str, tuple[str, str] | None]:
    """ "train[:90%]" -> ("train", ("", "90%")); a split without a slice has None for it.

    Raises:
        UserError: the brackets hold no slice.
    """
    if not split.endswith("]"):
        return split, None
    found = SLICE.fullmatch(split)
    if found is None:
        raise UserError(f"data.split is {split!r}; write a slice as in train[:90%], [:300] or [300:400]")
    return found["folder"], (found["start"], found["stop"])


def _of_slice(names: list[str], part: tuple[str, str], what: str) -> list[int]:
    """Sorted indices of the names that lie in the slice of their order by SHA-256.

    Raises:
        UserError: the slice is empty, or goes beyond the end.
    """
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode("utf-8", "surrogateescape")).digest())
    bounds = [
        given if not text else int(text[:-1]) * len(names) // 100 if text.endswith("%") else int(text)
        for text, given in zip(part, (0, len(names)), strict=True)
    ]
    if not 0 <= bounds[0] < bounds[1] <= len(names):
        raise UserError(
            f"the slice [{part[0]}:{part[1]}] of {what}, which has {len(names):,} images, is that from {bounds[0]} to "
            f"{bounds[1]}; it must hold at least one image and end at {len(names)} or before"
        )
    return sorted(order[slice(*bounds)])


def _caption_file(image_file: str, suffix: str) -> str:
    return image_file.rpartition(".")[0] + suffix


def _files_below(
    root: Path, folder: str, others: collections.Counter[str], seen: dict[tuple[int, int], str]
) -> Iterator[tuple[str, int]]:
    """Yields (path relative to root, size in bytes) of every image and text under root/folder, following links.

    Args:
        others: counts what is left out, by its kind.
        seen: {(device, inode): path} of the folders before this one.

    Raises:
        UserError: two paths lead to one folder.
    """
    status = os.stat(root / folder)
    before = seen.setdefault((status.st_dev, status.st_ino), folder)
    if before != folder:
        raise UserError(
            f"{root / before} and {root / folder} are the same folder, so its images would count twice: remove the link"
        )
    with os.scandir(root / folder) as entries:
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if is_strange(entry.name):
                others["hidden, or of a system (@eaDir, __MACOSX, ...)"] += 1
            elif _is_dir(entry):
                yield from _files_below(root, relative, others, seen)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) or entry.name.endswith(CAPTION_SUFFIX):
                yield relative, _size(entry)
            else:
                others[os.path.splitext(entry.name)[1].lower()[:20] or "no suffix"] += 1


def _is_dir(entry: os.DirEntry) -> bool:
    """Whether it is a folder; False for a link that leads nowhere or to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _say_what_is_left_out(path: Path, others: collections.Counter[str]) -> None:
    if others:
        kinds = [f"{count:,} x {kind}" for kind, count in others.most_common(5)]
        more = ", ..." if len(others) > 5 else ""
        say(f"{path}: {others.total():,} files or folders are no images and not part of the data set ({', '.join(kinds)}{more})")


def _say_numbering(path: Path, names: tuple[str, ...]) -> None:
    """Says so if the classes are numbers in another order than that of the numbers."""
    if not all(name.isascii() and name.isdigit() for name in names) or list(names) == sorted(names, key=lambda n: (len(n), n)):
        return
    first = next(label for label, name in enumerate(names) if int(name[:18]) != label)
    say(
        f"{path}: class folders are numbered in the order of text, so that label {first} is the folder {names[first]}; "
        "pad the names with zeros for the order of numbers"
    )


def _size(entry: os.DirEntry) -> int:
    """Size in bytes; -1 for a broken link, which becomes a bad record on reading."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1
