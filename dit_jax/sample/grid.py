"""Writes images as a grid in one picture file, and clips as rows of frames."""

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dit_jax.storage.atomic import replacing

_SMALLEST_SIDE = 64
GAP = 4  # pixels between images and around them
GAP_LEVEL = 40  # dark grey, so that black images have an edge


def write_image_grid(
    path: str | os.PathLike, images: np.ndarray, columns: int | None = None, scale: int | None = None
) -> np.ndarray:
    """Writes images row by row into one picture and returns it, uint8, images GAP pixels apart on dark grey.

    Each clip is a row of its frames; `columns` is then ignored.

    Args:
        path: file to write, atomically; its suffix is the format, its folder is created.
        images: uint8 [N, H, W, C], or clips [N, F, H, W, C]; N >= 1, C = 1 or 3.
        columns: images per row; None makes the grid about square.
        scale: integer enlargement by nearest neighbour; None enlarges until the longer side of an image is at least
            64 pixels.
    Raises: ValueError for another dtype or shape, an unknown suffix, or for columns or scale below 1.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images are {images.dtype}{list(images.shape)}: a grid needs uint8 [N >= 1, (F,) H, W, 1 or 3]")
    if images.ndim == 5:
        columns, images = images.shape[1], images.reshape(-1, *images.shape[2:])
    file_format = Image.registered_extensions().get(Path(path).suffix.lower())
    if file_format is None:
        raise ValueError(f"{path} has a suffix that is not a picture format; use .png")
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    scale = max(1, math.ceil(_SMALLEST_SIDE / max(height, width))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns} and scale={scale} must be at least 1")
    rows = math.ceil(count / columns)
    high, wide = height * scale + GAP, width * scale + GAP
    grid = np.full((rows * high + GAP, columns * wide + GAP, channels), GAP_LEVEL, np.uint8)
    for index, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = GAP + index // columns * high, GAP + index % columns * wide
        grid[top : top + height * scale, left : left + width * scale] = image

    with replacing(path) as partial:
        Image.fromarray(grid[..., 0] if channels == 1 else grid).save(partial, file_format)
    return grid
