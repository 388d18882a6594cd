"""DiT for clips, with attention in windows of space and time: Latte (Ma et al. 2024, arXiv 2401.03048) and W.A.L.T (Gupta et al.
2023, arXiv 2312.06662).

B batch, F x H x W x C input, p patch side, a grid of T x R x S tokens (T = F), N = T R S, M text tokens, D width, A heads,
E = D / A, n windows of L tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dit_jax.errors import UserError
from dit_jax.models import layers, position
from dit_jax.models.attention import IMPLEMENTATIONS, attention_kernel, dot_product_attention
from dit_jax.models.diffit import pairs
from dit_jax.models.dit import FinalLayer, Modulation
from dit_jax.models.network import MIXED, Cond, Shape, check_entries, label_vectors
from dit_jax.models.patches import check_sides, patchify, unpatchify
from dit_jax.models.products import dot_general
from dit_jax.models.published import Published
from dit_jax.models.stack import CHOICES, REMAT_POLICIES, TokenBlocks, blocks_to_keep, form_of_loop, stack
from dit_jax.parallel.mesh import BATCH_AXES, constrain, constrain_batch
from dit_jax.parallel.rules import Rules

RULES: Rules = (
    (r"attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # [D, 3, A, E]
    (r"attention/qkv/bias", (None, "tensor", None)),
    (r"attention/position_bias", (None, None, None, "tensor")),  # [offsets of T, R and S, A]
    (r"cross_attention/query/kernel", ("fsdp", "tensor", None)),  # [D, A, E]
    (r"cross_attention/query/bias", ("tensor", None)),
    (r"cross_attention/key_value/kernel", ("fsdp", None, "tensor", None)),  # [D, 2, A, E]
    (r"cross_attention/key_value/bias", (None, "tensor", None)),
    (r"(attention|cross_attention)/out/kernel", ("tensor", None, "fsdp")),  # [A, E, D]
    (r"mlp/in/kernel", ("fsdp", "tensor")),
    (r"mlp/in/bias", ("tensor",)),
    (r"mlp/out/kernel", ("tensor", "fsdp")),
    (r"modulation/linear/kernel", ("fsdp", None, None)),  # [D, 6, D], never over tensor, see `dit.RULES`
    (r"modulation_down/kernel", ("fsdp", None)),  # [D, rank]
    (r"modulation_up/kernel", (None, None, "fsdp")),  # [rank, 6, D]
    (r"(patch|context|known)_embedding/kernel", (None, "fsdp")),
    (r"(time|level)_embedding/(in|out)/kernel", (None, "fsdp")),
    (r"label_embedding/embedding", (None, "fsdp")),
    (r"(space|time)_table", (None, "fsdp")),
    (r"final/linear/kernel", ("fsdp", None)),
    (r"(out|linear|(patch|context)_embedding|(time|level)_embedding/in)/bias", ()),
    (r"norm_(query|key)/scale", ()),
)
MATRICES = {  # see `Network.matrices`
    r"blocks/window_\d+/attention/qkv/kernel": "isoo",
    r"blocks/window_\d+/cross_attention/query/kernel": "ioo",
    r"blocks/window_\d+/cross_attention/key_value/kernel": "isoo",
    r"blocks/window_\d+/(attention|cross_attention)/out/kernel": "iio",
    r"blocks/window_\d+/mlp/(in|out)/kernel": "io",
    r"blocks/window_\d+/modulation/linear/kernel": "iso",
}
POSITIONS, MODULATIONS = ("sincos", "learned"), ("separate", "lora")
CONTEXT, MASK = "context", "context_mask"  # entries of the condition
KNOWN, KNOWN_MASK, ESTIMATE, LOW, LEVEL = "known", "known_mask", "estimate", "low_res", "low_res_level"
LEVEL_SCALE = 1000.0  # of the level before it is embedded, as a time of 1000 steps
Window = tuple[int, int, int]

LATTE: tuple[Window, ...] = ((1, 0, 0), (0, 1, 1))
WALT: tuple[Window, ...] = ((1, 16, 16), (0, 8, 8))
FULL: tuple[Window, ...] = ((0, 0, 0),)


def _latte(frames: int = 16) -> Published:
    fields = {"patch_size": 2, "depth": 28, "width": 1152, "heads": 16, "num_classes": 101, "out_channels": 8, "windows": LATTE}
    return Published(fields, (frames, 32, 32, 4))


def walt_fields(depth: int, width: int, grid: Window, **more: Any) -> dict[str, Any]:
    """The fields that W.A.L.T's video models share.  grid: (frames, rows, columns) of tokens."""
    fields: dict[str, Any] = {"patch_size": 1, "depth": depth, "width": width, "heads": 16, "out_channels": 8, "grid": grid}
    fields |= {"windows": WALT, "position": "learned", "relative_bias": True, "qk_norm": True, "modulation": "lora", "rank": 2}
    return fields | {"self_conditioning": True} | more


def _walt(shape: Shape, fields: Mapping[str, Any], text: int = 0) -> Published:
    conditions: dict[str, Shape] = {CONTEXT: (text, 2048)} if text else {"label": ()} if fields.get("num_classes") else {}
    return Published(fields, shape, process="gaussian", cond_shapes=conditions)


def _published() -> dict[str, Published]:
    base, wide = (5, 16, 16), (5, 16, 28)
    # Text to video at 16 : 28. A window of 16 does not divide 28; these have about as many tokens.
    text: dict[str, Any] = {"context_width": 2048, "known_frames": True, "windows": ((1, 0, 0), (0, 8, 14))}
    low = text | {"low_res_channels": 8, "known_frames": False}
    return {
        "Latte-XL/2@UCF101": _latte(),
        "WALT-L@UCF101": _walt((*base, 8), walt_fields(24, 1024, base, num_classes=101)),
        "WALT-XL@UCF101": _walt((*base, 8), walt_fields(28, 1152, base, num_classes=101)),
        "WALT-L@K600": _walt((*base, 8), walt_fields(24, 1024, base, known_frames=True)),
        "WALT-base@T2V": _walt((*wide, 8), walt_fields(52, 2304, wide, **text), 64),
        "WALT-SR1@T2V": _walt((5, 32, 56, 8), walt_fields(40, 1408, wide, **low, patch_size=2), 64),
        "WALT-SR2@T2V": _walt((5, 64, 112, 8), walt_fields(24, 1024, wide, **low, patch_size=4), 64),
    }


@jax.tree_util.register_static
@dataclass(frozen=True)
class Grid:
    """The tokens of a clip: T frames, R rows, S columns."""

    frames: int
    rows: int
    columns: int

    @property
    def sides(self) -> Window:
        return self.frames, self.rows, self.columns

    def window(self, window: Window) -> Window:
        """The sides of a window: 0, or more than the axis has, is the whole axis."""
        t, r, s = (side if 0 < side < whole else whole for side, whole in zip(window, self.sides, strict=True))
        return t, r, s

    def split(self, x: jax.Array, window: Window) -> jax.Array:
        """[B, T R S, ...] -> [B, n, L, ...]: windows in raster order, and tokens in raster order inside of each."""
        (t, r, s), (a, b, c) = self.sides, self.window(window)
        x = x.reshape(len(x), t // a, a, r // b, b, s // c, c, *x.shape[2:])
        order = (0, 1, 3, 5, 2, 4, 6, *range(7, x.ndim))
        return x.transpose(order).reshape(len(x), (t // a) * (r // b) * (s // c), a * b * c, *x.shape[7:])

    def join(self, x: jax.Array, window: Window) -> jax.Array:
        """[B, n, L, ...] -> [B, T R S, ...], the inverse of `split`."""
        (t, r, s), (a, b, c) = self.sides, self.window(window)
        x = x.reshape(len(x), t // a, r // b, s // c, a, b, c, *x.shape[3:])
        return x.transpose(0, 1, 4, 2, 5, 3, 6, *range(7, x.ndim)).reshape(len(x), t * r * s, *x.shape[7:])


def relative_bias(table: jax.Array, window: Window) -> jax.Array:
    """[A, L, L]: the bias of the scores of each pair of tokens of a window, which depends on the offset between them.

    Args:
        table: [2 t - 1, 2 r - 1, 2 s - 1, A] for the largest window (t, r, s); the middle entries are of offset 0.
        window: (t', r', s'), none larger.

    Source: Liu et al. 2021 (Swin), section 3.2, with a third axis.
    """
    most = [(side + 1) // 2 for side in table.shape[:3]]
    inner = tuple(slice(side - own, side + own - 1) for side, own in zip(most, window, strict=True))
    bias = table[inner]
    for own in window:  # pairs takes the first axis to two, which go to the end
        bias = jnp.moveaxis(pairs(bias, own), (0, 1), (-2, -1))
    tokens = math.prod(window)  # [A, t, t, r, r, s, s], of query and key each
    return bias.transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, tokens, tokens)


def between_frames(x: jax.Array, frames: int, factor: int) -> jax.Array:
    """[B, f, ...] -> [B, frames, ...]: linear between the frames of x, of which frame i stands at i factor; the last is repeated.

    Raises:
        UserError: f is another number than a clip of so many frames has at this factor.
    """
    count = x.shape[1]
    if count != -(-frames // factor):
        raise UserError(
            f'cond["{LOW}"] has {count} frames, and the input of {frames} needs {-(-frames // factor)} (model.low_res_frames = '
            f"{factor})"
        )
    places = np.minimum(np.arange(frames) / factor, count - 1)
    before = np.floor(places).astype(int)
    share = jnp.asarray(places - before, x.dtype).reshape(-1, *[1] * (x.ndim - 2))
    return (1 - share) * x[:, before] + share * x[:, np.minimum(before + 1, count - 1)]


def split_windows(grid: Grid, x: jax.Array, window: Window) -> jax.Array:
    """`Grid.split` of tokens [B, N, D], merged to [B n, L, D]: the sequence axis of a mesh splits windows, else their tokens."""
    x = grid.split(x, window)

    def spec(mesh_shape):
        whole = x.shape[1] % mesh_shape["sequence"]
        return PartitionSpec(BATCH_AXES, *((None, "sequence") if whole else ("sequence",)))

    x = constrain(x, spec)
    return x.reshape(-1, *x.shape[2:])


def join_windows(grid: Grid, x: jax.Array, window: Window) -> jax.Array:
    """[B n, L, D] -> [B, N, D]."""
    count = math.prod(grid.sides) // x.shape[1]
    return constrain_batch(grid.join(x.reshape(-1, count, *x.shape[1:]), window), tokens=True)


class HeadLayerNorm(nn.Module):
    """Layer norm over the width of a head with a scale, in float32.  [B, L, A, E] -> the same, in x's dtype.

    Source: Dehghani et al. 2023 (ViT-22B), section 2, which W.A.L.T follows.
    """

    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return (layers.normalize(x) * scale).astype(x.dtype)


class WindowAttention(nn.Module):
    """Self-attention inside of windows.

    Called with x [B n, L, D], the sides of the window, and whether each token attends to itself alone: the scores are then not
    computed, and the values pass. Returns [B n, L, D].

    Fields:
        bias_window: sides of the largest window, of the table of relative positions; None for no such bias.
    """

    heads: int
    kernel: str
    qk_norm: bool
    bias_window: Window | None
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, window: Window, alone: bool) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kernel = attention_kernel(self.kernel, self.dtype, x.shape[-1] // self.heads)
        q, k, v = layers.Projections(3, self.heads, kernel == "cudnn", **dtypes, name="qkv")(x)
        if self.qk_norm:
            q, k = (HeadLayerNorm(self.param_dtype, name=f"norm_{what}")(y) for what, y in (("query", q), ("key", k)))
        bias = None
        if self.bias_window is not None:
            shape = (*(2 * side - 1 for side in self.bias_window), self.heads)
            table = self.param("position_bias", layers.normal_002, shape, self.param_dtype)
            bias = None if alone else relative_bias(table.astype(jnp.float32), window)
        y = v if alone else checkpoint_name(dot_product_attention(q, k, v, kernel, bias), "attention")
        return _out(y, dtypes)


class CrossAttention(nn.Module):
    """Attention of the tokens of a window to themselves and to the text, with the same projections of both.

    Called with x [B n, L, D], text [B, M, D] and the bias of its padding f32[B, 1, 1, M]. The output starts at zero.

    Source: Gupta et al. 2023, section 4.3 (keys and values are the query's tokens and the text, one after the other).
    """

    heads: int
    kernel: str
    qk_norm: bool
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, bias: jax.Array | None) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kernel, windows = attention_kernel(self.kernel, self.dtype, x.shape[-1] // self.heads), len(x) // len(text)
        linear = nn.DenseGeneral(
            (self.heads, x.shape[-1] // self.heads),
            kernel_init=layers.xavier_uniform,
            dot_general=dot_general,
            **dtypes,
            name="query",
        )
        project = layers.Projections(2, self.heads, kernel == "cudnn", **dtypes, name="key_value")
        q, own, of_text = checkpoint_name(linear(x), "qkv"), project(x), project(text)
        k, v = (jnp.concatenate([a, jnp.repeat(b, windows, axis=0)], axis=1) for a, b in zip(own, of_text, strict=True))
        if self.qk_norm:
            q, k = (HeadLayerNorm(self.param_dtype, name=f"norm_{what}")(y) for what, y in (("query", q), ("key", k)))
        if bias is not None:
            bias = jnp.repeat(jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (x.shape[1], 0))), windows, axis=0)
        y = checkpoint_name(dot_product_attention(q, k, v, kernel, bias), "attention")
        return _out(y, dtypes, layers.zeros)


def _out(y: jax.Array, dtypes: Mapping[str, Any], init: Any = layers.xavier_uniform) -> jax.Array:
    """The projection of the heads' outputs, a layer "out" of the module that calls it."""
    width = y.shape[-2] * y.shape[-1]
    out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, dot_general=dot_general, **dtypes, name="out")
    return checkpoint_name(out(y), "attention_out")


class Conditions(NamedTuple):
    """What all blocks read.

    Fields:
        c: [B, D] time, label, and level of the noise on a low resolution.
        modulation: f32[B, 6, D] that all blocks share (AdaLN-LoRA); None where each has its own.
        text: [B, M, D]; None without text.
        bias: f32[B, 1, 1, M], very negative for padding; None without a mask.
    """

    c: jax.Array
    modulation: jax.Array | None
    text: jax.Array | None
    bias: jax.Array | None


class Block(nn.Module):
    """DiT's block with adaLN-zero, whose attention is inside of windows; between it and the MLP the cross-attention, if any.

    Called with x [B, N, D], the conditions, the grid and `keep`, a boolean scalar (False returns x unchanged; None means True).

    Fields:
        window: sides (frames, rows, columns) in tokens; 0 is the whole axis.
        crosses: whether the block attends to the text.
        values_of_images: with one frame, attention passes the values (W.A.L.T's blocks over time have an identity mask then).
        rank: of the block's own change of the shared modulation; None for a modulation of its own.
    """

    window: Window
    heads: int
    mlp_ratio: float
    attention: str
    qk_norm: bool
    bias_window: Window | None
    crosses: bool
    values_of_images: bool
    rank: int | None
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, conditions: Conditions, grid: Grid, keep: jax.Array | None = None) -> jax.Array:
        start, dtypes = x, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (v for v in jnp.moveaxis(self._vectors(conditions), 1, 0))
        fields = self.heads, self.attention, self.qk_norm
        y = layers.modulate(layers.normalize(x), shift_1, scale_1).astype(self.dtype)
        attention = WindowAttention(*fields, self.bias_window, **dtypes, name="attention")
        alone = self.values_of_images and grid.frames == 1
        y = attention(split_windows(grid, y, self.window), grid.window(self.window), alone)
        x = x + gate_1[:, None] * join_windows(grid, y, self.window)
        if self.crosses:
            assert conditions.text is not None  # `VideoDiT.embed` has checked it
            cross = CrossAttention(*fields, **dtypes, name="cross_attention")
            y = split_windows(grid, layers.normalize(x).astype(self.dtype), self.window)
            x = x + join_windows(grid, cross(y, conditions.text, conditions.bias), self.window)
        mlp = layers.MLP(int(x.shape[-1] * self.mlp_ratio), **dtypes, name="mlp")
        x = x + gate_2[:, None] * mlp(layers.modulate(layers.normalize(x), shift_2, scale_2).astype(self.dtype))
        x = x.astype(self.dtype) if keep is None else jnp.where(keep, x.astype(self.dtype), start)
        return constrain_batch(x, tokens=True)

    def _vectors(self, conditions: Conditions) -> jax.Array:
        """f32[B, 6, D]: shift, scale and gate of attention, then of the MLP.

        Source: Gupta et al. 2023, section 3.3 (AdaLN-LoRA): A_i = A_1 + W_b W_a c.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.rank is None:
            return Modulation(6, **dtypes, name="modulation")(conditions.c)
        assert conditions.modulation is not None
        if not self.rank:
            return conditions.modulation
        down = nn.Dense(self.rank, use_bias=False, kernel_init=layers.normal_002, **dtypes, name="modulation_down")
        shape = (6, conditions.c.shape[-1])
        up = nn.DenseGeneral(shape, use_bias=False, kernel_init=layers.zeros, **dtypes, name="modulation_up")
        return conditions.modulation + constrain_batch(up(down(conditions.c)))


class Cycle(nn.Module):
    """One block of each window, in turn, as `nn.scan` requires.

    Called with x [B, N, D], the conditions, the grid, the positions [T, D] of frames, whether this is the first cycle, and
    `keep`, bool[number of windows] or None. Returns (x, None).

    Fields:
        blocks: keyword arguments of each block.
        times_before: the block before which the first cycle adds the positions of frames; None for none.
        remat, unroll: see `stack`; a block is what is recomputed.
    """

    blocks: tuple[Mapping[str, Any], ...]
    times_before: int | None
    remat: str
    unroll: bool | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        conditions: Conditions,
        grid: Grid,
        times: jax.Array | None,
        first: jax.Array,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        unroll, remat = form_of_loop(self.unroll, self.remat, jax.default_backend())
        block = Block if remat == "none" else nn.remat(Block, prevent_cse=unroll, policy=REMAT_POLICIES[remat])
        for i, fields in enumerate(self.blocks):
            if i == self.times_before and times is not None:
                every = jnp.repeat(times, grid.rows * grid.columns, axis=0).astype(x.dtype)  # [N, D]
                x = jnp.where(first, x + every, x)
            x = block(**fields, name=f"window_{i}")(x, conditions, grid, None if keep is None else keep[i])
        return x, None


class Embedded(NamedTuple):
    """Inputs of the blocks.

    Fields:
        x: [B, N, D] tokens.
        conditions: what all blocks read.
        grid: the sizes of the tokens' grid.
    """

    x: jax.Array
    conditions: Conditions
    grid: Grid


class VideoDiT(TokenBlocks, nn.Module):
    """DiT for clips: (x_t [B, F, H, W, C], t f32[B], cond) -> f32[B, F, H, W, out_channels]; [B, H, W, C] is a clip of one frame.

    A `models.network.Network`. Block i has the window i modulo their number. cond has "label" int[B] with `num_classes`,
    "context" [B, M, context_width] and perhaps "context_mask" bool[B, M] with `context_width`, and what the fields below ask for.
    The parameters are stacks of depth / number of windows under `blocks/window_0`, `blocks/window_1`, .... control {"keep":
    bool[depth]} skips the blocks where it is False.

    An image passes the values in blocks whose window spans frames, if others do not: W.A.L.T's identity mask, and what attention
    to the one frame of Latte's is.

    Fields:
        patch_size, depth, width, heads, mlp_ratio, out_channels: as of `DiT`. A patch has one frame. The number of windows
            divides the depth.
        num_classes: number of labels; 0 takes none. Label num_classes is the null label.
        context_width: of the text encoder's output; 0 takes no text. Blocks whose window is inside of a frame attend to it, or
            all blocks if there are no such.
        windows: sides (frames, rows, columns) of the attention's windows in tokens, in turn over the blocks; 0, or more than the
            axis has, is the whole axis. ((1, 0, 0), (0, 1, 1)) is Latte, ((1, 16, 16), (0, 8, 8)) W.A.L.T, ((0, 0, 0),) full.
        modulation: "separate", of each block, or "lora": one for all, which each block changes by a product of this rank.
        rank: of "lora"; 0 leaves the blocks with the shared one.
        position: "sincos": of the patch at the start, of the frame before the first block that spans frames (Latte); or
            "learned": tables of both at the start (W.A.L.T).
        grid: (frames, rows, columns) of tokens, the most that learned tables and biases are for; None with neither.
        relative_bias: adds a learned bias by the offset of two tokens to the scores of self-attention.
        qk_norm: layer norm of queries and keys, per head.
        self_conditioning: takes an estimate of x0, cond["estimate"] like x_t; without one, zeros.
        known_frames: takes cond["known"] f32[B, F, H, W, C] and cond["known_mask"] f32[B, F, H, W, 1], 1 where an element is
            given.
        low_res_channels: of a clip of lower resolution, cond["low_res"] [B, f, h, w, low_res_channels], which is resized and
            joined with x_t; 0 takes none. cond["low_res_level"] f32[B], the time of the noise on it, goes into the modulation.
        low_res_frames: frame i of the lower resolution stands at frame i times this; 1 has as many frames.
        attention, remat, unroll, dtype, param_dtype: as of `DiT`.
    """

    patch_size: int
    depth: int
    width: int
    heads: int
    out_channels: int
    num_classes: int = 0
    context_width: int = 0
    windows: tuple[Window, ...] = LATTE
    modulation: str = "separate"
    rank: int = 2
    position: str = "sincos"
    grid: Window | None = None
    relative_bias: bool = False
    qk_norm: bool = False
    self_conditioning: bool = False
    known_frames: bool = False
    low_res_channels: int = 0
    low_res_frames: int = 1
    mlp_ratio: float = 4.0
    attention: str = "auto"
    remat: str = "auto"
    unroll: bool | None = None
    dtype: layers.Dtype = jnp.float32
    param_dtype: layers.Dtype = jnp.float32

    rules = RULES
    matrices = MATRICES
    published = _published()
    label_table = "label_embedding/embedding"
    mixes_labels = True
    takes_low_res_level = True
    remat_policies = CHOICES

    @property
    def size_unit(self) -> int | None:
        """Both sides of an input are multiples of it; None with tables, which are for one size."""
        return self.patch_size if self.position == "sincos" and not self.relative_bias else None

    def setup(self) -> None:
        self._check_fields()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear = {"kernel_init": layers.xavier_uniform, **dtypes}
        self.patch_embedding = nn.Dense(self.width, **linear)
        self.time_embedding = layers.TimeEmbedding(self.width, **dtypes)
        if self.num_classes:
            self.label_embedding = nn.Embed(self.num_classes + 1, self.width, embedding_init=layers.normal_002, **dtypes)
        if self.context_width:
            self.context_embedding = nn.Dense(self.width, **linear)
        if self.known_frames:
            self.known_embedding = nn.Dense(self.width, use_bias=False, kernel_init=layers.zeros, **dtypes)
        if self.low_res_channels:
            self.level_embedding = layers.TimeEmbedding(self.width, **dtypes)
        if self.modulation == "lora":
            self.shared_modulation = Modulation(6, **dtypes, name="modulation")
        if self.position == "learned":
            assert self.grid is not None
            frames, rows, columns = self.grid
            self.time_table = self.param("time_table", layers.normal_002, (frames, self.width), self.param_dtype)
            self.space_table = self.param("space_table", layers.normal_002, (rows * columns, self.width), self.param_dtype)
        axes = (nn.broadcast, nn.broadcast, nn.broadcast, 0, 0)
        cycle = stack(Cycle, self.depth // len(self.windows), axes, self.unroll, "none")
        self.blocks = cycle(self._blocks(), self._times_before(), self.remat, self.unroll)
        self.final = FinalLayer(self.patch_size**2 * self.out_channels, True, **dtypes)

    def _blocks(self) -> tuple[Mapping[str, Any], ...]:
        """The fields of the blocks of a cycle."""
        has_spatial = any(window[0] == 1 for window in self.windows)
        shared = {"heads": self.heads, "mlp_ratio": self.mlp_ratio, "attention": self.attention, "qk_norm": self.qk_norm}
        shared |= {"rank": self.rank if self.modulation == "lora" else None, "dtype": self.dtype, "param_dtype": self.param_dtype}

        def block(window: Window) -> Mapping[str, Any]:
            spatial = window[0] == 1 or not has_spatial
            bias = Grid(*self.grid).window(window) if self.relative_bias and self.grid else None
            own = {"crosses": bool(self.context_width) and spatial, "values_of_images": not spatial, "bias_window": bias}
            return {"window": tuple(window), **own, **shared}

        return tuple(map(block, self.windows))

    def _times_before(self) -> int | None:
        """The block of the first cycle before which sine-cosine positions of frames are added; None for none."""
        spanning = [i for i, window in enumerate(self.windows) if window[0] != 1]
        return spanning[0] if spanning and self.position == "sincos" else None

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Cond, control: Mapping[str, Any] | None = None) -> jax.Array:
        embedded = self.embed(x_t, t, cond)
        x = self.run_blocks(embedded, control)  # [B, N, D]
        return self.head(x, embedded, x_t.shape)  # [B, ..., out_channels]

    def embed(self, x_t: jax.Array, t: jax.Array, cond: Cond) -> Embedded:
        """Embeds patches, positions, time and conditions."""
        self.check(x_t.shape[1:])
        cond = cond or {}
        check_entries("cond", cond, self._entries(), type(self).__name__)
        grid, clip = self._grid(x_t.shape[1:]), x_t if x_t.ndim == 5 else x_t[:, None]
        parts = [clip]
        if self.self_conditioning:
            parts.append(self._like(cond, ESTIMATE, clip, clip.shape[-1]))
        if self.low_res_channels:
            parts.append(self._low(cond, clip))
        x = self.patch_embedding(self._patches(jnp.concatenate(parts, axis=-1)).astype(self.dtype))
        if self.known_frames and (KNOWN in cond or KNOWN_MASK in cond or self.is_initializing()):
            mask = self._like(cond, KNOWN_MASK, clip, 1)
            given = jnp.concatenate([mask * self._like(cond, KNOWN, clip, clip.shape[-1]), mask], axis=-1)
            x = x + self.known_embedding(self._patches(given).astype(self.dtype))
        x = (x + self._positions(grid)).astype(self.dtype)
        c = self.time_embedding(t)
        if self.num_classes:
            c = c + label_vectors(self.label_embedding, cond, len(x), self.num_classes)
        if self.low_res_channels:
            c = c + self.level_embedding(LEVEL_SCALE * cond.get(LEVEL, jnp.zeros(len(x))))
        modulation = self.shared_modulation(c) if self.modulation == "lora" else None
        text, bias = self._text(cond, len(x)) if self.context_width else (None, None)
        return Embedded(constrain_batch(x, tokens=True), Conditions(c, modulation, text, bias), grid)

    def run_blocks(self, embedded: Embedded, control: Mapping[str, Any] | None = None) -> jax.Array:
        """Runs all blocks; returns the tokens [B, N, D]."""
        keep, cycles = blocks_to_keep(control, self.depth, type(self).__name__), self.depth // len(self.windows)
        keep = None if keep is None else keep.reshape(cycles, -1)
        times = None
        if self._times_before() is not None:
            times = jnp.asarray(position.sincos_1d(self.width, np.arange(embedded.grid.frames)), jnp.float32)
        first = jnp.arange(cycles) == 0
        return self.blocks(embedded.x, embedded.conditions, embedded.grid, times, first, keep)[0]

    def head(self, x: jax.Array, embedded: Embedded, shape: Shape) -> jax.Array:
        """Maps tokens to f32[B, ..., out_channels], for an input of `shape`."""
        x = self.final(x.astype(self.dtype), embedded.conditions.c).astype(jnp.float32)
        x = x.reshape(len(x) * embedded.grid.frames, -1, x.shape[-1])
        return unpatchify(x, self.patch_size, *shape[-3:-1]).reshape(*shape[:-1], self.out_channels)

    def _entries(self) -> tuple[str, ...]:
        names: tuple[str, ...] = ("label", *MIXED) if self.num_classes else ()
        names += (CONTEXT, MASK) if self.context_width else ()
        names += (KNOWN, KNOWN_MASK) if self.known_frames else ()
        names += (ESTIMATE,) if self.self_conditioning else ()
        return names + ((LOW, LEVEL) if self.low_res_channels else ())

    def _like(self, cond: Cond, name: str, clip: jax.Array, channels: int) -> jax.Array:
        """An entry of the shape of the clip with these channels; zeros if it is absent."""
        shape = (*clip.shape[:-1], channels)
        if name not in cond:
            return jnp.zeros(shape, clip.dtype)
        x = cond[name]
        if x.shape not in (shape, (shape[0], *shape[2:])) or (x.ndim == 4 and shape[1] != 1):
            raise UserError(f'cond["{name}"] is {x.dtype}{list(x.shape)}; {list(shape)} is needed')
        return x.reshape(shape).astype(clip.dtype)

    def _low(self, cond: Cond, clip: jax.Array) -> jax.Array:
        """The clip of lower resolution at the size of x_t, linear between the centres of its elements."""
        if LOW not in cond and self.is_initializing():
            return jnp.zeros((*clip.shape[:-1], self.low_res_channels), clip.dtype)
        low = cond.get(LOW)
        low = low[:, None] if low is not None and low.ndim == 4 else low
        if low is None or low.ndim != 5 or len(low) != len(clip) or low.shape[-1] != self.low_res_channels:
            have = "missing" if low is None else f"{low.dtype}{list(cond[LOW].shape)}"
            raise UserError(
                f'cond["{LOW}"] is {have}; the clip of lower resolution is needed, [{len(clip)}, f, h, w, '
                f"{self.low_res_channels}] (model.low_res_channels = 0 is for a network that does not upsample)"
            )
        low = between_frames(low.astype(clip.dtype), clip.shape[1], self.low_res_frames)
        return jax.image.resize(low, (*clip.shape[:-1], self.low_res_channels), "linear")

    def _text(self, cond: Cond, batch: int) -> tuple[jax.Array, jax.Array | None]:
        context, mask = cond.get(CONTEXT), cond.get(MASK)
        if context is None or context.ndim != 3 or context.shape[0] != batch or context.shape[-1] != self.context_width:
            have = "missing" if context is None else f"{context.dtype}{list(context.shape)}"
            raise UserError(
                f'cond["{CONTEXT}"] is {have}; the text encoder\'s output [{batch}, tokens, {self.context_width}] is needed '
                "(model.context_width)"
            )
        if mask is not None and mask.shape != context.shape[:2]:
            raise UserError(f'cond["{MASK}"] is {list(mask.shape)}; {list(context.shape[:2])} is needed, as of the context')
        bias = None if mask is None else jnp.where(mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min / 2)[:, None, None]
        return constrain_batch(self.context_embedding(context.astype(self.dtype))), bias

    def _positions(self, grid: Grid) -> jax.Array:
        """[N, D] of learned tables, or [N, D] of the patches alone."""
        frames, rows, columns = grid.sides
        if self.position == "sincos":
            return jnp.asarray(np.tile(position.sincos_2d(self.width, rows, columns), (frames, 1)), self.dtype)
        assert self.grid is not None
        space = self.space_table.reshape(*self.grid[1:], -1)[:rows, :columns]
        table = self.time_table[:frames, None, None] + space
        return table.reshape(-1, self.width).astype(self.dtype)

    def _patches(self, clip: jax.Array) -> jax.Array:
        """[B, F, H, W, C] -> [B, N, p p C]."""
        frames = clip.reshape(-1, *clip.shape[2:])
        return patchify(frames, self.patch_size).reshape(len(clip), -1, self.patch_size**2 * clip.shape[-1])

    def _grid(self, latent_shape: Shape) -> Grid:
        *frames, height, width, _ = latent_shape
        return Grid(frames[0] if frames else 1, height // self.patch_size, width // self.patch_size)

    def check(self, latent_shape: Shape) -> None:
        """Raises a UserError if the fields do not fit one another or an input (h, w, c) or (f, h, w, c)."""
        self._check_fields()
        if len(latent_shape) not in (3, 4):
            raise UserError(f"the network's input is {' x '.join(map(str, latent_shape))}; VideoDiT takes images and clips")
        *_, height, width, _ = latent_shape
        check_sides(height, width, self.patch_size)
        grid = self._grid(latent_shape)
        if self.grid is not None and any(side > most for side, most in zip(grid.sides, self.grid, strict=True)):
            raise UserError(
                f"the network's input has {_by(grid.sides)} tokens (frames, rows, columns), more than model.grid = {self.grid}; "
                f"set model.grid to {grid.sides}, or take smaller clips"
            )
        for window in self.windows:
            own = grid.window(window)
            if any(side % part for side, part in zip(grid.sides, own, strict=True)):
                raise UserError(
                    f"a window of {_by(own)} tokens (model.windows has {tuple(window)}) does not divide the network's input of "
                    f"{_by(grid.sides)}; choose sides that divide it, or 0 for a whole axis"
                )

    def _check_fields(self) -> None:
        choices = (("attention", IMPLEMENTATIONS), ("remat", ("auto", *CHOICES)))
        for name, allowed in (*choices, ("position", POSITIONS), ("modulation", MODULATIONS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name, least in (
            ("patch_size", 1),
            ("depth", 1),
            ("width", 1),
            ("heads", 1),
            ("rank", 0),
            ("num_classes", 0),
            ("low_res_frames", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("context_width", "low_res_channels"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 0, for none")
        if self.mlp_ratio <= 0:
            raise UserError(f"model.mlp_ratio is {self.mlp_ratio}; it must be positive")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"model.width = {self.width} must be a multiple of model.heads = {self.heads} and of 4")
        if not self.windows or any(len(window) != 3 or min(window) < 0 for window in self.windows):
            raise UserError(
                f"model.windows is {self.windows}; it needs one or several (frames, rows, columns), as ((1, 0, 0), (0, 1, 1)); 0 "
                "is a whole axis"
            )
        if self.depth % len(self.windows):
            raise UserError(
                f"model.depth = {self.depth} is not a multiple of the {len(self.windows)} windows that its blocks have in turn"
            )
        if self.grid is not None and (len(self.grid) != 3 or min(self.grid) < 1):
            raise UserError(f"model.grid is {self.grid}; it must be (frames, rows, columns) of tokens, or None")
        if self.grid is None and (self.relative_bias or self.position == "learned"):
            raise UserError(
                "model.grid is not set, and learned positions and relative biases are for a largest grid; set it to (frames, "
                "rows, columns) of tokens"
            )

    def num_tokens(self, latent_shape: Shape) -> int:
        return math.prod(self._grid(latent_shape).sides)

    def macs(self, latent_shape: Shape, cond_shapes: Mapping[str, Shape] | None = None) -> int:
        """Multiply-adds of the matrix products, the text's included."""
        d, n, p, channels = self.width, self.num_tokens(latent_shape), self.patch_size, latent_shape[-1]
        grid, hidden = self._grid(latent_shape), int(self.width * self.mlp_ratio)
        m = (cond_shapes or {})[CONTEXT][0] if self.context_width else 0
        inputs = channels * (2 if self.self_conditioning else 1) + self.low_res_channels
        inputs += channels + 1 if self.known_frames else 0
        total = n * p * p * (inputs + self.out_channels) * d + m * self.context_width * d
        total += (256 * d + d * d) * (2 if self.low_res_channels else 1) + 2 * d * d
        lora = self.modulation == "lora"
        total += 6 * d * d if lora else 0
        for fields in self._blocks():
            length = math.prod(grid.window(fields["window"]))
            seen = 0 if fields["values_of_images"] and grid.frames == 1 else length
            block = n * (4 * d * d + 2 * d * hidden) + 2 * n * seen * d
            block += 7 * d * self.rank if lora else 6 * d * d
            if fields["crosses"]:
                block += 4 * n * d * d + 2 * m * d * d + 2 * n * (length + m) * d
            total += block * self.depth // len(self.windows)
        return total

    def describe(self) -> str:
        windows = ", ".join("x".join("all" if not side else str(side) for side in window) for window in self.windows)
        return (
            f"{type(self).__name__} depth {self.depth} width {self.width} heads {self.heads} patch {self.patch_size} "
            f"(windows {windows}; {jnp.dtype(self.dtype).name})"
        )

    def for_platform(self, platform: str) -> "VideoDiT":
        unroll, remat = form_of_loop(self.unroll, self.remat, platform)
        kernel = attention_kernel(self.attention, self.dtype, self.width // self.heads, platform)
        return self.clone(unroll=unroll, remat=remat, attention=kernel)


def _by(sides: Window) -> str:
    return " x ".join(map(str, sides))
