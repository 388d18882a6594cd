"""Sets of uint8 images or clips, read in batches from an npz or from a data source with its transform.

N images of H x W pixels and C channels; of clips, N x F x H x W x C. Where images are meant, clips are too, unless it says so.
"""

import contextlib
import functools
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from dit_jax.data.clip_transform import ClipTransform
from dit_jax.data.loader import read_in_order
from dit_jax.data.size import size_text
from dit_jax.data.sources.named import named_source
from dit_jax.data.sources.source import Source
from dit_jax.data.transforms import ImageTransform
from dit_jax.errors import UserError
from dit_jax.sample import shards
from dit_jax.storage.bounded import MAX_UNPACKED_BYTES, array_header, json_object, read_npz
from dit_jax.storage.paths import local_path

ARRAY = "arr_0.npy"
DIGITS_SHAPE = (8, 8, 1)
READ_BYTES = 2**24
MAX_PACKED_RATIO = 100  # of an array of images; that of photographs is below 2


class Images(Protocol):
    """Images with what is known of them."""

    @property
    def name(self) -> str:
        """What results call them."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """[H, W, C] of one image, [F, H, W, C] of one clip."""
        ...

    @property
    def made_by(self) -> dict | None:
        """How they were made, if their file says so."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """integer [N], if the images have labels that are known without reading all of them."""
        ...

    @property
    def identity(self) -> dict:
        """What can be known without reading all of them; extraction that goes on compares it."""
        ...

    def __len__(self) -> int: ...

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """Yields images start..stop-1 in order, uint8 [n, H, W, C]; n = size except in the last batch."""
        ...


class NpzImages:
    """The images of an npz file, arr_0 uint8 [N, H, W, C], or [N, F, H, W, C] of clips.

    Never all in memory, if the file was written by np.savez or np.savez_compressed.

    Raises:
        UserError: the file is not a readable npz, has no arr_0, another dtype or shape, a pickle, or fewer bytes than its shape
            needs.
    """

    def __init__(self, path: str | os.PathLike):
        path = local_path(path)
        self.path, self.name = path, str(path)
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                if ARRAY not in archive.namelist():
                    raise UserError(
                        f"{path} has no array arr_0 (it has {', '.join(names) or 'nothing'}); write it with "
                        "dit_jax.sample or np.savez(path, images)"
                    )
                self._member = archive.getinfo(ARRAY)
                if self._member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("arr_0 is packed in another way than NumPy's")
                with archive.open(ARRAY) as file:
                    shape, fortran, dtype = array_header(file)
                    self._header_bytes = file.tell()
            self.made_by = _made_by(path) if "made_by" in names else None
            self.labels = _labels(path) if "labels" in names else None
            self.texts = _texts(path) if "captions" in names else {}
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except Exception as error:
            raise UserError(f"{path} is not a readable npz of images: {error!s:.300}") from None
        if dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] not in (1, 3) or shape[0] < 2 or 0 in shape or fortran:
            raise UserError(
                f"{path}: arr_0 is {dtype} {list(shape)}{' in Fortran order' if fortran else ''}; it must be uint8 "
                "[N, H, W, 1 or 3], or [N, F, H, W, 1 or 3] of clips, with N >= 2"
            )
        if self._member.file_size > max(MAX_UNPACKED_BYTES, MAX_PACKED_RATIO * self._member.compress_size):
            raise UserError(
                f"{path}: arr_0 unpacks from {self._member.compress_size:,} to {self._member.file_size:,}, more than images do; "
                "write it with np.savez, unpacked, if they are real"
            )
        if self._member.file_size != self._header_bytes + math.prod(shape):
            raise UserError(
                f"{path} is not a readable npz of images: arr_0 declares the shape {list(shape)} but has "
                f"{self._member.file_size - self._header_bytes} bytes"
            )
        for name, texts in self.texts.items():
            if len(texts) != shape[0]:
                raise UserError(f"{path} has {len(texts)} {name} for {shape[0]} images; write one for each")
        self._count, self.shape = shape[0], tuple(shape[1:])
        self._stream: IO[bytes] | None = None  # of a compressed file, which can only be read sequentially
        self._position = 0
        self.identity = {
            "npz": str(path.absolute()),
            "bytes": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "crc32": self._member.CRC,
            "shape": list(shape),
        }

    def __len__(self) -> int:
        return self._count

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        read = self._mapped if self._member.compress_type == zipfile.ZIP_STORED else self._unpacked
        return read(start, stop, size)

    def _mapped(self, start, stop, size):
        images = self._content[self._header_bytes :].reshape(self._count, *self.shape)
        for first in range(start, stop, size):
            yield np.array(images[first : min(first + size, stop)])

    @functools.cached_property
    def _content(self) -> np.ndarray:
        """The uncompressed bytes of arr_0, memory-mapped; their CRC-32 is checked once, before they are used."""
        with open(self.path, "rb") as file:  # the local header's names may be longer than the directory's
            file.seek(self._member.header_offset)
            header = file.read(30)
        name, extra = struct.unpack("<HH", header[26:30])
        offset = self._member.header_offset + 30 + name + extra
        try:
            content, crc = np.memmap(self.path, np.uint8, "r", offset, (self._member.file_size,)), 0
        except ValueError as error:
            raise self._damaged(error) from None
        for start in range(0, len(content), READ_BYTES):
            crc = zlib.crc32(content[start : start + READ_BYTES].data, crc)
        if crc != self._member.CRC:
            raise self._damaged("the CRC-32 of arr_0 does not match")
        return content

    def _damaged(self, why) -> UserError:
        return UserError(f"{self.path} is damaged ({why}): draw, write or download it again")

    def _unpacked(self, start, stop, size):
        row = math.prod(self.shape)
        if self._stream is None or self._position > start:
            self._stream, self._position = zipfile.ZipFile(self.path).open(ARRAY), 0  # noqa: SIM115
            self._skip(self._header_bytes)
        self._skip((start - self._position) * row)
        for first in range(start, stop, size):
            count = min(size, stop - first)
            data = self._read(count * row)
            self._position = first + count
            yield np.frombuffer(data, np.uint8).reshape(count, *self.shape)

    def _skip(self, count: int):
        while count:
            count -= len(self._read(min(count, READ_BYTES)))

    def _read(self, count: int) -> bytes:
        """Reads the next bytes of a compressed file; zipfile checks the CRC-32 at its end."""
        assert self._stream is not None  # `_unpacked` has opened it
        try:
            data = self._stream.read(count)
        except (zlib.error, zipfile.BadZipFile, EOFError) as error:
            raise self._damaged(error) from None
        if len(data) < count:
            raise self._damaged("arr_0 ends early")
        return data


def _made_by(path: Path) -> dict:
    return json_object(str(read_npz(path, ["made_by"])["made_by"]), f"the entry made_by of {path}", "draw or write it again")


def _labels(path: Path) -> np.ndarray | None:
    """The labels that `dit_jax.sample` writes; None if other code gave the name to something else."""
    labels = read_npz(path, ["labels"])["labels"]
    return labels if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) else None


def _texts(path: Path) -> dict[str, list[str]]:
    """{"captions": one for each image} of text-to-image samples; {} if other code gave the name to something else."""
    captions = read_npz(path, ["captions"])["captions"]
    return {"captions": captions.tolist()} if captions.ndim == 1 and captions.dtype.kind == "U" else {}


def captions_of(images: Images) -> Sequence[str] | None:
    """The captions of samples that a network with text drew, one for each image; None if they have none."""
    found: Sequence[str] | None = (getattr(images, "texts", None) or {}).get("captions")
    return found


class SourceImages:
    """The images of a data source, decoded and cropped, never mirrored; an unreadable image raises an error that names it.

    Args:
        name: its name in results.
    """

    def __init__(self, source: Source, transform: ImageTransform | ClipTransform, name: str):
        self.source, self._transform, self.name, self.made_by = source, transform, name, None
        self.labels = getattr(source, "labels", None) if source.num_classes else None
        self.shape: tuple[int, ...] = transform.shape
        self.transform = transform.describe()
        self.identity = {"fingerprint": source.fingerprint, "records": len(source), **self.transform}

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        with contextlib.closing(read_in_order(self.source, self._transform, size, start=start, stop=stop)) as batches:
            for batch in batches:
                yield batch["image"]


class ArrayImages:
    """Images in memory, uint8 [N, H, W, C] or clips [N, F, H, W, C], with their texts if they have some, as {"captions": [...]}."""

    def __init__(
        self,
        images: np.ndarray,
        name: str,
        made_by: dict | None = None,
        labels: np.ndarray | None = None,
        texts: Mapping[str, Sequence[str]] | None = None,
    ):
        if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] not in (1, 3) or len(images) < 2:
            raise UserError(
                f"{name}: images are {images.dtype} {list(images.shape)}; uint8 [N >= 2, H, W, 1 or 3], or [N >= 2, F, H, W, 1 or 3] of "
                "clips, is needed"
            )
        self.images, self.name, self.made_by, self.shape = images, name, made_by, images.shape[1:]
        self.labels, self.texts = labels, dict(texts or {})
        self.identity = {"array": list(images.shape)}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, size):
            yield self.images[first : min(first + size, stop)]


class Frames:
    """The frames of clips as images, in order: frame t of clip n is image n F + t. Each has the label and the text of its clip."""

    def __init__(self, clips: Images):
        self.clips, self.name, self.made_by = clips, f"the frames of {clips.name}", clips.made_by
        self.count, *shape = clips.shape  # frames of a clip
        self.shape = tuple(shape)
        self.labels = None if clips.labels is None else np.repeat(clips.labels, self.count)
        texts = getattr(clips, "texts", None) or {}
        self.texts = {name: [text for text in texts[name] for _ in range(self.count)] for name in texts}
        self.identity = {"frames_of": clips.identity}
        if isinstance(clips, SourceImages):
            self.transform = clips.transform

    def __len__(self) -> int:
        return len(self.clips) * self.count

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """As `Images.batches`; reads whole clips and holds `size` frames and one clip."""
        first, last = start // self.count, -(-stop // self.count)
        at, held = first * self.count, np.empty((0, *self.shape), np.uint8)
        for clips in self.clips.batches(first, last, max(size // self.count, 1)):
            frames = clips.reshape(-1, *self.shape)
            frames = frames[max(start - at, 0) : stop - at]
            at += clips.shape[0] * self.count
            held = np.concatenate([held, frames])
            while len(held) >= size:
                yield held[:size]
                held = held[size:]
        if len(held):
            yield held


def open_samples(path: str) -> Images:
    """Opens the images of an npz, or of a finished folder of `dit_jax.sample`.

    Raises:
        UserError: it does not exist or contains no images; see `NpzImages` and `sample.shards.read`.
    """
    location = local_path(path)
    if not location.is_dir():
        return NpzImages(location)
    return shards.read(location)


def cropped(
    data: str, size: tuple[int, int], channels: int, split: str | None = None, frames: int | None = None, fps: float | None = None
) -> SourceImages:
    """The images of a data set as in `named_source`, centre-cropped to (height, width).

    Args:
        frames: take the middle frames of its clips, that many, in place of images.
        fps: of the clips that are taken; None for frames as they are stored.
    """
    transform: ImageTransform | ClipTransform = ImageTransform(size[0], channels, flip=False, size=size)
    if frames is not None:
        transform = ClipTransform(frames, size[0], channels, flip=False, fps=fps, size=size)
    return SourceImages(named_source(data, split), transform, data)


def open_images(data: str, shape: tuple[int, ...], split: str | None = None) -> Images:
    """Opens the images that the command line names: an npz, or a centre-cropped data set as in `named_source`.

    Args:
        shape: (H, W, C) of the images to compare them with, or (F, H, W, C) of clips; the digits are always 8 x 8 x 1.
    Raises:
        UserError: the data set does not exist, or its images have another shape.
    """
    images: Images
    if data.endswith(".npz"):
        images = NpzImages(local_path(data))
    else:
        *frames, height, width, channels = DIGITS_SHAPE if data == "digits" else shape
        images = cropped(data, (height, width), channels, split, *frames)
    if images.shape != tuple(shape):
        raise UserError(
            f"the samples are {' x '.join(map(str, shape))} and the reference {data} is "
            f"{' x '.join(map(str, images.shape))}; they must be equal: give images of that size, or make "
            f"a reference with --make_reference --resolution={size_text(shape[-3:-1])}"
        )
    return images
