"""Converts a grid of values to a sequence of tokens, and back.

B batch, H x W x C grid, p patch side.
"""

import jax
import jax.numpy as jnp

from dit_jax.errors import UserError


def check_sides(height: int, width: int, patch_size: int) -> None:
    """Raises a UserError unless the side of a patch divides both sides of the input."""
    if height % patch_size or width % patch_size:
        raise UserError(
            f"the network's input is {height} x {width}, not a multiple of model.patch_size = {patch_size}; change the "
            "resolution or the patch size"
        )


def patchify(x: jax.Array, p: int) -> jax.Array:
    """[B, H, W, C] -> [B, (H/p) (W/p), p p C], patches in row-major order, channels last inside a patch."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c)
    return jnp.einsum("bhpwqc->bhwpqc", x).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(x: jax.Array, p: int, height: int, width: int) -> jax.Array:
    """[B, (height/p) (width/p), p p C] -> [B, height, width, C], the inverse of patchify."""
    b, _, k = x.shape
    x = x.reshape(b, height // p, width // p, p, p, k // (p * p))
    return jnp.einsum("bhwpqc->bhpwqc", x).reshape(b, height, width, -1)
