"""Writes images as a grid in one picture file, and clips as rows of frames, with the names of their classes and a caption."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_jax.storage.atomic import replacing

_SMALLEST_SIDE = 64
GAP = 4  # pixels between images and around them
GAP_LEVEL = 40  # dark grey, so that black images have an edge
TEXT_LEVEL = 225
WIDEST_SIDE = 2  # of the names of rows, in images
ANIMATED: dict[str, dict[str, Any]] = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}}  # format: arguments of Pillow
SMALLEST_TEXT, LARGEST_TEXT = 11, 24  # pixels; a quarter of an image's width between them


def write_image_grid(
    path: str | os.PathLike,
    images: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
    names: Sequence[str] = (),
    caption: str = "",
    rows: Sequence[str] = (),
) -> np.ndarray:
    """Writes images row by row into one picture and returns it, uint8; see `image_grid`.

    Args:
        path: file to write, atomically; its suffix is the format, its folder is created.
    Raises: ValueError as `image_grid`, and for an unknown suffix.
    """
    file_format = _format_of(path)
    grid = image_grid(images, columns, scale, names, caption, rows)
    with replacing(path) as partial:
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(partial, file_format)
    return grid


def write_animation(
    path: str | os.PathLike, grids: Sequence[np.ndarray], seconds: float = 4.0, hold_seconds: float = 1.5
) -> None:
    """Writes pictures of one size, uint8 [h, w, 1 or 3], as an animation that repeats; atomically.

    Args:
        path: .gif, .webp (lossless) or .png (animated PNG); its folder is created.
        seconds: of all frames together.
        hold_seconds: by which the last frame stays longer.
    Raises: ValueError for another suffix.
    """
    file_format = _format_of(path)
    if file_format not in ANIMATED:
        raise ValueError(f"{path} cannot hold an animation; use .webp, .gif or .png")
    frames = [Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid) for grid in grids]
    durations = [round(1000 * seconds / len(frames))] * len(frames)
    durations[-1] += round(1000 * hold_seconds)
    with replacing(path) as partial:
        frames[0].save(
            partial,
            file_format,
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            **ANIMATED[file_format],
        )


def _format_of(path: str | os.PathLike) -> str:
    file_format = Image.registered_extensions().get(Path(path).suffix.lower())
    if file_format is None:
        raise ValueError(f"{path} has a suffix that is not a picture format; use .png")
    return file_format


def image_grid(
    images: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
    names: Sequence[str] = (),
    caption: str = "",
    rows: Sequence[str] = (),
) -> np.ndarray:
    """Images row by row in one picture, uint8 [h, w, C], GAP pixels apart on dark grey.

    Each clip is a row of its frames; `columns` is then ignored. A text that is wider than its image is cut and ends in "…".

    Args:
        images: uint8 [N, H, W, C], or clips [N, F, H, W, C]; N >= 1, C = 1 or 3.
        columns: images per row; None makes the grid about square.
        scale: integer enlargement by nearest neighbour; None enlarges until the longer side of an image is at least
            64 pixels.
        names: one for each image or clip, written below it; once above each column if all its images have the same name.
        caption: written above the images.
        rows: a name for each row, written at its left.
    Raises: ValueError for another dtype or shape, another number of names or rows, or for columns or scale below 1.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images are {images.dtype}{list(images.shape)}: a grid needs uint8 [N >= 1, (F,) H, W, 1 or 3]")
    if len(names) not in (0, len(images)):
        raise ValueError(f"there are {len(names)} names for {len(images)} images")
    if images.ndim == 5:
        columns = images.shape[1]
        names = [text for name in names for text in (name, *[""] * (columns - 1))]
        images = images.reshape(-1, *images.shape[2:])
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    scale = max(1, math.ceil(_SMALLEST_SIDE / max(height, width))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns} and scale={scale} must be at least 1")
    if len(rows) not in (0, math.ceil(count / columns)):
        raise ValueError(f"there are {len(rows)} names for {math.ceil(count / columns)} rows")
    font = ImageFont.load_default(min(max(width * scale // 4, SMALLEST_TEXT), LARGEST_TEXT))
    line = sum(font.getmetrics()) + GAP  # type: ignore[union-attr]  # FreeType is part of Pillow's wheels
    heads = count > columns and all(name == names[i % columns] for i, name in enumerate(names))
    high, wide = height * scale + GAP + (line if names and not heads else 0), width * scale + GAP
    side = math.ceil(min(max(map(font.getlength, rows), default=0), WIDEST_SIDE * width * scale)) + GAP * bool(rows)
    captions = _wrapped(caption, font, side + columns * wide - GAP)
    first = GAP + line * (len(captions) + (heads and bool(names)))  # pixels above the first row of images
    grid = np.full((first + math.ceil(count / columns) * high, side + columns * wide + GAP, channels), GAP_LEVEL, np.uint8)
    for index, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = first + index // columns * high, side + GAP + index % columns * wide
        grid[top : top + height * scale, left : left + width * scale] = image

    picture = Image.fromarray(grid[..., 0] if channels == 1 else grid)
    draw = ImageDraw.Draw(picture)
    fill = TEXT_LEVEL if channels == 1 else (TEXT_LEVEL,) * 3
    for row, text in enumerate(captions):
        draw.text((GAP, GAP + row * line), text, fill, font)
    for row, name in enumerate(rows):
        draw.text((GAP, first + row * high + (height * scale - line + GAP) / 2), _cut(name, font, side - GAP), fill, font)
    for index, name in enumerate(names[:columns] if heads else names):
        top = first - line if heads else first + index // columns * high + height * scale + GAP // 2
        text = _cut(name, font, width * scale)
        middle = side + GAP + index % columns * wide + (width * scale - font.getlength(text)) / 2
        draw.text((middle, top), text, fill, font)
    return np.asarray(picture).reshape(grid.shape)


def _cut(text: str, font, width: int) -> str:
    """The text, or its beginning and "…", no wider than this."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrapped(text: str, font, width: int) -> list[str]:
    """The text in lines no wider than this, broken between words; a wider word is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_cut(word, font, width))
    return lines


def label_names(labels: Iterable[int], num_classes: int, class_names: Sequence[str] = ()) -> list[str]:
    """The name of each label: of `class_names` if there is one for each class, else the number; "none" of the null label.

    Bytes of a folder's name that are not UTF-8 are escaped.
    """
    class_names = [name.encode("utf-8", "backslashreplace").decode() for name in class_names]
    known = class_names if len(class_names) == num_classes else list(map(str, range(num_classes)))
    return ["none" if label == num_classes else known[label] for label in map(int, labels)]


def sampling_caption(step: int | None, guidance_scale: float, sampler: Mapping[str, Any], seed: int) -> str:
    """ "step 1500, guidance 1.5, ddpm with 100 steps, seed 0"."""
    steps = f" with {sampler['num_steps']} steps" if "num_steps" in sampler else ""
    at = "" if step is None else f"step {step}, "
    return f"{at}guidance {guidance_scale:g}, {sampler['name']}{steps}, seed {seed}"
