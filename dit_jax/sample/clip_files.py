"""Writes clips as files that play: an animated WebP, and an mp4 where PyAV is installed.

N clips of F frames, H x W x C.
"""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from dit_jax.sample.grid import image_grid, write_animation
from dit_jax.storage.atomic import replacing

FPS = 8.0  # of clips whose rate is not known
SMALLEST_SIDE = 16  # of an mp4, which H.264 asks for


def frames_of_grid(clips: np.ndarray, columns: int | None = None) -> Iterator[np.ndarray]:
    """The pictures uint8 [h, w, C] of an animation: frame f of all clips, uint8 [N, F, H, W, C], as a grid."""
    for frame in range(clips.shape[1]):
        yield image_grid(clips[:, frame], columns)


def write_clips(path: str | os.PathLike, clips: np.ndarray, fps: float | None, columns: int | None = None) -> list[Path]:
    """Writes clips that play side by side, and returns the paths: x.webp, lossless, and x.mp4 where PyAV is installed.

    An mp4 is for players: its colours are halved in resolution, so numbers must not be measured on it.

    Args:
        path: x.webp.
        clips: uint8 [N, F, H, W, C].
        fps: frames per second; None plays FPS.
    """
    path, rate = Path(path), fps or FPS
    grids = list(frames_of_grid(clips, columns))
    write_animation(path, grids, seconds=len(grids) / rate, hold_seconds=0.0)
    mp4 = path.with_suffix(".mp4")
    return [path, mp4] if write_mp4(mp4, grids, rate) else [path]


def write_mp4(path: str | os.PathLike, frames: list[np.ndarray], fps: float) -> bool:
    """Writes pictures uint8 [h, w, 1 or 3] as H.264, atomically; False without PyAV. Odd sides get a row or column more."""
    try:
        import av
    except ImportError:
        return False
    height, width = (max(side + side % 2, SMALLEST_SIDE) for side in frames[0].shape[:2])
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"crf": "12"}
        for picture in frames:
            padded = np.pad(picture, ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)), mode="edge")
            rgb = np.repeat(padded, 3, axis=2) if padded.shape[2] == 1 else padded
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")))
        file.mux(stream.encode())
    return True
