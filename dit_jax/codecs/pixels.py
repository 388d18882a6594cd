"""The identity codec: diffusion on the pixels of images or clips.

B batch, H x W x C image, F frames.
"""

from dataclasses import dataclass
from typing import Any

import jax

from dit_jax.codecs.codec import check_channels
from dit_jax.errors import UserError


@dataclass(frozen=True)
class Pixels:
    """Uses (images - mean) / std as latents, with approximately unit variance; lossless and without parameters.

    Fields:
        image_channels: 1 grey, 3 RGB.
        mean, std: of the data set's pixels in [-1, 1]; 0 and 0.5 suit photographs.
    """

    image_channels: int = 3
    mean: float = 0.0
    std: float = 0.5

    rules = ()  # nothing to split

    def __post_init__(self):
        if self.std <= 0:
            raise UserError(f"codec.std is {self.std}; it must be positive")

    @property
    def downsample(self) -> int:
        return 1

    @property
    def latent_channels(self) -> int:
        return self.image_channels

    @property
    def moment_channels(self) -> int:
        return self.image_channels

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape, (H, W, C) or (F, H, W, C), unchanged.

        Raises:
            UserError: the number of channels differs.
        """
        check_channels(self, shape)
        return tuple(shape)

    def macs(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(0, 0): scale and shift do not count."""
        return 0, 0

    def init(self, key: jax.Array) -> dict:
        return {}

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """Returns [B, H, W, C] or [B, F, H, W, C] in [-1, 1] unchanged: the posterior is a point."""
        return images

    def sample_latent(self, key: jax.Array, moments: jax.Array) -> jax.Array:
        return (moments - self.mean) / self.std

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        return latents * self.std + self.mean
