"""The KL autoencoder of latent diffusion: maps an image to a Gaussian on a grid 8 (or 16) times smaller, and back.

Letters: B batch; H, W image; h, w latent grid, h = H / downsample; C channels; N = h * w tokens of the attention layer.
Source: Rombach et al. 2022 (High-Resolution Image Synthesis with Latent Diffusion Models), section 3.1 and appendix G;
the layout is that of the published weights of Stable Diffusion, SD3 and Flux. `interop/vae.py` reads and writes them.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dit_jax.codecs.codec import AUTOENCODER_RULES, check_channels
from dit_jax.errors import UserError

# PyTorch's default initialisation of a convolution, used for the published weights: uniform in +-1/sqrt(fan_in).
# Deviation: PyTorch also draws the biases from it; here they are initialised to zero.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as in the original


def split_moments(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance of the posterior, float32; the log-variance is clipped to LOG_VARIANCE_RANGE.

    Args:
        moments: [B, h, w, 2C], mean then log-variance on the last axis.
    """
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)


def spatial_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v with one head over all positions and softmax in float32; the only place that selects a kernel.

    Uses the XLA implementation: the head width of 512 exceeds the limit of the cuDNN kernel. It stores the [N, N] float32 logits
    of every image, 1 GiB at 1024 px with f8, so use `KLVAE.decode_tiled` for larger images.

    Args:
        query, key, value: [B, N, C].
    """
    heads = (x[:, :, None] for x in (query, key, value))  # [B, N, 1, C]
    return jax.nn.dot_product_attention(*heads, implementation="xla")[:, :, 0]


class Layer(nn.Module):
    """Base class of the modules: the number of groups of the norms, the compute dtype and the parameter dtype."""

    norm_groups: int
    dtype: Any
    param_dtype: Any

    def conv(self, features: int, name: str, kernel_size: int = 3, strides: int = 1, padding: Any = "SAME") -> nn.Conv:
        return nn.Conv(
            features,
            (kernel_size, kernel_size),
            strides,
            padding,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=torch_uniform,
            name=name,
        )

    def norm(self, name: str) -> nn.GroupNorm:
        # Two-pass variance: E[x^2] - E[x]^2 in float32 loses digits if the mean is much larger than the deviation.
        return nn.GroupNorm(
            self.norm_groups,
            epsilon=1e-6,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def resnet(self, features: int, name: str) -> "ResnetBlock":
        return ResnetBlock(self.norm_groups, self.dtype, self.param_dtype, features=features, name=name)

    def middle(self, x: jax.Array) -> jax.Array:
        """Resnet, attention, resnet at the coarsest resolution; encoder and decoder use the same layers."""
        features = x.shape[-1]
        x = self.resnet(features, "mid_resnet_0")(x)
        x = AttentionBlock(self.norm_groups, self.dtype, self.param_dtype, name="mid_attention")(x)
        return self.resnet(features, "mid_resnet_1")(x)


class ResnetBlock(Layer):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip if the width changes."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, H, W, features]
        h = self.conv(self.features, "conv1")(nn.silu(self.norm("norm1")(x)))
        h = self.conv(self.features, "conv2")(nn.silu(self.norm("norm2")(h)))
        if x.shape[-1] != self.features:
            x = self.conv(self.features, "conv_shortcut", kernel_size=1)(x)
        return x + h


class AttentionBlock(Layer):
    """x + out(attention(norm(x))), one head as wide as the layer, over all h * w positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, h, w, C]
        batch, height, width, channels = x.shape

        def linear(name):
            return nn.Dense(channels, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=torch_uniform, name=name)

        tokens = self.norm("norm")(x).reshape(batch, height * width, channels)
        tokens = spatial_attention(linear("query")(tokens), linear("key")(tokens), linear("value")(tokens))
        return x + linear("out")(tokens).reshape(x.shape)


class Encoder(Layer):
    """Images [B, H, W, image_channels] to raw moments [B, h, w, out_channels], float32."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    out_channels: int
    use_quant_conv: bool

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.conv(self.block_out_channels[0], "conv_in")(images)
        for i, features in enumerate(self.block_out_channels):
            for j in range(self.layers_per_block):
                x = self.resnet(features, f"down_{i}_resnet_{j}")(x)
            if i < len(self.block_out_channels) - 1:
                # Padded only on the bottom and right, as in the training of the published weights.
                x = self.conv(features, f"down_{i}_downsample", strides=2, padding=((0, 1), (0, 1)))(x)
        x = nn.silu(self.norm("norm_out")(self.middle(x)))
        x = self.conv(self.out_channels, "conv_out")(x)
        if self.use_quant_conv:
            x = self.conv(self.out_channels, "quant_conv", kernel_size=1)(x)
        return x.astype(jnp.float32)


class Decoder(Layer):
    """Unscaled latents [B, h, w, latent_channels] to images [B, H, W, image_channels], float32, not clipped."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    image_channels: int
    use_quant_conv: bool

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        if self.use_quant_conv:
            z = self.conv(z.shape[-1], "post_quant_conv", kernel_size=1)(z)
        x = self.middle(self.conv(self.block_out_channels[-1], "conv_in")(z))
        for i, features in enumerate(reversed(self.block_out_channels)):
            for j in range(self.layers_per_block + 1):
                x = self.resnet(features, f"up_{i}_resnet_{j}")(x)
            if i < len(self.block_out_channels) - 1:
                x = self.conv(features, f"up_{i}_upsample")(upsample_nearest(x))
        x = nn.silu(self.norm("norm_out")(x))
        return self.conv(self.image_channels, "conv_out")(x).astype(jnp.float32)


def upsample_nearest(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling by 2: [B, H, W, C] -> [B, 2H, 2W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def tile_axis(size: int, tile: int, overlap: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Start positions of tiles along one axis of the latent grid, and their blending weights at every decoded pixel.

    Args:
        size: length of the axis in latent pixels; an axis no longer than `tile` is a single tile.
        tile, overlap: latent pixels; tiles are spread evenly, so that neighbours share at least `overlap`.
        factor: image pixels per latent pixel.
    Returns:
        starts [n] int32 in latent pixels, and weights [n, min(tile, size) * factor] float32: 1 inside, linear ramps
        over the overlaps, adding up to 1 at every pixel of the image.
    """
    length = min(tile, size)
    count = 1 + math.ceil((size - length) / (tile - overlap))
    starts = np.linspace(0, size - length, count).round().astype(np.int32)
    pixel = np.arange(length * factor) + 0.5
    ramp = np.minimum(pixel / (overlap * factor), 1.0) if overlap else np.ones_like(pixel)
    weights = np.ones((len(starts), length * factor))
    weights[1:] *= ramp
    weights[:-1] *= ramp[::-1]
    pixels = starts[:, None] * factor + np.arange(length * factor)
    total = np.zeros(size * factor)
    np.add.at(total, pixels, weights)
    return starts, (weights / total[pixels]).astype(np.float32)


def floating_dtype(name: str, value: Any) -> Any:
    """Converts names such as "bfloat16" and types such as jnp.bfloat16 to a jnp.dtype, so that codecs compare equal.

    Raises UserError if it is not a floating-point type.
    """
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"{name} {value!r} is not a floating type: use float32 or bfloat16")
    return dtype


class Autoencoder:
    """Sizes, encoder and decoder of a convolutional autoencoder: what `KLVAE`, `vq_vae.VQVAE` and, in part,
    `causal_vae.CausalVAE` share.

    A subclass is a frozen dataclass with the fields below, and defines `moment_channels`, `sample_latent` and `decode`.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...]
    use_quant_conv: bool
    image_channels: int
    norm_groups: int
    dtype: Any
    param_dtype: Any

    rules = AUTOENCODER_RULES

    @property
    def moment_channels(self) -> int:
        """Channels of what `encode` returns."""
        raise NotImplementedError

    def sample_latent(self, key: jax.Array, moments: jax.Array) -> jax.Array:
        """What `encode` returns -> scaled latents [B, h, w, C] float32."""
        raise NotImplementedError

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Scaled latents [B, h, w, C] -> images [B, H, W, image_channels] float32."""
        raise NotImplementedError

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))  # a config gives a list
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, floating_dtype(name, getattr(self, name)))
        if not self.block_out_channels:
            raise UserError("block_out_channels is empty: give one width per level, such as (128, 256, 512, 512)")
        for name in ("layers_per_block", "latent_channels", "image_channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_groups:
                raise UserError(
                    f"block_out_channels {self.block_out_channels} has {width}, not a positive multiple of norm_groups "
                    f"{self.norm_groups}: change one of them"
                )
        for name in ("scale", "shift"):
            self._check_numbers(name, getattr(self, name))

    def _check_numbers(self, name, value):
        """Converts a sequence to a tuple; UserError unless it has one finite number per channel (positive for scale)."""
        if np.ndim(value):
            value = tuple(float(x) for x in value)
            object.__setattr__(self, name, value)
            if len(value) != self.latent_channels:
                raise UserError(
                    f"{name} {value} has {len(value)} numbers for {self.latent_channels} latent channels: give one "
                    "number, or one per channel"
                )
        if not np.all(np.isfinite(value)) or (name == "scale" and not np.all(np.greater(value, 0))):
            raise UserError(f"{name} {value} must be {'positive and finite' if name == 'scale' else 'finite'}")

    @property
    def downsample(self) -> int:
        """Image pixels per latent pixel along one side: 2 ** (levels - 1), so 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(h, w, C) of the latents of an image of shape (H, W, image_channels).

        Raises:
            UserError: a clip, other channels, or a side that `downsample` does not divide.
        """
        if len(shape) != 3:
            raise UserError(
                f"{type(self).__name__} encodes images (H, W, C), not examples of shape {shape}: take a codec for clips, "
                "or pixels"
            )
        check_channels(self, shape)
        for name, side in zip(("height", "width"), shape, strict=False):
            if side < 1 or side % self.downsample:
                raise UserError(
                    f"{name} {side} is not a positive multiple of the codec's downsample {self.downsample}: choose one that is"
                )
        height, width, _ = shape
        return height // self.downsample, width // self.downsample, self.latent_channels

    def macs(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(encode, decode) in multiply-adds for one image: convolutions, linears and both attention products.

        136.4e9 and 311.1e9 for the Stable Diffusion codec at 256 px. Norms and activations are not counted, products with
        zero padding are. XLA's own count leaves those out and is a little lower (-1.2 % at 256 px).

        Args:
            shape: (H, W, image_channels).
        Raises:
            UserError: as `latent_shape`.
        """
        height, width, latent = self.latent_shape(shape)
        tokens, pixels = height * width, shape[0] * shape[1]
        widths, deepest = self.block_out_channels, self.block_out_channels[-1]
        middle = 2 * _resnet_macs(deepest, deepest, tokens) + 4 * tokens * deepest**2 + 2 * tokens**2 * deepest

        encode = _conv_macs(self.image_channels, widths[0], pixels) + middle + _conv_macs(deepest, self.moment_channels, tokens)
        decode = _conv_macs(latent, deepest, tokens) + middle + _conv_macs(widths[0], self.image_channels, pixels)
        if self.use_quant_conv:
            encode += _conv_macs(self.moment_channels, self.moment_channels, tokens, kernel_size=1)
            decode += _conv_macs(latent, latent, tokens, kernel_size=1)

        for level, features in enumerate(widths):
            area = pixels >> 2 * level
            finer, coarser = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
            same = _resnet_macs(features, features, area)
            encode += _resnet_macs(finer, features, area) + (self.layers_per_block - 1) * same
            decode += _resnet_macs(coarser, features, area) + self.layers_per_block * same
            if level < len(widths) - 1:
                encode += _conv_macs(features, features, area // 4)
            if level > 0:
                decode += _conv_macs(features, features, 4 * area)
        return encode, decode

    @property
    def encoder(self) -> Encoder:
        """The Linen module whose parameters are params["encoder"]."""
        return Encoder(out_channels=self.moment_channels, **self._shared_fields())

    @property
    def decoder(self) -> Decoder:
        """The Linen module whose parameters are params["decoder"]."""
        return Decoder(image_channels=self.image_channels, **self._shared_fields())

    def _shared_fields(self):
        return {
            "norm_groups": self.norm_groups,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "use_quant_conv": self.use_quant_conv,
        }

    def init(self, key: jax.Array) -> dict:
        """Random parameters: kernels are uniform in +-1/sqrt(fan_in), biases are zero, norms are the identity."""
        encoder_key, decoder_key = jax.random.split(key)
        side = self.downsample
        image = jnp.zeros((1, side, side, self.image_channels))
        latent = jnp.zeros((1, 1, 1, self.latent_channels))
        return {
            "encoder": jax.jit(self.encoder.init)(encoder_key, image)["params"],
            "decoder": jax.jit(self.decoder.init)(decoder_key, latent)["params"],
        }

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """Encodes images to moments [B, h, w, moment_channels] float32, the input of `sample_latent`.

        Args:
            params: of `init` or `load_diffusers`; only params["encoder"] is used.
            images: [B, H, W, image_channels] floating, in [-1, 1]; H and W at least `downsample`. h = H // downsample: `decode`
                does not return the last rows or columns if H or W is not a multiple of it.
        Raises:
            ValueError: images have another rank, dtype, channel count or size. The range of the values is not checked.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images have dtype {images.dtype}: convert to float32 in [-1, 1], uint8 as x / 127.5 - 1")
        if images.ndim != 4 or images.shape[-1] != self.image_channels:
            raise ValueError(f"images have shape {images.shape}, not [B, H, W, {self.image_channels}]")
        if 0 in images.shape or min(images.shape[1:3]) < self.downsample:
            raise ValueError(
                f"images have shape {images.shape}: height and width must be at least {self.downsample}, one latent "
                "pixel; enlarge them first"
            )
        moments: Any = self.encoder.apply({"params": params["encoder"]}, images)
        return moments

    def decode_tiled(self, params: Any, latents: jax.Array, tile: int = 64, overlap: int = 16) -> jax.Array:
        """Decodes in overlapping, linearly blended tiles, with the memory of one tile and of the output.

        A tile of t latent pixels needs, per image of the batch, about 3.5 x (downsample * t)^2 x block_out_channels[1]
        numbers of `dtype`, or 8 t^4 bytes in its attention if that is more. For Stable Diffusion in float32 on a CPU, XLA
        allocates 0.22 GiB at t = 32 and 0.88 GiB at t = 64. A scan runs the tiles sequentially.
        The result differs from `decode`: group norm statistics and attention are those of a tile, so tones may drift slowly
        across the image; larger tiles reduce the drift. With `tile` at least the size of the latents it equals `decode`.

        Args:
            latents: [B, h, w, C] as for `decode`.
            tile: side of a square tile in latent pixels; a shorter axis of the latents is not split.
            overlap: minimum number of latent pixels that neighbouring tiles share; from 0 to tile - 1.
        Raises:
            ValueError: tile or overlap is out of range, or as `decode`.
        """
        self._check_latents(latents)
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap {overlap} must be at least 0 and less than tile {tile} (latent pixels)")
        batch, height, width, _ = latents.shape
        factor = self.downsample
        rows, row_weights = tile_axis(height, tile, overlap, factor)
        columns, column_weights = tile_axis(width, tile, overlap, factor)
        row_index, column_index = (x.ravel() for x in np.indices((len(rows), len(columns))))
        tile_shape = (batch, min(tile, height), min(tile, width), self.latent_channels)

        def add_tile(canvas, placed):
            row, column, row_weight, column_weight = placed
            piece = self.decode(params, lax.dynamic_slice(latents, (0, row, column, 0), tile_shape))
            piece *= row_weight[:, None, None] * column_weight[:, None]
            corner = (0, row * factor, column * factor, 0)
            piece += lax.dynamic_slice(canvas, corner, piece.shape)
            return lax.dynamic_update_slice(canvas, piece, corner), None

        placed = (rows[row_index], columns[column_index], row_weights[row_index], column_weights[column_index])
        canvas = jnp.zeros((batch, height * factor, width * factor, self.image_channels))
        return lax.scan(add_tile, canvas, placed)[0]

    def scaled(self, z: jax.Array) -> jax.Array:
        """Latents of what the encoder gives: (z - shift) * scale."""
        return (z - _per_channel(self.shift)) * _per_channel(self.scale)

    def unscaled(self, latents: jax.Array) -> jax.Array:
        """What the decoder takes: latents / scale + shift. Raises: ValueError, see `decode`."""
        self._check_latents(latents)
        return latents / _per_channel(self.scale) + _per_channel(self.shift)

    def _check_latents(self, latents):
        if latents.ndim != 4 or latents.shape[-1] != self.latent_channels or 0 in latents.shape:
            raise ValueError(f"latents have shape {latents.shape}, not [B, h, w, {self.latent_channels}], none 0")


class KLAutoencoder(Autoencoder):
    """An autoencoder with a Gaussian posterior: what `KLVAE` and `causal_vae.CausalVAE` share."""

    @property
    def moment_channels(self) -> int:
        """2C: the posterior's mean and raw log-variance."""
        return 2 * self.latent_channels

    def sample_latent(self, key: jax.Array, moments: jax.Array) -> jax.Array:
        """Samples latents float32 of the moments' shape with C channels: z = mean + exp(log_variance / 2) * noise, then (z - shift) * scale.

        Args:
            key: one PRNG key for the whole batch.
            moments: [B, h, w, 2C] or [B, f, h, w, 2C] of `encode`, any floating dtype.
        Raises:
            ValueError: the last axis of the moments is not 2C.
        """
        if moments.shape[-1] != 2 * self.latent_channels:
            raise ValueError(f"moments have shape {moments.shape}: the last axis must be {2 * self.latent_channels}")
        mean, log_variance = split_moments(moments)
        sample = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return self.scaled(sample)


@dataclasses.dataclass(frozen=True)
class KLVAE(KLAutoencoder):
    """The sizes of a KL autoencoder; its parameters are a separate pytree {"encoder": ..., "decoder": ...}.

    Attributes:
        block_out_channels: width of each level, finest first; every level but the last halves the resolution.
        layers_per_block: resnet blocks per level of the encoder; the decoder has one more.
        latent_channels: C of the latents.
        scale, shift: latents = (sample - shift) * scale have approximately unit variance; measured on data, not learnt
            (`normalised`). Each is one number, or a sequence of one number per latent channel.
        use_quant_conv: 1x1 convolutions after the encoder and before the decoder (SD, SDXL: yes; SD3, Flux: no).
        image_channels: 3, or 1 for grey images.
        norm_groups: groups of every norm; must divide every width.
        dtype: of activations and products; norms' statistics, softmax and all outputs are always float32.
            jax_default_matmul_precision determines the precision of float32 products (by default, TPUs use bfloat16 passes).
        param_dtype: of parameters from `init`; loaded weights keep the dtype of their file.
    Raises:
        UserError: at construction, for invalid sizes.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    scale: float | tuple[float, ...] = 0.18215
    shift: float | tuple[float, ...] = 0.0
    use_quant_conv: bool = True
    image_channels: int = 3
    norm_groups: int = 32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Decodes latents to images [B, H, W, image_channels] float32, approximately in [-1, 1] and not clipped.

        Args:
            params: only params["decoder"] is used.
            latents: [B, h, w, C], scaled as by `sample_latent`.
        Raises:
            ValueError: latents have another rank or channel count.
        """
        z = self.unscaled(latents)
        images: Any = self.decoder.apply({"params": params["decoder"]}, z)
        return images


def _conv_macs(inputs: int, outputs: int, area: int, kernel_size: int = 3) -> int:
    """Multiply-adds of a convolution with `area` output pixels."""
    return kernel_size**2 * inputs * outputs * area


def _resnet_macs(inputs: int, outputs: int, area: int) -> int:
    shortcut = _conv_macs(inputs, outputs, area, kernel_size=1) if inputs != outputs else 0
    return _conv_macs(inputs, outputs, area) + _conv_macs(outputs, outputs, area) + shortcut


def _per_channel(value):
    """Converts a tuple to float32 [C], which broadcasts over the last axis; returns a number unchanged."""
    return np.asarray(value, np.float32) if isinstance(value, tuple) else value


def normalised(codec: KLAutoencoder, mean: Any, std: Any) -> Any:
    """Returns the codec with the scale and shift that normalise latents of this mean and std to 0 and 1.

    Args:
        mean, std: of the latents before scaling, as in a latent cache's manifest: one number each, or one per channel.
    Raises:
        UserError: the number of values is not the number of channels, or a std is not positive.
    """
    std = np.asarray(std, np.float64)
    if not np.all(std > 0):
        raise UserError(f"std {std.tolist()} must be positive: a channel that never varies cannot be normalised")
    return dataclasses.replace(codec, scale=(1 / std).tolist(), shift=np.asarray(mean, np.float64).tolist())


# Scale and shift are those of the published weights. `f16` has none: train it, measure the standard deviation s of its
# latents, and use dataclasses.replace(codec, scale=1 / s), or `normalised`.
PRESETS = {
    "sd": KLVAE(),  # Stable Diffusion 1 and 2, sd-vae-ft-ema and -mse; used by DiT and SiT
    "sdxl": KLVAE(scale=0.13025),
    "sd3": KLVAE(latent_channels=16, scale=1.5305, shift=0.0609, use_quant_conv=False),
    "flux": KLVAE(latent_channels=16, scale=0.3611, shift=0.1159, use_quant_conv=False),
    "f16": KLVAE(block_out_channels=(128, 128, 256, 256, 512), latent_channels=16, scale=1.0),
}
