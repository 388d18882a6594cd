"""Parses and formats image sizes in pixels, height first."""

import re
from collections.abc import Sequence

from dit_jax.errors import UserError


def parse_size(text: str, name: str = "--resolution") -> tuple[int, int]:
    """Parses "256" (a square) or "256x384" (height first) to (height, width).

    Args:
        name: name of the value in the error message.

    Raises:
        UserError: any other text, or a side of 0.
    """
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text)
    if not match:
        raise UserError(f"{name}={text}: write one side in pixels, as in 256, or height x width, as in 256x384")
    height = int(match[1])
    width = int(match[2]) if match[2] else height
    if height < 1 or width < 1:
        raise UserError(f"{name}={text} must be at least 1 pixel in height and width, as in 256 or 256x384")
    return height, width


def size_text(size: Sequence[int]) -> str:
    """Formats a size for `parse_size`: (256, 256) -> "256", (256, 384) -> "256x384"."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def size_json(size: Sequence[int]) -> int | list[int]:
    """Formats a size for results and plans: (256, 256) -> 256, (256, 384) -> [256, 384]."""
    height, width = size
    return height if height == width else [height, width]
