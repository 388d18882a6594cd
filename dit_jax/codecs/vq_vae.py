"""The vector-quantized autoencoder of latent diffusion, VQ-f4: the KL autoencoder's layers, and a codebook before the decoder.

Letters: B batch; H, W image; h, w latent grid, h = H / downsample; C channels; K entries of the codebook.
Source: Rombach et al. 2022 (High-Resolution Image Synthesis with Latent Diffusion Models), section 3.1 ("VQ-reg") and appendix G;
the quantization is that of van den Oord et al. 2017 (Neural Discrete Representation Learning), equations 1 and 2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dit_jax.codecs.codec import AUTOENCODER_RULES
from dit_jax.codecs.kl_vae import Autoencoder
from dit_jax.errors import UserError

CHUNK = 128  # entries of the codebook that are compared at once


def nearest(codebook: jax.Array, z: jax.Array) -> jax.Array:
    """Index of the entry with the smallest squared distance, int32 [...]; of several such entries the first.

    The distance is a float32 sum of squared differences, which does not cancel as |z|^2 - 2 z e + |e|^2 does. The codebook is
    scanned CHUNK entries at a time, so that the memory is that of [..., CHUNK, C] numbers instead of [..., K, C]. No operation
    mixes rows of z, which may be split over a mesh. A vector with NaN gets index 0.

    Args:
        codebook: [K, C].
        z: [..., C].
    """
    entries, chunk = len(codebook), min(CHUNK, len(codebook))
    # The last chunk ends with the codebook and may overlap the one before it, whose entries stay the first.
    starts = np.minimum(np.arange(0, entries, chunk), entries - chunk).astype(np.int32)
    codebook, z = codebook.astype(jnp.float32), z.astype(jnp.float32)

    def compare(best, start):
        distance, index = best
        part = lax.dynamic_slice_in_dim(codebook, start, chunk)
        distances = jnp.square(z[..., None, :] - part).sum(-1)
        closer = distances.min(-1) < distance
        new = (jnp.where(closer, distances.min(-1), distance), jnp.where(closer, start + distances.argmin(-1), index))
        return new, None

    none = jnp.full(z.shape[:-1], jnp.inf), jnp.zeros(z.shape[:-1], jnp.int32)
    return lax.scan(compare, none, starts)[0][1]


@dataclasses.dataclass(frozen=True)
class VQVAE(Autoencoder):
    """The sizes of a vector-quantized autoencoder; its parameters are a pytree {"encoder", "decoder", "codebook"}.

    `encode` gives the continuous latent before the quantization, on which the diffusion model is trained, and `decode` replaces
    each latent pixel by the nearest entry of the codebook, as latent diffusion's `VQModelInterface` does. The latent is a
    function of the image: there is no posterior, and a latent cache holds C channels instead of 2C.

    The defaults are VQ-f4, the first stage of LDM-4: 55,322,782 parameters. It is used with trained weights; dit_jax does not
    train it.

    Attributes:
        block_out_channels: width of each level, finest first; every level but the last halves the resolution.
        layers_per_block: resnet blocks per level of the encoder; the decoder has one more.
        latent_channels: C of the latents and of the codebook's entries.
        codebook_size: K, entries of the codebook.
        scale, shift: latents = (encoder's output - shift) * scale; 1 and 0 for latent diffusion's models. Each is one number, or
            a sequence of one number per latent channel.
        image_channels: 3, or 1 for grey images.
        norm_groups: groups of every norm; must divide every width.
        dtype: of activations and products; norms' statistics, softmax, the quantization and all outputs are always float32.
            jax_default_matmul_precision determines the precision of float32 products (by default, TPUs use bfloat16 passes).
        param_dtype: of parameters from `init`; loaded weights keep the dtype of their file.
    Raises:
        UserError: at construction, for invalid sizes.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512)
    layers_per_block: int = 2
    latent_channels: int = 3
    codebook_size: int = 8192
    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0
    image_channels: int = 3
    norm_groups: int = 32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    use_quant_conv = True
    rules = (*AUTOENCODER_RULES, (r"codebook/embedding", ()))

    def __post_init__(self):
        super().__post_init__()
        if self.codebook_size < 1:
            raise UserError(f"codebook_size {self.codebook_size} must be at least 1")

    @property
    def moment_channels(self) -> int:
        """C: the latent itself."""
        return self.latent_channels

    def macs(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(encode, decode) in multiply-adds for one image, as `Autoencoder.macs`, with the K C of each latent pixel's search.

        172.6e9 and 335.4e9 for VQ-f4 at 256 px.
        """
        encode, decode = super().macs(shape)
        height, width, channels = self.latent_shape(shape)
        return encode, decode + height * width * self.codebook_size * channels

    def init(self, key: jax.Array) -> dict:
        """Random parameters: as of `Autoencoder.init`; the codebook is uniform in +-1/K."""
        layers, codebook = jax.random.split(key)
        bound = 1 / self.codebook_size
        shape = (self.codebook_size, self.latent_channels)
        entries = jax.random.uniform(codebook, shape, self.param_dtype, -bound, bound)
        return {**super().init(layers), "codebook": {"embedding": entries}}

    def sample_latent(self, key: jax.Array, moments: jax.Array) -> jax.Array:
        """Latents [B, h, w, C] float32 of what `encode` returns, in any floating dtype; nothing is drawn.

        Raises:
            ValueError: the last axis of the moments is not C.
        """
        if moments.shape[-1] != self.latent_channels:
            raise ValueError(f"moments have shape {moments.shape}: the last axis must be {self.latent_channels}")
        return self.scaled(moments.astype(jnp.float32))

    def quantize(self, params: Any, z: jax.Array) -> jax.Array:
        """The nearest entries of the codebook, float32, [..., C]; the gradient passes as if nothing were quantized.

        Args:
            params: only params["codebook"] is used.
            z: unscaled latents [..., C]. NaN stays NaN.
        """
        codebook = params["codebook"]["embedding"].astype(jnp.float32)
        return z + lax.stop_gradient(codebook[nearest(codebook, z)] - z)

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Quantizes and decodes latents to images [B, H, W, image_channels] float32, approximately in [-1, 1] and not clipped.

        Args:
            params: params["decoder"] and params["codebook"] are used.
            latents: [B, h, w, C], scaled as by `sample_latent`.
        Raises:
            ValueError: latents have another rank or channel count.
        """
        z = self.unscaled(latents)
        images: Any = self.decoder.apply({"params": params["decoder"]}, self.quantize(params, z))
        return images
