"""Random access to images in tar files: shards in the WebDataset layout, and the base class of tar sources."""

import collections
import functools
import glob
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

import dit_jax.data.sources.tar_index as tar_index
from dit_jax.data.class_names import read as read_class_names
from dit_jax.data.image_files import image_size
from dit_jax.data.open_files import OpenFiles
from dit_jax.data.sources.listing import sizes_of
from dit_jax.data.sources.source import Example, fingerprint, is_strange
from dit_jax.data.sources.tar_headers import Member, TarScan, opened
from dit_jax.data.sources.tar_index import Row, TarIndex
from dit_jax.data.stored_clips import FILMS, StoredClip, check_av, check_bytes, is_animation
from dit_jax.errors import Unavailable, UserError
from dit_jax.storage.bounded import json_object
from dit_jax.storage.paths import local_path

IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "ppm", "gif", "bmp", "tif", "tiff")
CLIPS = tuple(suffix.removeprefix(".") for suffix in FILMS)
CAPTIONS = ("txt", "caption", "json")  # in order of precedence
LONG = ("caption_long",)  # names of the long caption in a .json
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAX_CLASSES = 1_000_000
HEADER_BYTES = 1 << 16  # of an image, which mostly hold its size
TEXT_BYTES = {"cls": 64, "json": 16 << 20}  # largest file that is read while indexing


class TarSource:
    """Reads the samples of an index with pread, from many threads at once; opens files on first use, at most 256 at a time.

    Args:
        files: the tars, numbered as in the index.
        index: positions of the samples; its labels are all -1 or all in [0, num_classes).
        num_classes: 0 if there are no labels; then every example has label 0.
        class_names: one per class.
        layout: name of the source in its fingerprint.

    Raises (from source[i]):
        Unavailable: a tar was removed or cannot be read.
        UserError: a tar was truncated; a caption has changed.
    """

    def __init__(self, files: Sequence[Path], index: TarIndex, num_classes: int, class_names: Sequence[str], layout: str):
        self.files, self.index = tuple(files), index
        self.num_classes, self.class_names = num_classes, tuple(class_names)
        self.has_captions = bool((index.caption_size >= 0).any())
        tar_index.reject(
            index,
            index.caption_size > TEXT_BYTES["json"],
            lambda i: (
                f"the caption of {self._name(i)} has {index.caption_size[i]:,} bytes; at most {TEXT_BYTES['json']:,} are read"
            ),
        )
        self.fingerprint = fingerprint(
            name=layout,
            class_names=self.class_names,
            files=[[file.name, file.stat().st_size] for file in self.files],
            index=index.sha256(),
        )
        self._open_files = OpenFiles()
        self._is_film = _end_with(index, FILMS)
        self.has_films = bool(self._is_film.any())
        if self.has_films:
            check_av(self._name(int(np.argmax(self._is_film))))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> np.ndarray:
        return self.index.label

    def __getitem__(self, i: int) -> Example:
        """Example with the bytes of the image, or the clip; its label, its name "<tar>:<key>", and "caption" if it has one."""
        index = self.index
        file, name = self.files[index.tar[i]], self._name(int(i))
        example: Example = {"label": max(int(index.label[i]), 0), "name": name}
        if self._is_film[i]:
            check_bytes(int(index.size[i]), name)
            clip = StoredClip(self._read(file, index.offset[i], index.size[i], name), name)
            example |= {"video": clip, "fps": clip.fps}
        else:
            example["image"] = self._read(file, index.offset[i], index.size[i], name)
        if index.caption_size[i] >= 0:
            data = self._read(file, index.caption_offset[i], index.caption_size[i], name)
            try:
                fields = json_object(data, "its .json") if index.caption_is_json[i] else {"caption": data.decode()}
                caption, long = _caption_field(fields), _caption_field(fields, LONG)
                if caption is None:
                    raise ValueError("the .json had one when it was indexed")
            except ValueError as error:
                raise UserError(f"the caption of {name} cannot be read ({error}): write it as UTF-8") from None
            example["caption"] = caption
            if long is not None:
                example["caption_long"] = long
        return example

    def sizes(self, upright: bool = False) -> np.ndarray:
        """See `Source`: of images from the file's header, of clips from the file."""

        def measure(i: int) -> tuple[float, float, float, float]:
            file, name, size = self.files[self.index.tar[i]], self._name(i), int(self.index.size[i])
            is_film = self._is_film[i]
            data = self._read(file, self.index.offset[i], size if is_film else min(size, HEADER_BYTES), name)
            if not is_film and not is_animation(data):
                try:
                    return 1, *image_size(data, name, upright), 0
                except UserError:
                    pass  # the header is longer, or the file is damaged
            if len(data) < size:
                data = self._read(file, self.index.offset[i], size, name)
            if is_film or is_animation(data):
                return StoredClip(data, name).facts()
            return 1, *image_size(data, name, upright), 0

        return sizes_of(len(self), measure)

    def _name(self, i: int) -> str:
        return f"{self.files[self.index.tar[i]].name}:{self.index.name(i)}"

    def _read(self, file: Path, offset: int, size: int, name: str) -> bytes:
        data = bytearray(int(size))
        try:
            count = self._open_files.read_into(file, int(offset), memoryview(data))
        except OSError as error:
            raise Unavailable(
                f"{name} in {file}: {error.strerror}; the tars changed after they were indexed, restore them",
                isinstance(error, FileNotFoundError),
            ) from None
        if count < size:
            raise UserError(f"{file} ends within {name}: it was truncated after it was indexed, restore it")
        return bytes(data)


class TarShards(TarSource):
    """Tar files in the WebDataset layout: members with the same path up to the first dot of the base name form a sample.

    A sample has one image (.jpg .jpeg .jpe .jfif .png .webp .ppm .gif .bmp .tif .tiff) or one clip (.mp4 .webm .mkv .m4v .mov
    .avi). `ClipTransform` takes an animated .gif or .webp as a clip, too. A sample may have a label, from .cls (an
    integer in ASCII) or .json (field "label" or "cls"), and a caption, from the first of .txt, .caption and .json (field
    "caption" or "text") that it has. A .json with a caption may also have a long one, "caption_long", and then comes before .txt.
    As in WebDataset, members with other suffixes, names that begin with a dot, or no suffix are not part of the data set; nor are
    those in folders such as @eaDir and __MACOSX. Members of a sample need not be adjacent.
    Samples are numbered by tar, then by their first member.

    The first opening reads all headers and labels, and stores an index next to the tars (see `tar_index.cached`).

    Args:
        path: a folder of .tar files, a glob, or a brace pattern such as `train-{0000..0099}.tar`.
        num_classes: number of classes; None means the largest label plus 1, or 0 if no sample has a label.
        class_names_file: a text file with one class name per line; without it, the classes are called 0, 1, ...
        cache_index: whether to read and write the index file.

    Raises:
        UserError: the files do not exist; a tar is compressed or damaged; a sample has no image or several, or an unreadable
            or contradictory label; only some samples have labels, or a label is outside the classes; class names do not fit.
    """

    def __init__(self, path: str, num_classes: int | None = None, class_names_file: str = "", cache_index: bool = True):
        files = tar_files(path)
        index = tar_index.cached(
            files,
            "webdataset",
            lambda: tar_index.scanned(functools.partial(_samples, file, number) for number, file in enumerate(files)),
            cache_index,
        )
        if not len(index):
            raise UserError(f"{path}: {len(files)} tars contain no samples")
        tar_index.reject(
            index,
            index.label >= MAX_CLASSES,
            lambda i: (
                f"{files[index.tar[i]].name}:{index.name(i)} has label {index.label[i]}, of {MAX_CLASSES:,} at most: "
                "number them from 0"
            ),
        )
        class_names = read_class_names(class_names_file, "class_names_file") if class_names_file else None
        if num_classes is None:
            num_classes = len(class_names) if class_names is not None else int(index.label.max()) + 1
        class_names = [str(i) for i in range(num_classes)] if class_names is None else class_names
        if len(class_names) != num_classes:
            raise UserError(f"{class_names_file} names {len(class_names)} classes, but num_classes={num_classes}: drop one")
        super().__init__(files, index, num_classes, class_names, "tar_shards")
        if num_classes and (index.label < 0).all():
            raise UserError(f'{path}: num_classes={num_classes}, but no sample has a label (.cls, or "label" in .json): pass 0')
        if (index.label >= 0).any():
            tar_index.reject(
                index, index.label < 0, lambda i: f"{self._name(i)} has no label, but others have: add the missing labels"
            )
        tar_index.reject(
            index,
            index.label >= num_classes,
            lambda i: (
                f"{self._name(i)} has label {index.label[i]}, outside [0, {num_classes}): correct it, or the number of classes"
            ),
        )


def tar_files(path: str) -> list[Path]:
    """Lists the files of a folder (its *.tar, sorted), a glob (sorted), a brace pattern (in its order), or one tar.

    Raises:
        UserError: there are no files, a file is missing or listed twice, or a tar is compressed.
    """
    if not str(path):
        raise UserError("data.path is empty; give a folder of .tar files or a pattern such as train-{0000..0099}.tar")
    whole = local_path(path)
    if whole.is_dir():
        visible = (file for file in whole.iterdir() if not file.name.startswith("."))
        files = sorted(file for file in visible if file.name.endswith((".tar", *PACKED)))
    elif whole.exists():
        files = [whole]
    else:
        files = []
        for name in _braces(str(whole)):
            matches = [name] if os.path.exists(name) else sorted(glob.glob(name))
            if not matches:
                raise UserError(f"{name} does not exist (from the pattern {path!r}); tars are read from a file system only")
            files += map(Path, matches)
    if not files:
        raise UserError(f"the folder {path} contains no .tar files")
    packed = [file for file in files if file.name.endswith(PACKED)]
    if packed:
        raise UserError(f"{len(packed)} of {len(files)} files are compressed, such as {packed[0]}: unpack them to .tar first")
    twice = [file for file, times in collections.Counter(files).items() if times > 1]
    if twice:
        raise UserError(f"{path!r} names {twice[0]} twice")
    return files


def _braces(pattern: str) -> Iterator[str]:
    """Expands a shell's brace pattern: {0000..0099} counts with fixed width, {a,b} lists alternatives."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    first, dots, last = match[1].partition("..")
    if dots:
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise UserError(f"{{{match[1]}}} in {pattern!r} must count up between two numbers, such as {{0000..0099}}")
        choices = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _end_with(index: TarIndex, suffixes: Sequence[str]) -> np.ndarray:
    """Whether the name of each sample ends with one of the suffixes, bool [N]."""
    starts = np.concatenate([[0], index.name_end[:-1]])[: len(index)]
    found = np.zeros(len(index), bool)
    for suffix in suffixes:
        wanted = np.frombuffer(suffix.encode(), np.uint8)
        long = np.flatnonzero(index.name_end - starts >= len(wanted))
        tails = index.names[index.name_end[long][:, None] - len(wanted) + np.arange(len(wanted))]
        found[long] |= (tails == wanted).all(1)
    return found


class _Part(NamedTuple):
    """A member of a sample, with the labels from .cls or .json and whether it has a caption and a long one."""

    member: Member
    labels: tuple = ()
    has_caption: bool = False
    has_long: bool = False


def _samples(file: Path, number: int) -> list[Row]:
    """Lists the samples of one tar, in the order of their first members."""
    samples: dict[str, dict[str, _Part]] = {}
    strange = 0
    with opened(file) as fd:
        scan = TarScan(fd, str(file))
        for member in scan:
            folder, slash, base = member.name.rpartition("/")
            if any(map(is_strange, folder.split("/"))):
                strange += 1
                continue
            stem, dot, suffix = base.partition(".")
            suffix = suffix.lower()
            if not stem or not dot:
                continue
            parts = samples.setdefault(folder + slash + stem, {})
            if suffix in parts:
                raise UserError(f"{file}: two members are called {folder + slash + stem}.{suffix}; rename one sample")
            parts[suffix] = _part(scan, member, suffix)
    if strange:
        logging.warning(
            "%s: %d members in folders such as @eaDir, __MACOSX or hidden ones are not part of the data set", file, strange
        )
    return [_row(f"{file}:{key}", key, number, parts) for key, parts in samples.items()]


def _part(scan: TarScan, member: Member, suffix: str) -> _Part:
    """Makes the `_Part` of a member; reads it if it has a label or description."""
    what = f"{scan.what}:{member.name}"
    limit = TEXT_BYTES.get(suffix)
    if limit is None:
        return _Part(member, has_caption=suffix in CAPTIONS)
    if member.size > limit:
        raise UserError(
            f"{what} has {member.size:,} bytes, but a .{suffix} may have at most {limit:,}; rename it if it is not a .{suffix}"
        )
    data = scan.read(member.offset, member.size)
    if suffix == "cls":
        text = data.strip()
        return _Part(member, (int(text) if text.isdigit() else text.decode(errors="backslashreplace"),))
    try:
        fields = json_object(data, "it")
        caption, long = _caption_field(fields), _caption_field(fields, LONG)
    except ValueError as error:
        raise UserError(f"{what} cannot be read ({error}): correct it, or pack the tar without it") from None
    labels = tuple(fields[name] for name in ("label", "cls") if fields.get(name) is not None)
    return _Part(member, labels, caption is not None, caption is not None and long is not None)


def _row(what: str, key: str, number: int, parts: dict[str, _Part]) -> Row:
    stored = {suffix: part.member for suffix, part in parts.items() if suffix in IMAGES + CLIPS}
    if len(stored) != 1:
        raise UserError(
            f"{what} has {len(stored)} images among its members ({', '.join('.' + suffix for suffix in parts)}), but "
            f"a sample must have one image or clip; its name ends at the first dot (suffixes: {', '.join(IMAGES + CLIPS)})"
        )
    labels = [label for part in parts.values() for label in part.labels]
    for label in labels:
        if type(label) is not int or not 0 <= label < 2**31:
            raise UserError(
                f"{what} has the label {reprlib.repr(label)}, but a label must be an integer of at least 0: number the classes"
            )
    if len(set(labels)) > 1:
        raise UserError(f"{what} has several labels, {', '.join(map(str, labels))}: leave one")
    with_caption = sorted((suffix for suffix in parts if parts[suffix].has_caption), key=CAPTIONS.index)
    caption = next((suffix for suffix in with_caption if parts[suffix].has_long), next(iter(with_caption), None))
    ((suffix, image),) = stored.items()
    text = parts[caption].member if caption else Member("", 0, -1)
    label = labels[0] if labels else -1
    key += f".{suffix}" * (suffix in CLIPS)  # by which a clip is told from an image
    return Row(key, number, image.offset, image.size, label, text.offset, text.size, caption == "json")


def _caption_field(fields: dict, names: Sequence[str] = ("caption", "text")) -> str | None:
    """The caption in a sample's .json. Raises ValueError if it is not a string."""
    caption = next((fields[name] for name in names if fields.get(name) is not None), None)
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"its caption is {reprlib.repr(caption)}, not a string")
    return caption
