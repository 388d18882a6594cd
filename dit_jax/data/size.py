"""Sizes of images in pixels, height first: the one place that parses and writes them."""

import re
from collections.abc import Sequence

from dit_jax.errors import UserError


def parse_size(text: str, name: str = "--resolution") -> tuple[int, int]:
    """(height, width) of "256", a square, or of "256x384", height first.

    Args:
        name: what the error message calls the value.

    Raises:
        UserError: any other text, or a side of 0.
    """
    found = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text)
    if not found:
        raise UserError(f"{name}={text}: write one side in pixels, as in 256, or height x width, as in 256x384")
    height = int(found[1])
    width = int(found[2]) if found[2] else height
    if height < 1 or width < 1:
        raise UserError(f"{name}={text} must be at least 1 pixel in height and width, as in 256 or 256x384")
    return height, width


def size_text(size: Sequence[int]) -> str:
    """What `parse_size` reads: "256" of (256, 256), "256x384" of (256, 384)."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def size_json(size: Sequence[int]) -> int | list[int]:
    """What results and plans record: 256 of (256, 256), [256, 384] of (256, 384)."""
    height, width = size
    return height if height == width else [height, width]
