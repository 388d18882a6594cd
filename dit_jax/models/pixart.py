"""PixArt-alpha: DiT with cross-attention to text and one modulation for all blocks (Chen et al. 2023, arXiv 2310.00426).

B batch, H x W x C input, p patch side, N = HW / p^2 tokens, M tokens of text, D width.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.errors import UserError
from dit_jax.models import layers, position
from dit_jax.models.attention import IMPLEMENTATIONS, attention_kernel
from dit_jax.models.network import Cond, Shape, check_entries
from dit_jax.models.patches import check_sides, patchify, unpatchify
from dit_jax.models.published import Published
from dit_jax.models.stack import CHOICES, TokenBlocks, blocks_to_keep, form_of_loop, stack
from dit_jax.parallel.mesh import constrain_batch
from dit_jax.parallel.rules import Rules

RULES: Rules = (
    (r"attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # [D, 3, A, E]
    (r"attention/qkv/bias", (None, "tensor", None)),
    (r"cross_attention/query/kernel", ("fsdp", "tensor", None)),  # [D, A, E]
    (r"cross_attention/query/bias", ("tensor", None)),
    (r"cross_attention/key_value/kernel", ("fsdp", None, "tensor", None)),  # [D, 2, A, E]
    (r"cross_attention/key_value/bias", (None, "tensor", None)),
    (r"(attention|cross_attention)/out/kernel", ("tensor", None, "fsdp")),  # [A, E, D]
    (r"mlp/in/kernel", ("fsdp", "tensor")),
    (r"mlp/in/bias", ("tensor",)),
    (r"mlp/out/kernel", ("tensor", "fsdp")),
    (r"modulation/kernel", ("fsdp", None, None)),  # [D, 6, D], never over tensor, see `dit.RULES`
    (r"(patch|time)_embedding(/in|/out)?/kernel", (None, "fsdp")),
    (r"context_embedding/(in|out)/kernel", (None, "fsdp")),
    (r"final/kernel", ("fsdp", None)),
    (r"(vectors|final_vectors)", ()),
    (r"(out|modulation|final|patch_embedding|(time|context)_embedding/in)/bias", ()),
)
MATRICES = {  # see `Network.matrices`
    r"blocks/(attention|cross_attention)/qkv/kernel": "isoo",
    r"blocks/cross_attention/query/kernel": "ioo",
    r"blocks/cross_attention/key_value/kernel": "isoo",
    r"blocks/(attention|cross_attention)/out/kernel": "iio",
    r"blocks/mlp/(in|out)/kernel": "io",
}
CONTEXT, MASK = "context", "context_mask"  # entries of the condition
FIELDS = {"patch_size": 2, "depth": 28, "width": 1152, "heads": 16, "out_channels": 8}


def _published(side: int, tokens: int, grid: tuple[int, int] | None = None) -> Published:
    """side: of the latents.  tokens: of T5.  grid: `position_grid`."""
    return Published(FIELDS | {"position_grid": grid}, (side, side, 4), cond_shapes={CONTEXT: (tokens, 4096), MASK: (tokens,)})


PUBLISHED = {
    "PixArt-alpha@256": _published(32, 120),
    "PixArt-alpha@512": _published(64, 120),
    "PixArt-Sigma@1024": _published(128, 300, (32, 32)),  # Chen et al. 2024, arXiv 2403.04692: the network of alpha
}


class Block(nn.Module):
    """x + gate * attention, x + cross-attention to the text without a norm, x + gate * MLP, as `nn.scan` requires.

    Called with x [B, N, D], the modulation of all blocks f32[B, 6, D], the text [B, M, D], the bias of its padding
    f32[B, 1, 1, M], and `keep`, a boolean scalar (False returns x unchanged; None means True). The block adds its own `vectors`
    [6, D] to the modulation: shift, scale and gate of attention, then of the MLP.

    Source: Chen et al. 2023, section 2.3 and equation 1 (adaLN-single).
    """

    heads: int
    mlp_ratio: float
    attention: str
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, modulation: jax.Array, text: jax.Array, bias: jax.Array | None, keep: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        start, dtypes = x, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]
        own = self.param("vectors", nn.initializers.normal(width**-0.5), (6, width), self.param_dtype)
        vectors = modulation + own.astype(jnp.float32)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (vectors[:, i] for i in range(6))
        attention = layers.Attention(self.heads, self.attention, **dtypes, name="attention")
        x = x + gate_1[:, None] * attention(layers.modulate(layers.normalize(x), shift_1, scale_1).astype(self.dtype))
        cross = layers.Attention(self.heads, self.attention, zero_out=True, **dtypes, name="cross_attention")
        x = x + cross(x.astype(self.dtype), text, bias)
        mlp = layers.MLP(int(width * self.mlp_ratio), **dtypes, name="mlp")
        x = x + gate_2[:, None] * mlp(layers.modulate(layers.normalize(x), shift_2, scale_2).astype(self.dtype))
        x = x.astype(self.dtype) if keep is None else jnp.where(keep, x.astype(self.dtype), start)
        return constrain_batch(x, tokens=True), None


class ContextEmbedding(nn.Module):
    """Linear, GELU (tanh), linear: text [B, M, C] -> [B, M, D]."""

    width: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(name: str) -> nn.Dense:
            init = layers.normal_002
            return nn.Dense(self.width, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        return linear("out")(layers.gelu(linear("in")(x.astype(self.dtype))))


class Embedded(NamedTuple):
    """Inputs of the blocks.

    Fields:
        x: [B, N, D] tokens.
        time: [B, D] the embedding of the time.
        modulation: f32[B, 6, D] of all blocks.
        text: [B, M, D].
        bias: f32[B, 1, 1, M], very negative for padding; None without a mask.
    """

    x: jax.Array
    time: jax.Array
    modulation: jax.Array
    text: jax.Array
    bias: jax.Array | None


class PixArt(TokenBlocks, nn.Module):
    """PixArt-alpha: (x_t [B, H, W, C], t f32[B], cond) -> f32[B, H, W, out_channels], for the condition
    {"context": [B, M, context_width], "context_mask": bool[B, M]}; without a mask all tokens are attended to.

    A `models.network.Network`. The blocks' parameters are one stack under `blocks`. control {"keep": bool[depth]} skips blocks.

    Fields:
        patch_size, depth, width, heads, mlp_ratio, out_channels: as of `DiT`.
        context_width: of the text encoder's output; 4096 of T5 v1.1 XXL.
        position_grid: (rows, columns) to which positions are scaled, see `position.sincos_2d`; None is the input's own grid.
        attention, remat, unroll, dtype, param_dtype: as of `DiT`.
    """

    patch_size: int
    depth: int
    width: int
    heads: int
    out_channels: int
    context_width: int = 4096
    mlp_ratio: float = 4.0
    position_grid: tuple[int, int] | None = None
    attention: str = "auto"
    remat: str = "auto"
    unroll: bool | None = None
    dtype: layers.Dtype = jnp.float32
    param_dtype: layers.Dtype = jnp.float32

    rules = RULES
    matrices = MATRICES
    published = PUBLISHED
    remat_policies = CHOICES

    @property
    def size_unit(self) -> int:
        """Both sides of an input are multiples of it."""
        return self.patch_size

    def setup(self) -> None:
        self._check_fields()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patch_embedding = nn.Dense(self.width, kernel_init=layers.xavier_uniform, **dtypes)
        self.time_embedding = layers.TimeEmbedding(self.width, **dtypes)
        self.modulation = nn.DenseGeneral((6, self.width), kernel_init=layers.normal_002, **dtypes)
        self.context_embedding = ContextEmbedding(self.width, **dtypes)
        axes = (nn.broadcast, nn.broadcast, nn.broadcast, 0)
        self.blocks = stack(Block, self.depth, axes, self.unroll, self.remat)(
            self.heads, self.mlp_ratio, self.attention, **dtypes
        )
        normal = nn.initializers.normal(self.width**-0.5)
        self.final_vectors = self.param("final_vectors", normal, (2, self.width), self.param_dtype)
        self.final = nn.Dense(self.patch_size**2 * self.out_channels, kernel_init=layers.zeros, **dtypes)

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Cond, control: Mapping[str, Any] | None = None) -> jax.Array:
        embedded = self.embed(x_t, t, cond)
        x = self.run_blocks(embedded, control)  # [B, N, D]
        return self.head(x, embedded, x_t.shape)  # [B, H, W, out_channels]

    def embed(self, x_t: jax.Array, t: jax.Array, cond: Cond) -> Embedded:
        """Embeds patches, positions, text and time."""
        self.check(x_t.shape[1:])
        check_entries("cond", cond, (CONTEXT, MASK), type(self).__name__)
        context, mask = cond.get(CONTEXT), cond.get(MASK)
        if context is None or context.ndim != 3 or context.shape[0] != len(x_t) or context.shape[-1] != self.context_width:
            have = "missing" if context is None else f"{context.dtype}{list(context.shape)}"
            raise UserError(
                f'cond["{CONTEXT}"] is {have}; the text encoder\'s output [{len(x_t)}, tokens, {self.context_width}] is needed '
                "(model.context_width)"
            )
        if mask is not None and mask.shape != context.shape[:2]:
            raise UserError(f'cond["{MASK}"] is {list(mask.shape)}; {list(context.shape[:2])} is needed, as of the context')
        rows, columns = (side // self.patch_size for side in x_t.shape[1:3])
        x = self.patch_embedding(patchify(x_t, self.patch_size).astype(self.dtype))
        x = x + position.sincos_2d(self.width, rows, columns, self.position_grid).astype(self.dtype)
        time = self.time_embedding(t)
        modulation = constrain_batch(self.modulation(nn.silu(time))).astype(jnp.float32)
        bias = None if mask is None else jnp.where(mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min / 2)[:, None, None]
        return Embedded(constrain_batch(x, tokens=True), time, modulation, constrain_batch(self.context_embedding(context)), bias)

    def run_blocks(self, embedded: Embedded, control: Mapping[str, Any] | None = None) -> jax.Array:
        """Runs all blocks; returns the tokens [B, N, D]."""
        keep = blocks_to_keep(control, self.depth, type(self).__name__)
        x, modulation, text, bias = embedded.x, embedded.modulation, embedded.text, embedded.bias
        return self.blocks(x, modulation, text, bias, keep)[0]

    def head(self, x: jax.Array, embedded: Embedded, shape: Shape) -> jax.Array:
        """Maps tokens to f32[B, H, W, out_channels], for an input of shape [B, H, W, C]."""
        vectors = self.final_vectors.astype(jnp.float32) + embedded.time.astype(jnp.float32)[:, None]
        x = layers.modulate(layers.normalize(x), vectors[:, 0], vectors[:, 1]).astype(self.dtype)
        return unpatchify(self.final(x), self.patch_size, *shape[1:3]).astype(jnp.float32)

    def check(self, latent_shape: Shape) -> None:
        """Raises a UserError if the fields do not fit one another or an input (h, w, c)."""
        self._check_fields()
        if len(latent_shape) != 3:
            raise UserError(f"the network's input is {' x '.join(map(str, latent_shape))}, but PixArt takes images")
        height, width, _ = latent_shape
        check_sides(height, width, self.patch_size)

    def _check_fields(self) -> None:
        for name, allowed in (("attention", IMPLEMENTATIONS), ("remat", ("auto", *CHOICES))):
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("patch_size", "depth", "width", "heads", "context_width"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.mlp_ratio <= 0:
            raise UserError(f"model.mlp_ratio is {self.mlp_ratio}; it must be positive")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"model.width = {self.width} must be a multiple of model.heads = {self.heads} and of 4")
        if self.position_grid is not None and (len(self.position_grid) != 2 or min(self.position_grid) < 1):
            raise UserError(f"model.position_grid is {self.position_grid}; it must be (rows, columns) of tokens, or None")

    def num_tokens(self, latent_shape: Shape) -> int:
        height, width, _ = latent_shape
        return (height // self.patch_size) * (width // self.patch_size)

    def macs(self, latent_shape: Shape, cond_shapes: Mapping[str, Shape]) -> int:
        """Multiply-adds of the matrix products, the text's included."""
        d, n, m, p = self.width, self.num_tokens(latent_shape), cond_shapes[CONTEXT][0], self.patch_size
        hidden = int(d * self.mlp_ratio)
        block = n * (4 * d * d + 2 * d * hidden) + 2 * n * n * d  # self-attention and MLP
        block += 2 * n * d * d + 2 * m * d * d + 2 * n * m * d  # cross-attention
        text = m * (self.context_width * d + d * d)
        time = 256 * d + d * d + 6 * d * d
        return n * p * p * latent_shape[-1] * d + text + time + self.depth * block + n * d * p * p * self.out_channels

    def describe(self) -> str:
        return (
            f"{type(self).__name__} depth {self.depth} width {self.width} heads {self.heads} patch {self.patch_size} "
            f"({jnp.dtype(self.dtype).name})"
        )

    def for_platform(self, platform: str) -> "PixArt":
        unroll, remat = form_of_loop(self.unroll, self.remat, platform)
        kernel = attention_kernel(self.attention, self.dtype, self.width // self.heads, platform)
        return self.clone(unroll=unroll, remat=remat, attention=kernel)
