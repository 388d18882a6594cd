"""Rotary positions of tokens on a grid of frames, rows and columns.

N tokens, E features of a head, A heads.
"""

import jax
import jax.numpy as jnp
import numpy as np

PERIOD = 10_000.0
FREQUENCIES = ("geometric", "grid", "quarter_turns")
TINY = 4  # tokens of an axis; up to here quarter turns tell all apart
SHORT = 32  # up to here the published frequencies turn too little
VISIBLE = 0.3  # radians over the whole axis below which a pair tells nothing


def frequencies(name: str, length: int, width: int) -> np.ndarray:
    """f64[width / 2]: the angles by which the pairs of an axis turn from a token to the next.

    Args:
        name: "geometric" is PERIOD^(-2 i / width), the published choice, which is right for long axes. "grid" is geometric from
            a quarter turn to pi / (2 length): the slowest pair turns by a quarter turn over the axis. "quarter_turns" is a
            quarter and a half turn in turn, for axes of up to 4 tokens and for closed ones (a torus) of 4.
        length: tokens along the axis.
        width: features of the axis; even.

    Source: Su et al. 2021 (RoFormer), section 3.2.2, for "geometric".
    """
    pairs = np.arange(width // 2, dtype=np.float64)
    if name == "quarter_turns":
        return np.where(pairs % 2 == 0, np.pi / 2, np.pi)
    if name == "grid":
        return np.geomspace(np.pi / 2, np.pi / (2 * max(length, 1)), len(pairs)) if len(pairs) else pairs
    return PERIOD ** (-2 * pairs / width) if width else pairs


def cannot_tell_neighbours(name: str, length: int, width: int) -> bool:
    """Whether most pairs of an axis turn by less than VISIBLE over all of it: attention then hardly sees positions."""
    if length < 2 or not width:
        return False
    turns = (length - 1) * frequencies(name, length, width)
    return bool((turns >= VISIBLE).sum() * 2 < len(turns))


def chosen(name: str, length: int, width: int) -> str:
    """The frequencies of an axis: `name`, or for "auto" those that suit its length."""
    if name != "auto":
        return name
    if length <= TINY:
        return "quarter_turns"
    return "grid" if length <= SHORT or cannot_tell_neighbours("geometric", length, width) else "geometric"


def rope_angles(
    axes: tuple[np.ndarray, ...], widths: tuple[int, ...], names: tuple[str, ...], lengths: tuple[int, ...]
) -> np.ndarray:
    """Angles f32[N, E / 2] of rotary positions: pair i of an axis turns by its position times the axis's frequency i.

    Args:
        axes: the positions [N] of the tokens along each axis.
        widths: features of a head for each axis; even, with the sum E.
        names, lengths: of each axis's `frequencies`.

    Source: Su et al. 2021 (RoFormer), section 3.2.2, axes side by side as in Flux.
    """
    parts = [
        np.outer(positions.astype(np.float64), frequencies(name, length, width))
        for positions, width, name, length in zip(axes, widths, names, lengths, strict=True)
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array | np.ndarray) -> jax.Array:
    """Turns the pairs (x_0, x_1), (x_2, x_3), ... of x [B, N, A, E] by angles [N, E / 2] or [B, N, E / 2].

    float32 inside, x's dtype outside.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
