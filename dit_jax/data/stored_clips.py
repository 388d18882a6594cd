"""Decodes the frames of stored clips: animated GIF and WebP with Pillow, video files with PyAV (the extra `video`).

n is the number of frames of a clip, H and W are their height and width.
"""

import contextlib
import importlib.util
import io
import struct
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dit_jax.data.image_files import MAX_PIXELS, decode
from dit_jax.errors import UserError

ANIMATIONS = (".gif", ".webp")
FILMS = (".mp4", ".webm", ".mkv", ".m4v", ".mov", ".avi")
CLIP_SUFFIXES = FILMS + ANIMATIONS
MOST_BYTES = 256 << 20  # of a file, which is read whole
MOST_FRAMES = 100_000  # of a clip
MOST_UNEVEN = 0.5  # deviation of a frame's duration from the median, of the median
DAMAGED = "restore it, or leave it out"


class Facts(NamedTuple):
    """The size of a clip, and its frames per second (0 for a single frame)."""

    frames: int
    height: int
    width: int
    fps: float


class StoredClip:
    """The bytes of a clip, as a sequence of frames that are decoded when they are taken: `clip[start:stop:step]`.

    The content of the file determines its format, not its name. Frames are decoded one after the other from the last key frame
    before the first one taken; at most one of them and those that the codec needs are in memory. Transparency is dropped, and
    films are rotated as their metadata ask.

    A file is rejected if it is damaged, has no moving picture (as of sound alone), or has an uneven frame rate: frames last more
    or less than half as long again as the median. So are films of more than MOST_FRAMES frames. Odd sizes are accepted.

    Args:
        data: of the file.
        name: in error messages.

    Raises (when the clip is used):
        UserError: the file is rejected; PyAV is not installed.
    """

    def __init__(self, data: bytes, name: str):
        self.data, self.name = data, name

    def __len__(self) -> int:
        return len(self._reader.times)

    @property
    def fps(self) -> float:
        """Frames per second; 0 for a single frame."""
        return rate(self._reader.times, self.name)

    def facts(self) -> Facts:
        """The size and rate; decodes the first frame of a film."""
        height, width = self._reader.size
        return Facts(len(self), height, width, self.fps)

    @cached_property
    def _reader(self) -> Any:
        return (_Animation if is_animation(self.data) else _Film)(self.data, self.name)

    def __getitem__(self, part: slice) -> Iterator[np.ndarray]:
        """The frames of a slice with a positive step, uint8 [H, W, 3] each."""
        return _of_one_size(self._reader.frames(range(*part.indices(len(self)))), self.name)


class FrameFiles:
    """Image files that are the frames of a clip, with the interface of `StoredClip`.

    Args:
        images: of each frame the bytes of a file.
        name: in error messages.
        fps: frames per second; 0 if they are not known.
    """

    def __init__(self, images: Sequence[bytes], name: str, fps: float = 0.0):
        self.images, self.name, self.fps = images, name, fps

    def __len__(self) -> int:
        return len(self.images)

    def facts(self) -> Facts:
        """As `StoredClip.facts`."""
        height, width = next(self[:1]).shape[:2]
        return Facts(len(self), height, width, self.fps)

    def __getitem__(self, part: slice) -> Iterator[np.ndarray]:
        """As `StoredClip.__getitem__`."""
        return _of_one_size((np.asarray(decode(image, 3, self.name)) for image in self.images[part]), self.name)


def _of_one_size(frames: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    size = None
    for frame in frames:
        if frame.shape[:2] != (size := size or frame.shape[:2]):
            raise UserError(f"{name} has frames of several sizes: {DAMAGED}")
        yield frame


def rate(times: np.ndarray, name: str) -> float:
    """Frames per second of frames that begin at these times in seconds; 0 for one frame.

    Raises:
        UserError: they are not evenly spaced.
    """
    if len(times) < 2:
        return 0.0
    durations = np.diff(times)
    median = float(np.median(durations))
    if median <= 0 or (np.abs(durations - median) > MOST_UNEVEN * median).any():
        raise UserError(
            f"{name} has a variable frame rate (frames of {1000 * durations.min():.0f} to {1000 * durations.max():.0f} ms): "
            "encode it again with a constant one, or leave it out"
        )
    return round((len(times) - 1) / float(times[-1] - times[0]), 6)


def is_animation(data: bytes) -> bool:
    """Whether a file is a GIF or WebP, by its first bytes; it may have a single image."""
    return data[:4] == b"GIF8" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def check_bytes(size: int, name: str) -> None:
    """Raises a UserError if a clip has more than MOST_BYTES, which are read at once."""
    if size > MOST_BYTES:
        raise UserError(f"{name} has {size / 2**20:.0f} MiB, and at most {MOST_BYTES >> 20} are read: cut it into clips")


def check_av(what: str) -> None:
    """Raises a UserError if PyAV is not installed, which `what` needs."""
    if importlib.util.find_spec("av") is None:
        raise UserError(f"{what} needs PyAV to decode it: pip install 'dit_jax[video]'; GIF and WebP need nothing")


class _Animation:
    """An animated GIF or WebP, or one with a single image.

    Fields:
        times: float64 [n] seconds at which the frames begin.
        size: (H, W).
    """

    def __init__(self, data: bytes, name: str):
        self._data, self._name = data, name
        try:
            milliseconds = _gif_durations(data) if data[:4] == b"GIF8" else _webp_durations(data)
            with Image.open(io.BytesIO(data), formats=("GIF", "WEBP")) as picture:
                self.size = _checked(picture.height, picture.width, name)
        except (MemoryError, UserError):
            raise
        except Exception as error:
            raise _damaged(name, error) from error
        if not milliseconds:
            raise UserError(f"{name} has no image: {DAMAGED}")
        if len(milliseconds) > MOST_FRAMES:
            raise _too_long(name, len(milliseconds))
        self.times = np.cumsum([0, *milliseconds[:-1]]) / 1000
        rate(self.times, name)  # checks it

    def frames(self, wanted: range) -> Iterator[np.ndarray]:
        try:
            with Image.open(io.BytesIO(self._data), formats=("GIF", "WEBP")) as picture:
                for number in wanted:
                    picture.seek(number)
                    yield np.asarray(picture.convert("RGBA").convert("RGB"))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise OSError, EOFError, SyntaxError, struct.error, ...
            raise _damaged(self._name, error) from error


def _gif_durations(data: bytes) -> list[int]:
    """Milliseconds of each image of a GIF, from its blocks (GIF89a specification, sections 18 to 23)."""

    def table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    place = 13 + table(data[10])
    durations, delay = [], 0
    while data[place] != 0x3B:  # the trailer
        if data[place] == 0x21:  # an extension; 0xF9 has the delay of the next image, in hundredths of a second
            if data[place + 1] == 0xF9:
                delay = 10 * int.from_bytes(data[place + 4 : place + 6], "little")
            place += 2
        elif data[place] == 0x2C:  # an image
            durations.append(delay)
            place += 11 + table(data[place + 9])
        else:
            raise ValueError(f"unknown block {data[place]:#x}")
        while data[place]:  # sub-blocks
            place += 1 + data[place]
        place += 1
    return durations


def _webp_durations(data: bytes) -> list[int]:
    """Milliseconds of each image of a WebP, from its chunks (WebP container specification); [0] for a still image."""
    place, durations, still = 12, [], False
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
        if place + 8 + size > len(data):
            raise ValueError("it is truncated")
        if kind == b"ANMF":
            durations.append(int.from_bytes(data[place + 20 : place + 23], "little"))
        still |= kind in (b"VP8 ", b"VP8L")
        place += 8 + size + size % 2
    return durations or [0] * still


class _Film:
    """A video file.

    Fields:
        times: float64 [n] seconds at which the frames begin.
    """

    def __init__(self, data: bytes, name: str):
        self._data, self._name = data, name
        check_av(name)
        stamps, scale = self._stamps()
        try:
            rate(stamps * scale, name)
        except UserError:  # some codecs have packets without a picture of their own
            stamps = np.array([frame.pts for frame in self._decoded(None)], np.int64)
            rate(stamps * scale, name)
        self._shown, self.times = stamps, stamps * scale

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H, W), rotated."""
        with contextlib.closing(self._decoded(None)) as frames:
            height, width = _upright(next(frames)).shape[:2]
        return height, width

    def _opened(self) -> tuple[Any, Any]:
        import av

        container = av.open(io.BytesIO(self._data))
        if not container.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            container.close()
            raise UserError(f"{self._name} has no moving picture, only {kinds}: leave it out")
        stream = container.streams.video[0]
        _checked(stream.codec_context.height, stream.codec_context.width, self._name)
        stream.codec_context.thread_count = 1  # the loader has threads of its own
        return container, stream

    def _stamps(self) -> tuple[np.ndarray, float]:
        """(the times of all packets in ascending order, in units of the stream; seconds of a unit). Decodes nothing."""
        import av

        try:
            container, stream = self._opened()
            with container:
                found = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
                scale = float(stream.time_base)
        except av.FFmpegError as error:
            raise _damaged(self._name, error) from error
        if len(found) > MOST_FRAMES:
            raise _too_long(self._name, len(found))
        if not found or None in found:
            raise UserError(f"{self._name} has {'frames without times' if found else 'no frames'}: {DAMAGED}")
        return np.sort(np.array(found, np.int64)), scale

    def _decoded(self, first: int | None) -> Generator[Any]:
        """The frames from the last key frame at or before the time `first` on; from the beginning if it is None."""
        import av

        try:
            container, stream = self._opened()
            with container:
                if first is not None:
                    container.seek(first, stream=stream, backward=True)
                for frame in container.decode(stream):
                    if frame.is_corrupt or frame.pts is None:
                        raise UserError(f"{self._name} has a damaged frame: {DAMAGED}")
                    yield frame
        except av.FFmpegError as error:
            raise _damaged(self._name, error) from error

    def frames(self, wanted: range) -> Iterator[np.ndarray]:
        stamps = [int(self._shown[number]) for number in wanted]
        if not stamps:
            return
        taken = 0
        for start in (stamps[0], None) if wanted[0] else (None,):
            with contextlib.closing(self._decoded(start)) as frames:
                for frame in frames:
                    if frame.pts > stamps[taken]:
                        break  # the file's key frames are not where it says, or frames are missing
                    if frame.pts == stamps[taken]:
                        yield _upright(frame)
                        taken += 1
                        if taken == len(stamps):
                            return
            if taken:
                break
        raise UserError(f"{self._name} ends or breaks off before frame {wanted[taken]} of {len(self._shown)}: {DAMAGED}")


def _upright(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3] of a decoded frame, rotated as its metadata ask."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)


def _checked(height: int, width: int, name: str) -> tuple[int, int]:
    if height * width > MAX_PIXELS:
        raise UserError(f"{name} has frames of {width} x {height}; the limit is {MAX_PIXELS:,} pixels: scale it down")
    return height, width


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(f"{name} is not a readable clip ({type(error).__name__}: {error}): {DAMAGED}")


def _too_long(name: str, frames: int) -> UserError:
    return UserError(f"{name} has {frames:,} frames; the limit is {MOST_FRAMES:,}: cut it into clips")
