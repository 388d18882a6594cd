"""The latent DiffiT of Hatamizadeh et al. 2023 (arXiv 2312.02139): attention that depends on time and class.

B batch, H x W x C input, p patch, N = HW / p^2 tokens, D width, A heads, E = D / A.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dit_jax.errors import UserError
from dit_jax.models import layers, position
from dit_jax.models.attention import IMPLEMENTATIONS, attention_kernel, dot_product_attention
from dit_jax.models.network import MIXED, Cond, Shape, check_entries, label_vectors
from dit_jax.models.patches import check_sides, patchify, unpatchify
from dit_jax.models.products import dot_general
from dit_jax.models.published import Fid, Published
from dit_jax.models.stack import CHOICES, TokenBlocks, blocks_to_keep, form_of_loop, stack
from dit_jax.parallel.mesh import constrain_batch
from dit_jax.parallel.rules import Rules

# A spec covers the trailing dimensions. A stack of blocks adds a leading dimension, which is not split.
RULES: Rules = (
    (r"attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # [D, 3, A, E]
    (r"attention/qkv/bias", (None, "tensor", None)),
    # Of one vector per example, like DiT's modulation: never over tensor.
    (r"attention/condition/kernel", ("fsdp", None, None, None)),  # [D, 3, A, E]
    (r"attention/condition/bias", ()),
    (r"attention/position_bias", (None, "tensor")),  # [offsets, A]: split as the heads, whose scores it is added to
    (r"attention/out/kernel", ("tensor", None, "fsdp")),  # [A, E, D]
    (r"mlp/in/kernel", ("fsdp", "tensor")),  # [D, 4D]
    (r"mlp/in/bias", ("tensor",)),
    (r"mlp/out/kernel", ("tensor", "fsdp")),  # [4D, D]
    (r"patch_embedding/kernel", (None, "fsdp")),
    (r"time_embedding/(in|out)/kernel", (None, "fsdp")),
    (r"label_embedding/embedding", (None, "fsdp")),
    (r"final/linear/kernel", ("fsdp", None)),
    (r"(out|linear|patch_embedding|time_embedding/in)/bias", ()),
)
MATRICES = {  # see `Network.matrices`
    r"blocks/attention/(qkv|condition)/kernel": "isoo",
    r"blocks/attention/out/kernel": "iio",
    r"blocks/mlp/(in|out)/kernel": "io",
}
RELEASED: Mapping[str, Any] = {"patch_size": 2, "depth": 28, "width": 1152, "heads": 16, "num_classes": 1000, "out_channels": 8}
SOURCE = "README of NVlabs/DiffiT"


def position_bias(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """[A, N, N]: the bias of the scores of each pair of tokens, which depends on the offset between them.

    Args:
        table: [(2 rows - 1) (2 columns - 1), A]. The entry of a query at (y, x) and a key at (v, u) is
            (y - v + rows - 1) (2 columns - 1) + x - u + columns - 1.
        grid: (rows, columns) of tokens.

    No gather: its gradient, a scatter of N^2 rows, is slow on a TPU.

    Source: Liu et al. 2021 (Swin), section 3.2.
    """
    (rows, columns), heads = grid, table.shape[-1]
    bias = pairs(table.reshape(2 * rows - 1, 2 * columns - 1, heads), rows)  # [rows, rows, offsets of columns, A]
    bias = pairs(jnp.moveaxis(bias, 2, 0), columns)  # [columns, columns, rows, rows, A], of query and key each
    return bias.transpose(4, 2, 0, 3, 1).reshape(heads, rows * columns, rows * columns)


def pairs(x: jax.Array, n: int) -> jax.Array:
    """[2n - 1, ...] by offset -> [n, n, ...]: entry (i, j) is x[i - j + n - 1]."""
    x = x[::-1]
    # Entry k of the circle is that of j - i = k modulo 2n. Rows of 2n - 1 of its repetitions begin one entry earlier each.
    circle = jnp.concatenate([x[n - 1 :], x[:1], x[: n - 1]])
    repeated = jnp.concatenate([circle] * n)[: n * (2 * n - 1)]
    return repeated.reshape(n, 2 * n - 1, *x.shape[1:])[:, :n]


class TimeDependentAttention(nn.Module):
    """Self-attention whose queries, keys and values are sums of a projection of the token and one of the condition.

    Called with x [B, N, D] and c [B, D]; returns [B, N, D].
    Parameters: `qkv` and `condition` [D, 3, A, E], `position_bias` [offsets, A], `out` [A, E, D].
    Source: Hatamizadeh et al. 2023, equations 3 to 6.
    """

    heads: int
    grid: tuple[int, int]
    kernel: str
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kernel = kernel_of(self.kernel, self.dtype, x.shape[-1] // self.heads, x.shape[1])
        parts = layers.Projections(3, self.heads, kernel == "cudnn", **dtypes, name="qkv")(x)
        conditions = layers.Projections(3, self.heads, False, **dtypes, name="condition")(c[:, None].astype(self.dtype))
        q, k, v = (part + constrain_batch(condition) for part, condition in zip(parts, conditions, strict=True))
        shape = ((2 * self.grid[0] - 1) * (2 * self.grid[1] - 1), self.heads)
        # The paper's code truncates at +-2, which is 100 standard deviations.
        table = self.param("position_bias", layers.normal_002, shape, self.param_dtype)
        bias = position_bias(table.astype(jnp.float32), self.grid)
        y = checkpoint_name(dot_product_attention(q, k, v, kernel, bias), "attention")
        out = nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), kernel_init=layers.xavier_uniform, dot_general=dot_general, **dtypes, name="out"
        )
        return checkpoint_name(out(y), "attention_out")


class Block(nn.Module):
    """x + attention(norm(x), c), then x + MLP(norm(x)); the norms have no parameters, and nothing is zero at the start.

    Called with x [B, N, D], c [B, D] and `keep`, a boolean scalar (False returns x unchanged; None means True). Returns
    (x, None).
    """

    heads: int
    grid: tuple[int, int]
    mlp_ratio: float
    attention: str
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, keep: jax.Array | None = None) -> tuple[jax.Array, None]:
        start, dtypes = x, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = TimeDependentAttention(self.heads, self.grid, self.attention, **dtypes, name="attention")
        x = x + attention(layers.normalize(x).astype(self.dtype), c)
        mlp = layers.MLP(int(x.shape[-1] * self.mlp_ratio), **dtypes, name="mlp")
        x = x + mlp(layers.normalize(x).astype(self.dtype))
        x = x.astype(self.dtype) if keep is None else jnp.where(keep, x.astype(self.dtype), start)
        return constrain_batch(x, tokens=True), None


class FinalLayer(nn.Module):
    """Layer norm, SiLU, then a zero-initialized linear layer.  [B, N, D] -> [B, N, features]."""

    features: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = nn.Dense(self.features, kernel_init=layers.zeros, dtype=self.dtype, param_dtype=self.param_dtype, name="linear")
        return linear(nn.silu(layers.normalize(x)).astype(self.dtype))


class Embedded(NamedTuple):
    """Inputs of the blocks: x [B, N, D] tokens, c [B, D] the condition."""

    x: jax.Array
    c: jax.Array


class DiffiT(TokenBlocks, nn.Module):
    """DiffiT: (x_t [B, H, W, C], t f32[B] network time, cond {"label": int[B]}) -> f32[B, H, W, out_channels].

    A `models.network.Network`. It has DiT's frame: patches, sine-cosine positions, and the sum c of the embeddings of time and
    label. c enters the attention of every block (`TimeDependentAttention`), without a non-linearity, and nothing else. Labels,
    `second_label`, `second_share` and control {"keep": bool[depth]} are as DiT's.

    Fields:
        patch_size: side p of a patch, in latents or pixels.
        depth: number of blocks.
        width: features of a token.
        heads: attention heads; divides the width.
        num_classes: number of labels; 0 for an unconditional network.
        out_channels: 2 C when the process learns its variance, else C.
        grid: (rows, columns) of tokens of the input. The tables of the relative positions have (2 rows - 1) (2 columns - 1)
            entries, so that the network takes only this size.
        mlp_ratio: width of the MLP's hidden layer over the network's.
        attention: implementation: "xla", "cudnn" (GPUs, 16-bit dtypes, an even number of tokens), or "auto".
        remat: which activations a block stores for its gradient: "auto", "none", "elementwise", "dots", "full" or "offload", see
            DiT.
        unroll: False scans over the blocks; True unrolls; None unrolls on a GPU.
        dtype: of activations and matrix products; norms, softmax and the output are float32.
        param_dtype: of the parameters.
    """

    patch_size: int
    depth: int
    width: int
    heads: int
    num_classes: int
    out_channels: int
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    attention: str = "auto"
    remat: str = "auto"
    unroll: bool | None = None
    dtype: layers.Dtype = jnp.float32
    param_dtype: layers.Dtype = jnp.float32

    rules = RULES
    matrices: ClassVar = MATRICES
    label_table = "label_embedding/embedding"
    mixes_labels = True
    remat_policies = CHOICES
    published: ClassVar = {
        "DiffiT@256": Published(
            {**RELEASED, "grid": (16, 16)}, (32, 32, 4), (Fid(1.73, "guidance 4.4, power-cosine, 3 of 4 channels", SOURCE),)
        ),
        "DiffiT@512": Published(
            {**RELEASED, "grid": (32, 32)}, (64, 64, 4), (Fid(2.67, "guidance 1.49, 3 of 4 channels", SOURCE),)
        ),
    }

    def setup(self) -> None:
        self._check_fields()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patch_embedding = nn.Dense(self.width, kernel_init=layers.xavier_uniform, **dtypes)
        self.time_embedding = layers.TimeEmbedding(self.width, **dtypes)
        if self.num_classes:
            self.label_embedding = nn.Embed(self.num_classes + 1, self.width, embedding_init=layers.normal_002, **dtypes)
        self.blocks = stack(Block, self.depth, (nn.broadcast, 0), self.unroll, self.remat)(
            self.heads, tuple(self.grid), self.mlp_ratio, self.attention, **dtypes
        )
        self.final = FinalLayer(self.patch_size**2 * self.out_channels, **dtypes)

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Cond, control: Mapping[str, Any] | None = None) -> jax.Array:
        embedded = self.embed(x_t, t, cond)
        x = self.run_blocks(embedded, control)  # [B, N, D]
        return self.head(x, embedded, x_t.shape)  # [B, H, W, out_channels]

    def embed(self, x_t: jax.Array, t: jax.Array, cond: Cond) -> Embedded:
        """Embeds patches, positions, time and label."""
        self.check(x_t.shape[1:])
        check_entries("cond", cond, ("label", *MIXED) if self.num_classes else (), type(self).__name__)
        x = self.patch_embedding(patchify(x_t, self.patch_size).astype(self.dtype))  # [B, N, D]
        x = x + position.sincos_2d(self.width, *self.grid).astype(self.dtype)
        c = self.time_embedding(t)  # [B, D]
        if self.num_classes:
            c = c + label_vectors(self.label_embedding, cond, len(x_t), self.num_classes)
        return Embedded(constrain_batch(x, tokens=True), c)

    def run_blocks(self, embedded: Embedded, control: Mapping[str, Any] | None = None) -> jax.Array:
        """Runs all blocks; returns the tokens [B, N, D]."""
        keep = blocks_to_keep(control, self.depth, type(self).__name__)
        return self.blocks(embedded.x, embedded.c, keep)[0]

    def head(self, x: jax.Array, embedded: Embedded, shape: Shape) -> jax.Array:
        """Maps tokens to f32[B, H, W, out_channels], for an input of shape [B, H, W, C]."""
        return unpatchify(self.final(x.astype(self.dtype)), self.patch_size, *shape[1:3]).astype(jnp.float32)

    def check(self, latent_shape: Shape) -> None:
        """Raises a UserError if the fields do not fit one another or an input of latent_shape (h, w, c)."""
        self._check_fields()
        if len(latent_shape) != 3:
            raise UserError(
                f"the network's input is {' x '.join(map(str, latent_shape))}, but DiffiT takes images (height x width x "
                "channels); choose a network for clips"
            )
        (height, width, _), p = latent_shape, self.patch_size
        check_sides(height, width, p)
        if (height // p, width // p) != tuple(self.grid):
            raise UserError(
                f"the network's input of {height} x {width} has {height // p} x {width // p} tokens, and model.grid is "
                f"{tuple(self.grid)}: DiffiT takes only the size whose relative positions it learns. Set "
                f"--config.model.grid='({height // p}, {width // p})' to train at this size"
            )

    def _check_fields(self) -> None:
        for name, known in (("remat", ("auto", *CHOICES)), ("attention", IMPLEMENTATIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        for name in ("patch_size", "depth", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if len(self.grid) != 2 or not all(isinstance(side, int) and side >= 1 for side in self.grid):
            raise UserError(f"model.grid is {self.grid}; it must be (rows, columns) of tokens, as in (16, 16)")
        if self.num_classes < 0:
            raise UserError(f"model.num_classes is {self.num_classes}; it must be at least 0 (0 is unconditional)")
        if self.mlp_ratio <= 0:
            raise UserError(f"model.mlp_ratio is {self.mlp_ratio}; it must be positive")
        if self.width % self.heads:
            raise UserError(
                f"model.heads = {self.heads} does not divide model.width = {self.width}; "
                f"choose a width that is a multiple of {self.heads}"
            )
        if self.width % 4:
            raise UserError(f"model.width = {self.width} is not a multiple of 4, which the position table needs")
        if self.attention == "cudnn" and self.grid[0] * self.grid[1] % 2:
            raise UserError(f"model.attention is 'cudnn', which needs an even number of tokens, and model.grid is {self.grid}")

    def num_tokens(self, latent_shape: Shape) -> int:
        height, width, _ = latent_shape
        return (height // self.patch_size) * (width // self.patch_size)

    def macs(self, latent_shape: Shape, cond_shapes: Mapping[str, Shape] | None = None) -> int:
        n, d, patch = self.num_tokens(latent_shape), self.width, self.patch_size**2
        attention = 4 * n * d * d + 3 * d * d + 2 * n * n * d  # tokens, condition, products
        mlp = 2 * n * d * int(d * self.mlp_ratio)
        return n * d * patch * (latent_shape[-1] + self.out_channels) + 256 * d + d * d + self.depth * (attention + mlp)

    def describe(self) -> str:
        return (
            f"{type(self).__name__} depth {self.depth} width {self.width} heads {self.heads} patch {self.patch_size} "
            f"({jnp.dtype(self.dtype).name})"
        )

    def for_platform(self, platform: str) -> "DiffiT":
        unroll, remat = form_of_loop(self.unroll, self.remat, platform)
        tokens = self.grid[0] * self.grid[1]
        kernel = kernel_of(self.attention, self.dtype, self.width // self.heads, tokens, platform)
        return self.clone(unroll=unroll, remat=remat, attention=kernel)


def kernel_of(implementation: str, dtype: Any, head_width: int, tokens: int, platform: str | None = None) -> str:
    """`attention_kernel` with a bias: "auto" is XLA for an odd number of tokens, for which cuDNN has no gradient of the bias."""
    if implementation == "auto" and tokens % 2:
        return "xla"
    return attention_kernel(implementation, dtype, head_width, platform)
