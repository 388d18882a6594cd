"""Converts images between uint8 and float32 in [-1, 1]."""

import jax
import jax.numpy as jnp
import numpy as np


def to_float(images: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array | np.ndarray) -> jax.Array:
    """float in about [-1, 1] -> uint8: clip(127.5 x + 128, 0, 255), truncated, as the paper's sampling code does."""
    return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)
