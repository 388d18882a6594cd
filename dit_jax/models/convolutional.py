"""Layers of U-Nets: residual blocks, attention over pixels, changes of size, and what they store for the gradient.

B batch, H x W pixels, N = H W tokens, C channels, E width of a head, D width of the embedding of time and label.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models.attention import dot_product_attention
from dit_jax.models.layers import PRODUCTS, Dtype, frequency_embedding, zeros
from dit_jax.models.network import Shape
from dit_jax.models.products import dot_general
from dit_jax.parallel.mesh import constrain_batch

CONVOLUTION = "convolution"  # checkpoint name of their outputs
REMAT_POLICIES = {
    # cuDNN's softmax statistics have no name. All outputs of its forward kernel are saved, else the kernel would run twice.
    "elementwise": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(CONVOLUTION, *PRODUCTS),
        lambda primitive, *_, **__: primitive.name == "dot_product_attention_fwd_wrapper",
    ),
    "full": None,
}
# Epsilon of the group norms in residual blocks and ADM's attention, and of those in LDM's transformers.
BLOCK_EPSILON, TRANSFORMER_EPSILON = 1e-5, 1e-6
MLP_RATIO = 4  # of LDM's transformers


class Layer(nn.Module):
    """Base class of the modules. Kernels of linear layers and convolutions start as PyTorch's: uniform in +-1 / sqrt(fan in).

    Deviation: PyTorch also draws the biases; here they are zero, which halves the time to compile the initialisation.
    """

    norm_groups: int
    dtype: Dtype
    param_dtype: Dtype

    def linear(
        self, features: int | tuple[int, ...], name: str, inputs: int, axis: Any = -1, zero: bool = False, bias: bool = True
    ) -> nn.DenseGeneral:
        init = zeros if zero else uniform(inputs)
        return nn.DenseGeneral(features, axis, use_bias=bias, kernel_init=init, dot_general=dot_general, name=name, **self.dtypes)

    def conv(
        self, features: int, name: str, inputs: int, stride: int = 1, zero: bool = False
    ) -> Callable[[jax.Array], jax.Array]:
        init = zeros if zero else uniform(9 * inputs)
        layer = nn.Conv(features, (3, 3), stride, 1, kernel_init=init, name=name, **self.dtypes)
        return lambda x: checkpoint_name(layer(x), CONVOLUTION)

    def norm(self, name: str, epsilon: float = BLOCK_EPSILON) -> nn.GroupNorm:
        """A group norm in float32, whose output is float32. Two passes: E[x^2] - E[x]^2 loses digits."""
        return nn.GroupNorm(
            self.norm_groups,
            epsilon=epsilon,
            use_fast_variance=False,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            name=name,
        )

    @property
    def dtypes(self) -> dict[str, Dtype]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


def uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Initializer: uniform in +-1 / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32, *_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def halve(x: jax.Array) -> jax.Array:
    """Means over 2 x 2 pixels.  [B, H, W, C] -> [B, H/2, W/2, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def double(x: jax.Array) -> jax.Array:
    """Each pixel four times.  [B, H, W, C] -> [B, 2H, 2W, C]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class ResBlock(Layer):
    """x + conv(silu(norm(conv(silu(norm(x)))) and the embedding)), with a linear skip if the channels change.

    Called with x [B, H, W, C] and the embedding [B, D]. `resample` halves or doubles the size of x and of the first activation
    before the first convolution. With `scale_shift` the embedding scales and shifts the second norm's output (ADM), else it is
    added to the norm's input (LDM). The second convolution is zero-initialized.

    Source: Dhariwal & Nichol 2021, section 3 (adaptive group normalization; up and down blocks are BigGAN's).
    """

    features: int
    scale_shift: bool
    resample: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        channels, features = x.shape[-1], self.features
        h = nn.silu(self.norm("norm_1")(x)).astype(self.dtype)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv(features, "conv_1", channels)(h)
        project = self.linear((2 if self.scale_shift else 1, features), "embedding", embedding.shape[-1])
        vectors = constrain_batch(project(nn.silu(embedding)))[:, None, None]  # [B, 1, 1, 2 or 1, C]
        if self.scale_shift:
            h = self.norm("norm_2")(h) * (1 + vectors[..., 0, :]) + vectors[..., 1, :]
        else:
            h = self.norm("norm_2")(h + vectors[..., 0, :])
        h = self.conv(features, "conv_2", features, zero=True)(nn.silu(h).astype(self.dtype))
        if channels != features:
            x = self.linear(features, "skip", channels)(x)
        return x + h


class Downsample(Layer):
    """A convolution with stride 2.  [B, H, W, C] -> [B, H/2, W/2, C]."""

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        return self.conv(x.shape[-1], "conv", x.shape[-1], stride=2)(x)


class Upsample(Layer):
    """Each pixel four times, then a convolution.  [B, H, W, C] -> [B, 2H, 2W, C]."""

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        return self.conv(x.shape[-1], "conv", x.shape[-1])(double(x))


class Attention(Layer):
    """Multi-head attention of tokens to themselves, or to a context [B, M, width of the context].  [B, N, C] -> [B, N, C].

    Parameters: `qkv` [C, 3, H, E]; or `query` [C, H, E] and `key_value` [width of the context, 2, H, E]; and `out` [H, E, C].
    """

    heads: int
    kernel: str

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        return self.attend(x, context, bias=False, zero=False)

    def attend(self, x: jax.Array, context: jax.Array | None, bias: bool, zero: bool) -> jax.Array:
        """bias: of queries, keys and values; zero: initialize the output with zeros."""
        width = x.shape[-1]
        heads, kernel = (self.heads, width // self.heads), self.kernel
        if context is None:
            qkv = checkpoint_name(self.linear((3, *heads), "qkv", width, bias=bias)(x), "qkv")
            q, k, v = (qkv[:, :, i] for i in range(3))
        else:
            kernel = "xla"  # the context is a single token
            q = checkpoint_name(self.linear(heads, "query", width, bias=bias)(x), "qkv")
            key_value = self.linear((2, *heads), "key_value", context.shape[-1], bias=bias)(context)
            k, v = key_value[:, :, 0], key_value[:, :, 1]
        y = checkpoint_name(dot_product_attention(q, k, v, kernel), "attention")
        return checkpoint_name(self.linear(width, "out", width, axis=(-2, -1), zero=zero)(y), "attention_out")


class AttentionBlock(Attention):
    """x + attention(norm(x)) over all pixels, with a zero-initialized output.  [B, H, W, C] -> [B, H, W, C].

    Source: Dhariwal & Nichol 2021, section 3.
    """

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        tokens = self.norm("norm")(x).astype(self.dtype).reshape(len(x), -1, x.shape[-1])
        return x + self.attend(tokens, None, bias=True, zero=True).reshape(x.shape)


class SpatialTransformer(Layer):
    """x + a transformer block over all pixels, whose output is zero-initialized.  [B, H, W, C] -> [B, H, W, C].

    The block: self-attention, cross-attention to the context [B, M, width of the context], and a GEGLU MLP, each after a layer
    norm.

    Source: Rombach et al. 2022, appendix E.2.1, table 15.
    """

    heads: int
    kernel: str

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        width, shared = x.shape[-1], (self.norm_groups, self.dtype, self.param_dtype)

        def norm(name, h):
            layer = nn.LayerNorm(1e-5, use_fast_variance=False, dtype=jnp.float32, param_dtype=self.param_dtype, name=name)
            return layer(h).astype(self.dtype)

        def attention(name):
            return Attention(*shared, self.heads, self.kernel, name=name)

        h = self.norm("norm", TRANSFORMER_EPSILON)(x).astype(self.dtype).reshape(len(x), -1, width)
        h = self.linear(width, "proj_in", width)(h)
        h = h + attention("self_attention")(norm("norm_self", h))
        h = h + attention("cross_attention")(norm("norm_cross", h), context)
        h = h + GEGLU(*shared, name="mlp")(norm("norm_mlp", h))
        return x + self.linear(width, "proj_out", width, zero=True)(h).reshape(x.shape)


class GEGLU(Layer):
    """out(value gelu(gate)) with (value, gate) = in(x), four times as wide, and the exact GELU.  [..., C] -> [..., C].

    Source: Shazeer 2020, GLU variants improve transformer, equation 6.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        hidden = checkpoint_name(self.linear((2, MLP_RATIO * width), "in", width)(x), "mlp_in")
        hidden = hidden[..., 0, :] * nn.gelu(hidden[..., 1, :], approximate=False)
        return checkpoint_name(self.linear(width, "out", MLP_RATIO * width)(hidden), "mlp_out")


class TimeEmbedding(Layer):
    """Network time f32[B] -> [B, D]: D / 4 cosines and sines, then linear, SiLU, linear."""

    channels: int

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        width = 4 * self.channels
        h = self.linear(width, "in", self.channels)(frequency_embedding(t, self.channels).astype(self.dtype))
        return self.linear(width, "out", width)(nn.silu(h))


class Input(Layer):
    """The first convolution."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.features, "conv", x.shape[-1])(x)


class Output(Layer):
    """Norm, SiLU, and a zero-initialized convolution."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(self.norm("norm")(x)).astype(self.dtype)
        return self.conv(self.features, "conv", x.shape[-1], zero=True)(x)


def enlarged(image: jax.Array, size: Shape) -> jax.Array:
    """Bilinear interpolation to another size, which repeats the edges.  [B, h, w, C] -> f32[B, *size, C].

    Equals PyTorch's `F.interpolate(mode="bilinear")`.
    """
    shape = (len(image), *size, image.shape[-1])
    return jax.image.resize(image.astype(jnp.float32), shape, "bilinear", antialias=False)


def remat_for(remat: str, platform: str) -> str:
    """Resolves "auto" for a platform ("cpu", "gpu", "tpu"): "elementwise" on a TPU, whose memory is small, else "none"."""
    return ("elementwise" if platform == "tpu" else "none") if remat == "auto" else remat
