"""The protocol of autoencoders, and the sharding rules of the networks of this package.

B batch, H x W x C image, F frames of a clip, h x w x c latent.
"""

from typing import Any, Protocol

import jax

from dit_jax.errors import UserError
from dit_jax.parallel.rules import Rules

# Convolutions [k, k, in, out] or [t, k, k, in, out], linear layers [in, out], and vectors, of autoencoders and discriminators. None is split over
# tensor: split over fsdp and tensor, XLA gave wrong gradients on the mesh (2, 2, 2), for convolutions and, with one image per
# device, for the linear layers of the attention (jax 0.10.2, CPU).
AUTOENCODER_RULES: Rules = (
    (
        r"(conv|quant_conv|post_quant_conv|down_\d+_downsample|up_\d+_upsample|(down|up)_\d+_time|conv_(in|out|shortcut|\d+)|conv\d)/kernel",
        (None, None, "fsdp", None),
    ),
    (r"(query|key|value|qkv|out)/kernel", ("fsdp", None)),
    (r"\w+/(bias|scale)", ()),
)


class Codec(Protocol):
    """A frozen dataclass of sizes; its parameters are a separate pytree ({} if it has none), frozen during training.

    Shapes are those of one example, without B: (H, W, C) of an image, (F, H, W, C) of a clip.
    """

    @property
    def rules(self) -> Rules:
        """Sharding rules of the parameters."""

    @property
    def downsample(self) -> int:
        """H / h."""

    @property
    def image_channels(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def moment_channels(self) -> int:
        """Channels of what `encode` returns: 2c of a posterior (mean, log-variance), c of a codec without one."""

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of an example of this shape.

        Raises:
            UserError: the codec does not support such examples.
        """

    def macs(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Multiply-adds to encode one example of this shape, and to decode it.

        Raises:
            UserError: as `latent_shape`.
        """

    def init(self, key: jax.Array) -> Any:
        """Random parameters."""

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """Images f32[B, H, W, C] in [-1, 1] -> f32[B, h, w, moment_channels], the input of sample_latent. Clips have F and f after B."""

    def sample_latent(self, key: jax.Array, moments: jax.Array) -> jax.Array:
        """Moments -> latents f32[B, h, w, c], one sample of a posterior, scaled to approximately unit variance."""

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Scaled latents -> images f32[B, H, W, C], approximately in [-1, 1]."""


def check_channels(codec: Codec, shape: tuple[int, ...]) -> None:
    """Raises UserError if examples have another number of channels than the codec."""
    if shape[-1] != codec.image_channels:
        raise UserError(f"transform.channels = {shape[-1]} and the codec's image_channels = {codec.image_channels} must be equal")


def moments_shape(codec: Codec, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """(h, w, moment_channels) of one example with latents (h, w, c); a codec without `moment_channels` has 2c."""
    *grid, channels = latent_shape
    return *grid, getattr(codec, "moment_channels", 2 * channels)
