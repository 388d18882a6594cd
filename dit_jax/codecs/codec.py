"""The protocol of autoencoders.

B batch, H x W x C image, h x w x c latent.
"""

from typing import Any, Protocol

import jax


class Codec(Protocol):
    """A frozen dataclass of sizes; its parameters are a separate pytree ({} if it has none), frozen during training."""

    @property
    def downsample(self) -> int:
        """H / h."""

    @property
    def image_channels(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """Images f32[B, H, W, C] in [-1, 1] -> moments f32[B, h, w, 2c] (mean, log-variance), or other input of sample_latent."""

    def sample_latent(self, key: jax.Array, moments: jax.Array) -> jax.Array:
        """Moments -> one posterior sample f32[B, h, w, c], scaled to approximately unit variance."""

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Scaled latents -> images f32[B, H, W, C], approximately in [-1, 1]."""
