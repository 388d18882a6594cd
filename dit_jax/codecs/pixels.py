"""The identity codec: diffusion on pixels.

B batch, H x W x C image.
"""

from dataclasses import dataclass

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

    def __post_init__(self):
        if self.std <= 0:
            raise UserError(f"codec.std is {self.std}; it must be positive")

    @property
    def downsample(self) -> int:
        return 1

    @property
    def latent_channels(self) -> int:
        return self.image_channels

    def init(self, key):
        return {}

    def encode(self, params, images):
        """Returns the images [B, H, W, C] in [-1, 1] unchanged: the posterior is a point."""
        return images

    def sample_latent(self, key, moments):
        return (moments - self.mean) / self.std

    def decode(self, params, latents):
        return latents * self.std + self.mean
