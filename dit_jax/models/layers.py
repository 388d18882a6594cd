"""Layers that transformers share.

B batch, N tokens, M context tokens, D width, H heads, E width of a head, F frequencies.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models.attention import attention_kernel, dot_product_attention
from dit_jax.models.products import dot_general

Dtype = Any
xavier_uniform = nn.initializers.xavier_uniform()
normal_002 = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()
NORM_EPSILON = 1e-6
# Checkpoint names of expensive activations. Rematerialisation stores these and recomputes the operations between them.
PRODUCTS = ("qkv", "attention", "attention_out", "mlp_in", "mlp_out")


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """GELU with the tanh approximation: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    The gradient stores only x: recomputing the rest costs no more than reading it.

    Args:
        x: any shape, any float dtype; the result has both.

    Source: Hendrycks & Gimpel 2016, section 2.
    """
    return nn.gelu(x, approximate=True)


def normalize(x: jax.Array) -> jax.Array:
    """Layer norm without scale or bias: zero mean, unit variance over the last axis, in float32, epsilon 1e-6.

    Args:
        x: [..., D], any float dtype.

    Returns:
        [..., D] float32. The caller casts, so that XLA fuses the norm with the operations that follow.
    """
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + NORM_EPSILON)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x * (1 + scale) + shift, per example over tokens.

    Args:
        x: [B, N, D] normalised tokens.
        shift, scale: [B, D], broadcast over N; zeros give the identity.

    Source: Peebles & Xie 2023, section 3.2 (adaLN).
    """
    return x * (1 + scale[:, None]) + shift[:, None]


def frequency_embedding(t: jax.Array, width: int = 256, max_period: float = 10000.0) -> jax.Array:
    """[cos(t f), sin(t f)] with width / 2 frequencies f from 1 down to about 1 / max_period.

    Args:
        t: f32[B] network time (0..999 for DiT), fractions allowed.

    Returns:
        f32[B, width].

    Source: Nichol & Dhariwal 2021 (GLIDE and ADM use the same), cosines first.
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Projections(nn.Module):
    """`count` linear layers of x in one kernel [D, count, H, E] and bias [count, H, E]: x [B, N, D] -> a list of [B, N, H, E].

    apart: compute one matrix product per layer; a fused attention kernel reads the results without a copy. False computes one
        product and slices it: the copies take 3 % of a training step of XL/2 on a GPU, but a CPU is 9 % faster this way.
    The Xavier bound is that of the flattened kernel [D, count H E].
    """

    count: int
    heads: int
    apart: bool
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        width = x.shape[-1]
        shape = (self.count, self.heads, width // self.heads)

        def init(key, shape, dtype):
            return xavier_uniform(key, (width, math.prod(shape[1:])), dtype).reshape(shape)

        kernel = self.param("kernel", init, (width, *shape), self.param_dtype)
        bias = self.param("bias", zeros, shape, self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if self.apart:
            parts = [x @ kernel[:, i].reshape(width, width) + bias[i].reshape(width) for i in range(self.count)]
            return [checkpoint_name(part, "qkv").reshape(*x.shape[:-1], *shape[1:]) for part in parts]
        together = checkpoint_name(dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias, "qkv")  # [B, N, count, H, E]
        return [together[:, :, i] for i in range(self.count)]


class Attention(nn.Module):
    """Multi-head self-attention of x, or cross-attention to a context if one is given.

    Parameters: self-attention has one fused `qkv` kernel [D, 3, H, E]; cross-attention has `query` [D, H, E] and `key_value`
    [D, 2, H, E]; both have `out` [H, E, D]. Xavier bounds are those of the fused, flattened matrices.

    Fields:
        zero_out: the output projection starts at zero.
    """

    heads: int
    implementation: str = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    zero_out: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layer = {"kernel_init": xavier_uniform, "dot_general": dot_general, **dtypes}
        kernel = attention_kernel(self.implementation, self.dtype, x.shape[-1] // self.heads)

        def project(x, count, name):
            return Projections(count, self.heads, kernel == "cudnn", **dtypes, name=name)(x)

        def linear(x, features, axis, name):
            return nn.DenseGeneral(features, axis=axis, **layer, name=name)(x)

        if context is None:
            q, k, v = project(x, 3, "qkv")
        else:
            q = checkpoint_name(linear(x, (self.heads, x.shape[-1] // self.heads), -1, "query"), "qkv")
            k, v = project(context, 2, "key_value")
        y = checkpoint_name(dot_product_attention(q, k, v, kernel, bias), "attention")
        layer |= {"kernel_init": zeros} if self.zero_out else {}
        return checkpoint_name(linear(y, x.shape[-1], (-2, -1), "out"), "attention_out")


class MLP(nn.Module):
    """Two linear layers with a tanh-GELU between them.  x [..., D] -> [..., D]."""

    hidden_width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = {"kernel_init": xavier_uniform, "dot_general": dot_general, "dtype": self.dtype, "param_dtype": self.param_dtype}

        def linear(features, name):
            return nn.Dense(features, **layer, name=name)

        hidden = checkpoint_name(linear(self.hidden_width, "in")(x), "mlp_in")
        return checkpoint_name(linear(x.shape[-1], "out")(gelu(hidden)), "mlp_out")


class TimeEmbedding(nn.Module):
    """Network time f32[B] -> [B, D]: 256 frequencies, then linear, SiLU, linear; both kernels start as normal(0.02)."""

    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        def linear(name):
            return nn.Dense(self.width, kernel_init=normal_002, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        return linear("out")(nn.silu(linear("in")(frequency_embedding(t).astype(self.dtype))))


def convolve_clips(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: str = "frame",
    precision: lax.Precision | None = None,
) -> jax.Array:
    """A convolution over frames, rows and columns.

    XLA's convolutions of five axes are several times slower on a CPU than those of four, so on a CPU the taps in time are summed
    (two cores of an AMD EPYC with other work on them, 2026-11-29: 3 x 3 x 3 over 2 x 9 x 32 x 32 pixels and 32 channels, 31 ms in
    place of 185 ms).

    Args:
        x: [B, F, H, W, C].
        kernel: [t, s, s, C, features].
        strides: in time, and in rows and columns.
        padding: "frame" pads rows and columns with (s - 1) / 2 zeros on each side and frames with none; "same" as TensorFlow's
            SAME in all three.
    Returns:
        [B, F', H', W', features].
    """
    along, across = strides
    windows, steps = kernel.shape[:3], (along, across, across)
    if padding == "same":
        pads = lax.padtype_to_pads(x.shape[1:4], windows, steps, "SAME")
    else:
        side = (kernel.shape[1] - 1) // 2
        pads = [(0, 0), (side, side), (side, side)]

    def five_axes(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, steps, pads, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision=precision
        )

    return lax.platform_dependent(x, kernel, cpu=lambda x, k: _summed_taps(x, k, steps, pads, precision), default=five_axes)


def _summed_taps(x, kernel, steps, pads, precision):
    """The convolution as a sum of convolutions of frames, one for each tap in time."""
    x = jnp.pad(x, ((0, 0), pads[0], (0, 0), (0, 0), (0, 0)))
    stride, frames = steps[0], 1 + (x.shape[1] - len(kernel)) // steps[0]
    total: Any = 0
    for i in range(len(kernel)):
        part = x[:, i : i + (frames - 1) * stride + 1 : stride]
        part = part.reshape(-1, *part.shape[2:])
        dimensions = ("NHWC", "HWIO", "NHWC")
        total += lax.conv_general_dilated(part, kernel[i], steps[1:], pads[1:], dimension_numbers=dimensions, precision=precision)
    return total.reshape(len(x), frames, *total.shape[1:])
