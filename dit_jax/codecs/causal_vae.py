"""The causal autoencoder of clips: a frame's latent depends on no later frame, and the first frame is encoded as an image.

Letters: B batch; F, H, W frames and pixels of a clip; f, h, w latent grid, f = 1 + (F - 1) / time_factor, h = H / downsample; C
channels; N = h * w positions of the attention layer.
Source: the autoencoder of Wan 2.1 (Wan team 2025, section 4.1), whose published weights `interop/vae.py` reads; MAGVIT-v2 (Yu et
al. 2024, section 3.2) for the idea, and W.A.L.T (Gupta et al. 2023, section 3.1) for the sizes of PRESETS["walt"].

There are two forms with the same numbers. In the parallel form all frames are computed at once, which is for training. In the
chunked form a few frames are computed at a time, and each layer keeps the last frames of its input in the collection `cache`, so
that a clip of any length needs the memory of a chunk.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dit_jax.codecs.codec import check_channels
from dit_jax.codecs.kl_vae import KLAutoencoder, floating_dtype, spatial_attention, tile_axis, torch_uniform, upsample_nearest
from dit_jax.errors import UserError
from dit_jax.models.layers import convolve_clips

NORMS = ("rms", "frame_group")
SHARED = ("norm_kind", "norm_groups", "dtype", "param_dtype", "first")  # fields of every layer
TINY_NORM = 1e-12  # smallest norm that is divided by, as in PyTorch's F.normalize


class Layer(nn.Module):
    """Base class of the modules.

    Fields:
        norm_kind: one of NORMS.
        norm_groups: of "frame_group".
        first: the input starts with the first frame of the clip. Otherwise it continues a clip, and `cache` has what came before.
    """

    norm_kind: str
    norm_groups: int
    dtype: Any
    param_dtype: Any
    first: bool

    def shared(self) -> dict[str, Any]:
        """The fields above, for a layer inside of this one."""
        return {field: getattr(self, field) for field in SHARED}

    def continued(self, x: jax.Array, count: int) -> jax.Array:
        """x after the `count` frames of this layer's input that precede it, which are zeros at the start of a clip."""
        start = (x.shape[0], count, *x.shape[2:])
        before = jnp.zeros(start, x.dtype) if self.first else self.get_variable("cache", "frames")
        x = jnp.concatenate([before, x], axis=1)
        self.remember(x[:, x.shape[1] - count :])
        return x

    def remember(self, frames: jax.Array) -> None:
        """Keeps frames for the next chunk, in the chunked form."""
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "frames", frames)

    def weights(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """(kernel of this shape, bias) in the compute dtype."""
        kernel = self.param("kernel", torch_uniform, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[-1:], self.param_dtype)
        return kernel.astype(self.dtype), bias.astype(self.dtype)

    def conv(self, features: int, name: str, size: int = 3) -> "CausalConv":
        return CausalConv(**self.shared(), features=features, size=size, name=name)

    def frame_conv(self, features: int, name: str, strides: int = 1, padding: Any = "SAME") -> Callable[[jax.Array], jax.Array]:
        """A 3 x 3 convolution of each frame."""
        kwargs = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": torch_uniform, "name": name}
        return _of_frames(nn.Conv(features, (3, 3), strides, padding, **kwargs))

    def norm(self, name: str) -> Callable[[jax.Array], jax.Array]:
        """The norm of a position ("rms"), or of a frame ("frame_group"): one over frames would not be causal."""
        if self.norm_kind == "rms":
            return RMSNorm(**self.shared(), name=name)
        # Two-pass variance: E[x^2] - E[x]^2 in float32 loses digits if the mean is much larger than the deviation.
        kwargs = {"epsilon": 1e-6, "use_fast_variance": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        return _of_frames(nn.GroupNorm(self.norm_groups, **kwargs, name=name))

    def resnet(self, features: int, name: str) -> "ResnetBlock":
        return ResnetBlock(**self.shared(), features=features, name=name)

    def middle(self, x: jax.Array) -> jax.Array:
        """Resnet, attention within each frame, resnet; encoder and decoder use the same layers."""
        features = x.shape[-1]
        x = self.resnet(features, "mid_resnet_0")(x)
        x = AttentionBlock(**self.shared(), name="mid_attention")(x)
        return self.resnet(features, "mid_resnet_1")(x)


def _of_frames(layer: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A layer of images, applied to each frame of [B, F, H, W, C]."""

    def call(x):
        y = layer(x.reshape(-1, *x.shape[2:]))
        return y.reshape(*x.shape[:2], *y.shape[1:])

    return call


class RMSNorm(Layer):
    """x / |x| sqrt(C) scale, with |x| over the channels of one position, in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype).astype(jnp.float32)
        y = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), TINY_NORM**2))
        return (y * inverse * (math.sqrt(x.shape[-1]) * scale)).astype(self.dtype)


class CausalConv(Layer):
    """A convolution over `size` frames, rows and columns, of which the last frame is the one of the output."""

    features: int
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, F, H, W, C] -> [B, F, H, W, features]
        kernel, bias = self.weights((self.size,) * 3 + (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        return convolve_clips(self.continued(x, self.size - 1) if self.size > 1 else x, kernel) + bias


class TimeDown(Layer):
    """Halves the frames after the first one: y_j = conv(x_{2j-2}, x_{2j-1}, x_{2j}), and y_0 = x_0."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.weights((3, 1, 1, x.shape[-1], x.shape[-1]))
        if not self.first:
            x = jnp.concatenate([self.get_variable("cache", "frames"), x], axis=1)
        self.remember(x[:, -1:])
        start = x[:, :1] if self.first else x[:, :0]
        return start if x.shape[1] == 1 else jnp.concatenate([start, convolve_clips(x, kernel, (2, 1)) + bias], axis=1)


class TimeUp(Layer):
    """Doubles the frames after the first one, with a causal convolution that does not see the first one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.weights((3, 1, 1, x.shape[-1], 2 * x.shape[-1]))
        start, rest = (x[:, :1], x[:, 1:]) if self.first else (x[:, :0], x)
        rest = self.continued(rest, 2)
        if rest.shape[1] == 2:  # only the zeros before the second frame
            return start
        y = convolve_clips(rest, kernel) + bias
        batch, frames, height, width, channels = y.shape
        y = y.reshape(batch, frames, height, width, 2, channels // 2).transpose(0, 1, 4, 2, 3, 5)
        return jnp.concatenate([start, y.reshape(batch, 2 * frames, height, width, channels // 2)], axis=1)


class ResnetBlock(Layer):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution on the skip if the width changes."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, F, H, W, C] -> [B, F, H, W, features]
        h = self.conv(self.features, "conv1")(nn.silu(self.norm("norm1")(x)))
        h = self.conv(self.features, "conv2")(nn.silu(self.norm("norm2")(h)))
        if x.shape[-1] != self.features:
            x = self.conv(self.features, "conv_shortcut", size=1)(x)
        return x + h


class AttentionBlock(Layer):
    """x + out(attention(norm(x))), one head as wide as the layer, over the h * w positions of each frame."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, F, h, w, C]
        batch, frames, height, width, channels = x.shape

        def linear(features, name):
            return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=torch_uniform, name=name)

        tokens = self.norm("norm")(x).reshape(batch * frames, height * width, channels)
        query, key, value = jnp.split(linear(3 * channels, "qkv")(tokens), 3, axis=-1)
        return x + linear(channels, "out")(spatial_attention(query, key, value)).reshape(x.shape)


class Encoder(Layer):
    """Frames [B, F, H, W, image_channels] to raw moments [B, f, h, w, 2z], float32."""

    base: int
    widths: tuple[int, ...]
    blocks: int
    temporal: tuple[bool, ...]
    out_channels: int

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        x = self.conv(self.base, "conv_in")(frames)
        for i, features in enumerate(self.widths):
            for j in range(self.blocks):
                x = self.resnet(features, f"down_{i}_resnet_{j}")(x)
            if i < len(self.widths) - 1:
                # Padded only on the bottom and right, as in the training of the published weights.
                x = self.frame_conv(features, f"down_{i}_downsample", strides=2, padding=((0, 1), (0, 1)))(x)
                if self.temporal[i]:
                    x = TimeDown(**self.shared(), name=f"down_{i}_time")(x)
        x = nn.silu(self.norm("norm_out")(self.middle(x)))
        x = self.conv(self.out_channels, "conv_out")(x)
        return self.conv(self.out_channels, "quant_conv", size=1)(x).astype(jnp.float32)


class Decoder(Layer):
    """Unscaled latents [B, f, h, w, z] to frames [B, F, H, W, image_channels], float32, not clipped."""

    widths: tuple[int, ...]
    blocks: int
    temporal: tuple[bool, ...]
    image_channels: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        z = self.conv(z.shape[-1], "post_quant_conv", size=1)(z)
        x = self.middle(self.conv(self.widths[-1], "conv_in")(z))
        for i, features in enumerate(reversed(self.widths)):
            for j in range(self.blocks + 1):
                x = self.resnet(features, f"up_{i}_resnet_{j}")(x)
            if i < len(self.widths) - 1:
                if self.temporal[-1 - i]:
                    x = TimeUp(**self.shared(), name=f"up_{i}_time")(x)
                narrower = features // 2 if self.norm_kind == "rms" else features
                x = self.frame_conv(narrower, f"up_{i}_upsample")(_of_frames(upsample_nearest)(x))
        x = nn.silu(self.norm("norm_out")(x))
        return self.conv(self.image_channels, "conv_out")(x).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class CausalVAE(KLAutoencoder):
    """The sizes of a causal autoencoder of clips; its parameters are a separate pytree {"encoder": ..., "decoder": ...}.

    A clip has 1 + k time_factor frames. An image is a clip of one frame, and may be given without the axis of frames.
    The defaults are Wan's: 126,892,531 parameters.

    Attributes:
        base: width of the first layer.
        mult: the width of each level is base * mult, finest first; every level but the last halves height and width.
        blocks: resnet blocks per level of the encoder; the decoder has one more.
        z: channels of the latents.
        temporal: for each level but the last, finest first: it halves the frames too.
        norm: "rms" normalises the channels of each position: Wan's layout. "frame_group" has the groups of each frame: the layout
            of `KLVAE`, whose weights can be inflated (`interop.inflation`); its upsampling keeps the width, where Wan's halves it.
        norm_groups: groups of "frame_group"; must divide every width.
        scale, shift: latents = (sample - shift) * scale have approximately unit variance. Each is one number, or a sequence of one
            number per latent channel: 1 / latents_std and latents_mean of Wan's config.
        chunk_frames: clips with more frames than 1 + chunk_frames are encoded and decoded in chunks of this many frames, with the
            same result in less memory; 0 turns it off. A multiple of time_factor.
        image_channels: 3, or 1 for grey clips.
        dtype: of activations and products; norms' statistics, softmax and all outputs are always float32.
            jax_default_matmul_precision determines the precision of float32 products (by default, TPUs use bfloat16 passes).
        param_dtype: of parameters from `init`; loaded weights keep the dtype of their file.
    Raises:
        UserError: at construction, for invalid sizes.
    """

    base: int = 96
    mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    z: int = 16
    temporal: tuple[bool, ...] = (False, True, True)
    norm: str = "rms"
    norm_groups: int = 32
    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0
    chunk_frames: int = 0
    image_channels: int = 3
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("mult", "temporal"):  # a config gives a list
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, floating_dtype(name, getattr(self, name)))
        for name in ("base", "blocks", "z", "image_channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.mult or min(self.mult) < 1:
            raise UserError(f"mult {self.mult} must have one positive number per level, such as (1, 2, 4, 4)")
        if len(self.temporal) != len(self.mult) - 1:
            raise UserError(
                f"temporal {self.temporal} has {len(self.temporal)} entries for {len(self.mult) - 1} downsamplings of mult "
                f"{self.mult}: give one for each level but the last"
            )
        if self.norm not in NORMS:
            raise UserError(f"norm {self.norm!r} must be one of {', '.join(NORMS)}")
        for level, width in enumerate(self.block_out_channels):
            if self.norm == "rms" and level and width % 2:
                raise UserError(
                    f"base {self.base} and mult {self.mult} give the odd width {width}: make every width but the first even"
                )
            if self.norm == "frame_group" and width % self.norm_groups:
                raise UserError(
                    f"base {self.base} and mult {self.mult} give the width {width}, not a multiple of norm_groups "
                    f"{self.norm_groups}: change one of them"
                )
        if self.chunk_frames < 0 or self.chunk_frames % self.time_factor:
            raise UserError(
                f"chunk_frames {self.chunk_frames} must be a multiple of the codec's time factor {self.time_factor}, or 0 (off)"
            )
        for name in ("scale", "shift"):
            self._check_numbers(name, getattr(self, name))

    @property
    def block_out_channels(self) -> tuple[int, ...]:  # type: ignore[override]
        """Width of each level, finest first."""
        return tuple(self.base * factor for factor in self.mult)

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return self.z

    @property
    def time_factor(self) -> int:
        """Frames per latent frame, after the first one."""
        return 2 ** sum(self.temporal)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:  # type: ignore[override]
        """(f, h, w, z) of the latents of a clip (F, H, W, image_channels), or (h, w, z) of an image.

        Raises:
            UserError: other channels, a side that `downsample` does not divide, or frames that are not 1 + k time_factor.
        """
        if len(shape) not in (3, 4):
            raise UserError(f"a causal_vae encodes clips (F, H, W, C) and images (H, W, C), not examples of shape {shape}")
        check_channels(self, shape)
        for name, side in zip(("height", "width"), shape[-3:], strict=False):
            if side < 1 or side % self.downsample:
                raise UserError(
                    f"{name} {side} is not a positive multiple of the codec's downsample {self.downsample}: choose one that is"
                )
        *frames, height, width, _ = shape
        for count in frames:
            if count < 1 or (count - 1) % self.time_factor:
                low = 1 + max(count - 1, 0) // self.time_factor * self.time_factor
                raise UserError(
                    f"{count} frames are not 1 + a multiple of the codec's time factor {self.time_factor}: take {low} or "
                    f"{low + self.time_factor} frames"
                )
        grid = (height // self.downsample, width // self.downsample)
        return *(1 + (count - 1) // self.time_factor for count in frames), *grid, self.z

    def macs(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(encode, decode) in multiply-adds for one clip: convolutions, linears and both attention products.

        Norms and activations are not counted, products with zero padding are.

        Args:
            shape: (F, H, W, image_channels), or (H, W, image_channels).
        Raises:
            UserError: as `latent_shape`.
        """
        self.latent_shape(shape)
        frames, height, width = (1, *shape[:2]) if len(shape) == 3 else shape[:3]
        pixels, widths, levels = height * width, self.block_out_channels, len(self.mult)

        def resnet(inputs, outputs):
            return 27 * (inputs * outputs + outputs**2) + (inputs * outputs if inputs != outputs else 0)

        encode, count, before = 27 * self.image_channels * self.base * pixels * frames, frames, self.base
        for level, features in enumerate(widths):
            area = pixels >> 2 * level
            encode += (resnet(before, features) + (self.blocks - 1) * resnet(features, features)) * area * count
            before = features
            if level < levels - 1:
                encode += 9 * features**2 * (area // 4) * count
                if self.temporal[level]:
                    count = 1 + (count - 1) // 2
                    encode += 3 * features**2 * (area // 4) * (count - 1)
        area, deepest, moments = pixels >> 2 * (levels - 1), widths[-1], self.moment_channels
        middle = (2 * resnet(deepest, deepest) + 4 * deepest**2 + 2 * area * deepest) * area * count
        encode += middle + (27 * deepest * moments + moments**2) * area * count

        decode = middle + (27 * deepest * self.z + self.z**2) * area * count
        before = deepest
        for level in reversed(range(levels)):
            features, area = widths[level], pixels >> 2 * level
            decode += (resnet(before, features) + self.blocks * resnet(features, features)) * area * count
            before = features
            if level > 0:
                if self.temporal[level - 1]:
                    decode += 6 * features**2 * area * (count - 1)
                    count = 1 + 2 * (count - 1)
                before = features // 2 if self.norm == "rms" else features
                decode += 9 * features * before * 4 * area * count
        return encode, decode + 27 * widths[0] * self.image_channels * pixels * frames

    def _module(self, kind: str, first: bool = True) -> Encoder | Decoder:
        fields = {
            "norm_kind": self.norm,
            "norm_groups": self.norm_groups,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "first": first,
            "widths": self.block_out_channels,
            "blocks": self.blocks,
            "temporal": self.temporal,
        }
        if kind == "encoder":
            return Encoder(base=self.base, out_channels=self.moment_channels, **fields)
        return Decoder(image_channels=self.image_channels, **fields)

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        """The Linen module whose parameters are params["encoder"]."""
        return self._module("encoder")  # type: ignore[return-value]

    @property
    def decoder(self) -> Decoder:  # type: ignore[override]
        """The Linen module whose parameters are params["decoder"]."""
        return self._module("decoder")  # type: ignore[return-value]

    def init(self, key: jax.Array) -> dict:
        """Random parameters: kernels are uniform in +-1/sqrt(fan_in), biases are zero, norms are the identity."""
        encoder_key, decoder_key = jax.random.split(key)
        side = self.downsample
        frames = jnp.zeros((1, 1, side, side, self.image_channels))
        latent = jnp.zeros((1, 1, 1, 1, self.z))
        return {
            "encoder": jax.jit(self.encoder.init)(encoder_key, frames)["params"],
            "decoder": jax.jit(self.decoder.init)(decoder_key, latent)["params"],
        }

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """Encodes clips or images to moments float32, the input of `sample_latent`.

        Args:
            params: of `init` or `load_diffusers`; only params["encoder"] is used.
            images: [B, F, H, W, image_channels] floating, in [-1, 1], or [B, H, W, image_channels]; F = 1 + k time_factor; H and W
                at least `downsample`. Rows or columns beyond a multiple of it do not come back.
        Returns:
            [B, f, h, w, 2z], or [B, h, w, 2z] of images.
        Raises:
            ValueError: clips of another rank, dtype, channel count or size. The range of the values is not checked.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"clips have dtype {images.dtype}: convert to float32 in [-1, 1], uint8 as x / 127.5 - 1")
        if images.ndim not in (4, 5) or images.shape[-1] != self.image_channels or 0 in images.shape:
            raise ValueError(f"clips have shape {images.shape}, not [B, F, H, W, {self.image_channels}], or without F, none 0")
        if min(images.shape[-3:-1]) < self.downsample:
            raise ValueError(f"clips have shape {images.shape}: height and width must be at least {self.downsample}")
        if images.ndim == 4:
            return self.encode(params, images[:, None])[:, 0]
        if (images.shape[1] - 1) % self.time_factor:
            raise ValueError(f"clips have {images.shape[1]} frames, not 1 + a multiple of {self.time_factor}")
        return self._run("encoder", params, images, self.chunk_frames)

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Decodes latents to clips float32, approximately in [-1, 1] and not clipped (Wan's own code clips them).

        Args:
            params: only params["decoder"] is used.
            latents: [B, f, h, w, z], scaled as by `sample_latent`, or [B, h, w, z] of images.
        Returns:
            [B, F, H, W, image_channels], or [B, H, W, image_channels] of images.
        Raises:
            ValueError: latents have another rank or channel count.
        """
        z = self.unscaled(latents)
        if z.ndim == 4:
            return self._run("decoder", params, z[:, None], 0)[:, 0]
        return self._run("decoder", params, z, self.chunk_frames // self.time_factor)

    def _run(self, kind: str, params: Any, x: jax.Array, chunk: int) -> jax.Array:
        """Encoder or decoder of [B, F, ...]; of the first frame and then `chunk` frames at a time if chunk is not 0."""
        weights, frames = params[kind], x.shape[1]
        if not chunk or frames - 1 <= chunk:
            result: jax.Array = self._module(kind).apply({"params": weights}, x)  # type: ignore[assignment]
            return result

        def run(first, cache, part):
            variables = {"params": weights} if first else {"params": weights, "cache": cache}
            y, changed = self._module(kind, first).apply(variables, part, mutable=["cache"])
            return changed["cache"], y

        cache, y = run(True, None, x[:, :1])
        parts, rest, count = [y], x[:, 1:], (frames - 1) // chunk
        middle = rest[:, : count * chunk].reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1)
        cache, ys = lax.scan(lambda cache, part: run(False, cache, part), cache, middle)
        parts.append(ys.swapaxes(0, 1).reshape(x.shape[0], -1, *y.shape[2:]))
        if count * chunk < frames - 1:
            parts.append(run(False, cache, rest[:, count * chunk :])[1])
        return jnp.concatenate(parts, axis=1)

    def decode_tiled(self, params: Any, latents: jax.Array, tile: int = 32, overlap: int = 8) -> jax.Array:
        """Decodes in overlapping, linearly blended tiles of the plane, with the memory of one tile and of the output.

        Within a tile, time is decoded in chunks of chunk_frames, or of one latent frame if that is 0. A scan runs the tiles
        sequentially. A tile of t latent pixels needs, per clip of the batch, about 3.5 x time_factor x (downsample * t)^2 x
        block_out_channels[0] numbers of `dtype`, and its attention 8 t^4 bytes.
        The result differs from `decode` near the borders of tiles, where convolutions see zeros, and because the attention is that
        of a tile. With `tile` at least the size of the latents it equals `decode`.

        Args:
            latents: [B, f, h, w, z] as for `decode`, or [B, h, w, z].
            tile: side of a square tile in latent pixels; a shorter axis of the latents is not split.
            overlap: minimum number of latent pixels that neighbouring tiles share; from 0 to tile - 1.
        Raises:
            ValueError: tile or overlap is out of range, or as `decode`.
        """
        self._check_latents(latents)
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap {overlap} must be at least 0 and less than tile {tile} (latent pixels)")
        if latents.ndim == 4:
            return self.decode_tiled(params, latents[:, None], tile, overlap)[:, 0]
        codec = self if self.chunk_frames else dataclasses.replace(self, chunk_frames=self.time_factor)
        batch, count, height, width, _ = latents.shape
        factor, frames = self.downsample, 1 + (count - 1) * self.time_factor
        rows, row_weights = tile_axis(height, tile, overlap, factor)
        columns, column_weights = tile_axis(width, tile, overlap, factor)
        row_index, column_index = (x.ravel() for x in np.indices((len(rows), len(columns))))
        tile_shape = (batch, count, min(tile, height), min(tile, width), self.z)

        def add_tile(canvas, placed):
            row, column, row_weight, column_weight = placed
            piece = codec.decode(params, lax.dynamic_slice(latents, (0, 0, row, column, 0), tile_shape))
            piece *= row_weight[:, None, None] * column_weight[:, None]
            corner = (0, 0, row * factor, column * factor, 0)
            piece += lax.dynamic_slice(canvas, corner, piece.shape)
            return lax.dynamic_update_slice(canvas, piece, corner), None

        placed = (rows[row_index], columns[column_index], row_weights[row_index], column_weights[column_index])
        canvas = jnp.zeros((batch, frames, height * factor, width * factor, self.image_channels))
        return lax.scan(add_tile, canvas, placed)[0]

    def _check_latents(self, latents):
        if latents.ndim not in (4, 5) or latents.shape[-1] != self.z or 0 in latents.shape:
            raise ValueError(f"latents have shape {latents.shape}, not [B, f, h, w, {self.z}], or without f, none 0")


# The mean and standard deviation of the latents are those of the published weights. `walt` has no published weights: train it.
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
WAN_MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
WAN_STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
PRESETS = {
    "wan": CausalVAE(scale=tuple(1 / x for x in WAN_STD), shift=WAN_MEAN),
    "walt": CausalVAE(base=128, mult=(1, 2, 2, 4), z=8, temporal=(False, True, True)),
}
