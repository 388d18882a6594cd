"""The text encoder of CLIP (Radford et al. 2021, arXiv 2103.00020) and OpenCLIP.

B batch, M tokens, D width, H heads, P width of the projection.
"""

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

VOCABULARY, MAX_TOKENS = 49408, 77
START, END = 49406, 49407  # token ids
EPSILON = 1e-5
RULES: Rules = (
    (r"token_embedding/embedding", (None, "fsdp")),
    (r"position_embedding", ()),
    (r"attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # [D, 3, H, E]
    (r"attention/qkv/bias", (None, "tensor", None)),
    (r"attention/out/kernel", ("tensor", None, "fsdp")),  # [H, E, D]
    (r"mlp/in/kernel", ("fsdp", "tensor")),
    (r"mlp/in/bias", ("tensor",)),
    (r"mlp/out/kernel", ("tensor", "fsdp")),
    (r"out/bias", ()),
    (r"projection/kernel", ("fsdp", None)),
    (r"norm(_\w+)?/(scale|bias)", ()),
)
ACTIVATIONS = {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x), "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


class Size(NamedTuple):
    depth: int
    width: int
    heads: int
    projection_width: int
    activation: str


SIZES = {
    "B/32": Size(12, 512, 8, 512, "quick_gelu"),
    "L/14": Size(12, 768, 12, 768, "quick_gelu"),
    "H/14": Size(24, 1024, 16, 1024, "gelu"),
    "bigG/14": Size(32, 1280, 20, 1280, "gelu"),
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); returns (x, x before the block), as `nn.scan` requires.

    A token attends to itself and to the tokens before it.
    """

    heads: int
    activation: str
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.LayerNorm(EPSILON, **dtypes, name="norm_attention")(x)
        before, x = x, x + Attention(self.heads, **dtypes, name="attention")(y, bias)
        y = nn.LayerNorm(EPSILON, **dtypes, name="norm_mlp")(x)
        return constrain_batch(x + MLP(self.activation, **dtypes, name="mlp")(y)), before


class Attention(nn.Module):
    """Multi-head self-attention with a bias of the scores f32[1, 1, M, M].  [B, M, D] -> [B, M, D]."""

    heads: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        width, dtypes = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(width**-0.5)
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), kernel_init=init, **dtypes, name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        y = dot_product_attention(q, k, v, "xla", bias=bias)
        return nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, **dtypes, name="out")(y)


class MLP(nn.Module):
    """Two linear layers with an activation of ACTIVATIONS between them; the hidden width is 4 D.  [B, M, D] -> [B, M, D]."""

    activation: str
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, dtypes = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = nn.Dense(4 * width, kernel_init=nn.initializers.normal((2 * width) ** -0.5), **dtypes, name="in")(x)
        return nn.Dense(width, kernel_init=nn.initializers.normal(width**-0.5), **dtypes, name="out")(
            ACTIVATIONS[self.activation](hidden)
        )


class TextOutputs(NamedTuple):
    """What a CLIP text encoder gives.

    Fields:
        last: [B, M, D] of the last block, after the final norm.
        penultimate: [B, M, D] of the block before the last one, without a norm: Stable Diffusion XL's and 3's context.
        pooled: [B, D] of `last` at the first end-of-text token, not projected.
        projected: [B, P], pooled through the projection: CLIP's text embedding.
    """

    last: jax.Array
    penultimate: jax.Array
    pooled: jax.Array
    projected: jax.Array


class CLIPText(nn.Module):
    """CLIP's text encoder: ids int32[B, M], M at most 77 -> `TextOutputs` in `dtype`. Each text has an end-of-text token.

    Fields:
        depth, width, heads, projection_width, activation: see SIZES.
        vocabulary, max_tokens: rows of the tables of tokens and of positions.
        end: id of the end-of-text token.
    """

    depth: int
    width: int
    heads: int
    projection_width: int
    activation: str
    vocabulary: int = VOCABULARY
    max_tokens: int = MAX_TOKENS
    end: int = END
    dtype: layers.Dtype = jnp.float32
    param_dtype: layers.Dtype = jnp.float32

    rules = RULES

    @classmethod
    def of(cls, size: str, **fields: Any) -> "CLIPText":
        """An encoder of SIZES, "B/32" to "bigG/14".

        Raises:
            UserError: no such size.
        """
        if size not in SIZES:
            raise UserError(f"CLIP size {size!r} does not exist; choose one of {', '.join(SIZES)}")
        return cls(**SIZES[size]._asdict(), **fields)

    @nn.compact
    def __call__(self, ids: jax.Array) -> TextOutputs:
        tokens = ids.shape[1]
        if tokens > self.max_tokens:
            raise UserError(f"a text has {tokens} tokens, and CLIP has positions for {self.max_tokens}; truncate it")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocabulary, self.width, embedding_init=init, **dtypes, name="token_embedding")(ids)
        positions = self.param(
            "position_embedding", nn.initializers.normal(0.01), (self.max_tokens, self.width), self.param_dtype
        )
        x = constrain_batch(x + positions[:tokens].astype(self.dtype))
        later = np.triu(np.ones((tokens, tokens), bool), 1)
        bias = jnp.where(later, jnp.finfo(jnp.float32).min, 0.0)[None, None]
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth)
        x, inputs = blocks(self.heads, self.activation, **dtypes, name="blocks")(x, bias)
        last = nn.LayerNorm(EPSILON, **dtypes, name="norm_final")(x)
        pooled = jnp.take_along_axis(last, jnp.argmax(ids == self.end, axis=1)[:, None, None], axis=1)[:, 0]
        init = nn.initializers.normal(self.width**-0.5)
        projection = nn.Dense(self.projection_width, use_bias=False, kernel_init=init, **dtypes, name="projection")
        return TextOutputs(last, inputs[-1], pooled, projection(pooled))
