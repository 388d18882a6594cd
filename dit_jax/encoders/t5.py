"""The encoder of T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202, for its MLP).

B batch, M tokens, D width, H heads, E = 64 width of a head, F hidden width.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.models import layers
from dit_jax.models.attention import dot_product_attention
from dit_jax.parallel.mesh import constrain_batch
from dit_jax.parallel.rules import Rules

HEAD_WIDTH = 64
BUCKETS, MAX_DISTANCE = 32, 128  # of relative positions
EPSILON = 1e-6
RULES: Rules = (
    (r"token_embedding/embedding", (None, "fsdp")),
    (r"position_bias", ()),  # [BUCKETS, H]
    (r"attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # [D, 3, H, E]
    (r"attention/out/kernel", ("tensor", None, "fsdp")),  # [H, E, D]
    (r"mlp/in/kernel", ("fsdp", None, "tensor")),  # [D, 2, F]
    (r"mlp/out/kernel", ("tensor", "fsdp")),  # [F, D]
    (r"norm(_\w+)?/scale", ()),
)


class Size(NamedTuple):
    depth: int
    width: int
    heads: int
    hidden_width: int


SIZES = {  # T5 v1.1
    "small": Size(8, 512, 6, 1024),
    "base": Size(12, 768, 12, 2048),
    "large": Size(24, 1024, 16, 2816),
    "xl": Size(24, 2048, 32, 5120),
    "xxl": Size(24, 4096, 64, 10240),
}
VOCABULARY = 32128


def bucket(relative: np.ndarray) -> np.ndarray:
    """The bucket of a relative position, key minus query: int64 of the same shape.

    Half of the buckets are for keys behind the query. Of each half, the first half are single distances and the others grow
    logarithmically up to MAX_DISTANCE. Source: Raffel et al. 2020, section 2.1, and the paper's code.
    """
    half = BUCKETS // 2
    exact, distance = half // 2, np.abs(relative)
    # float32, as in the paper's code: in float64 some distances would fall into the next bucket.
    share = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(MAX_DISTANCE / exact))
    large = np.minimum(exact + (share * (half - exact)).astype(np.int64), half - 1)
    return half * (relative > 0) + np.where(distance < exact, distance, large)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, over the last axis in float32, without a mean or a bias; the result has `dtype`."""

    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
        return (scale * y).astype(self.dtype)


class Attention(nn.Module):
    """Self-attention without a scale, with a bias f32[B or 1, H, M, M] of the relative position.  [B, M, D] -> [B, M, D]."""

    heads: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        linear = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(x.shape[-1] ** -0.5)
        qkv = nn.DenseGeneral((3, self.heads, HEAD_WIDTH), kernel_init=init, **linear, name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        y = dot_product_attention(q, k, v, "xla", scale=1.0, bias=bias)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), kernel_init=init, **linear, name="out")(y)


class GatedMLP(nn.Module):
    """(gelu(x W_0) * (x W_1)) W_out with the tanh approximation of GELU.  [B, M, D] -> [B, M, D]."""

    hidden_width: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        into = nn.DenseGeneral(
            (2, self.hidden_width), kernel_init=nn.initializers.normal(x.shape[-1] ** -0.5), **linear, name="in"
        )
        hidden = into(x)
        y = layers.gelu(hidden[..., 0, :]) * hidden[..., 1, :]
        return nn.Dense(x.shape[-1], kernel_init=nn.initializers.normal(self.hidden_width**-0.5), **linear, name="out")(y)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); returns (x, None), as `nn.scan` requires."""

    heads: int
    hidden_width: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = x + Attention(self.heads, **dtypes, name="attention")(RMSNorm(**dtypes, name="norm_attention")(x), bias)
        x = x + GatedMLP(self.hidden_width, **dtypes, name="mlp")(RMSNorm(**dtypes, name="norm_mlp")(x))
        return constrain_batch(x), None


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1: (ids int32[B, M], mask bool[B, M] or None) -> [B, M, D] in `dtype`.

    Without a mask, padding is attended to, as Stable Diffusion 3 does. The blocks are one stack of parameters under `blocks`.
    float16 overflows in XXL's MLP; use bfloat16 or float32.

    Fields:
        depth, width, heads, hidden_width: see SIZES.
        vocabulary: rows of the table of tokens.
    """

    depth: int
    width: int
    heads: int
    hidden_width: int
    vocabulary: int = VOCABULARY
    dtype: layers.Dtype = jnp.float32
    param_dtype: layers.Dtype = jnp.float32

    rules = RULES

    @classmethod
    def of(cls, size: str, **fields: Any) -> "T5Encoder":
        """An encoder of SIZES, "small" to "xxl".

        Raises:
            UserError: no such size.
        """
        if size not in SIZES:
            raise UserError(f"T5 size {size!r} does not exist; choose one of {', '.join(SIZES)}")
        return cls(**SIZES[size]._asdict(), **fields)

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        table = nn.Embed(
            self.vocabulary, self.width, embedding_init=nn.initializers.normal(1.0), **dtypes, name="token_embedding"
        )
        x = constrain_batch(table(ids))
        positions = np.arange(ids.shape[1])
        buckets = bucket(positions[None, :] - positions[:, None])
        shape = (BUCKETS, self.heads)
        per_bucket = self.param("position_bias", nn.initializers.normal(self.width**-0.5), shape, self.param_dtype)
        bias = per_bucket.astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]
        if mask is not None:
            bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(jnp.float32).min)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth)
        x, _ = blocks(self.heads, self.hidden_width, **dtypes, name="blocks")(x, bias)
        return RMSNorm(**dtypes, name="norm_final")(x)
