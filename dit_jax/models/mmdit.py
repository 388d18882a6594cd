"""MM-DiT, the network of Stable Diffusion 3, for images and clips: text and image inform each other in joint attention.

Source: Esser et al. 2024, arXiv 2403.03206.

B batch, [F x] H x W x C input, p patch side, N = F HW / p^2 tokens, M text tokens, D width, A heads, E = D / A features of each.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dit_jax.errors import UserError
from dit_jax.models import layers, position
from dit_jax.models.attention import IMPLEMENTATIONS, attention_kernel, dot_product_attention
from dit_jax.models.dit import FinalLayer, Modulation
from dit_jax.models.network import Cond, Shape, check_entries
from dit_jax.models.patches import check_sides, patchify, unpatchify
from dit_jax.models.products import dot_general
from dit_jax.models.published import Published
from dit_jax.models.rotary import FREQUENCIES, cannot_tell_neighbours, chosen, rope_angles, rotate
from dit_jax.models.stack import CHOICES, TokenBlocks, blocks_to_keep, form_of_loop, stack
from dit_jax.parallel.mesh import constrain_batch
from dit_jax.parallel.rules import Rules
from dit_jax.runtime.console import say

POSITIONS = ("table", "rope")
RULES: Rules = (
    (r"(context_)?(qkv|qkv_2)/kernel", ("fsdp", None, "tensor", None)),  # [D, 3, A, E]
    (r"(context_)?(qkv|qkv_2)/bias", (None, "tensor", None)),
    (r"(dual|blocks|last)/(context_)?(out|out_2)/kernel", ("tensor", None, "fsdp")),  # [A, E, D]
    (r"(context_)?mlp/in/kernel", ("fsdp", "tensor")),
    (r"(context_)?mlp/in/bias", ("tensor",)),
    (r"(context_)?mlp/out/kernel", ("tensor", "fsdp")),
    (r"(context_)?modulation/linear/kernel", ("fsdp", None, None)),  # never over tensor, see `dit.RULES`
    (r"(patch|context|known)_embedding/kernel", (None, "fsdp")),
    (r"(time|pooled)_embedding/(in|out)/kernel", (None, "fsdp")),
    (r"final/linear/kernel", ("fsdp", None)),
    (r"((context_)?(out|out_2)|linear|(patch|context)_embedding|(time|pooled)_embedding/in)/bias", ()),
    (r"norm_(query|key)(_2|_context)?/scale", ()),
)
MATRICES = {  # see `Network.matrices`
    r"(\w+)/(context_)?(qkv|qkv_2)/kernel": "isoo",
    r"(\w+)/(context_)?(out|out_2)/kernel": "iio",
    r"(\w+)/(context_)?mlp/(in|out)/kernel": "io",
    r"(\w+)/(context_)?modulation/linear/kernel": "iso",
}
CONTEXT, POOLED = "context", "pooled"  # entries of the condition
KNOWN, KNOWN_MASK, FPS = "known", "known_mask", "fps"


def _sd3(depth: int, qk_norm: bool, dual_blocks: int, table: int) -> Published:
    fields = {"patch_size": 2, "depth": depth, "width": 64 * depth, "heads": depth, "out_channels": 16}
    fields |= {"qk_norm": qk_norm, "dual_blocks": dual_blocks, "table_side": table}
    shapes = {CONTEXT: (333, 4096), POOLED: (2048,)}  # 77 tokens of CLIP and 256 of T5
    return Published(fields, (128, 128, 16), process="flow", cond_shapes=shapes)


PUBLISHED = {
    "SD3-medium@1024": _sd3(24, False, 0, 192),
    "SD3.5-medium@1024": _sd3(24, True, 13, 384),
    "SD3.5-large@1024": _sd3(38, True, 0, 192),
}


class HeadNorm(nn.Module):
    """RMSNorm over the width of a head, in float32: x / rms(x) * scale, epsilon 1e-6.  [B, N, A, E] -> the same, in x's dtype."""

    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + layers.NORM_EPSILON)
        return (y * scale).astype(x.dtype)


class JointBlock(nn.Module):
    """One joint block: two streams with weights of their own, and one attention over the tokens of both.

    Called with (x [B, N, D], context [B, M, D]), c [B, D], angles f32[N, E / 2] or [B, N, E / 2] of the rotary positions of x
    (None for none; text has none), and `keep`, a boolean scalar (False returns its input; None means True). Returns
    ((x, context), None), as `nn.scan` requires.

    Fields:
        dual: a second self-attention over x alone, before the MLP (Stable Diffusion 3.5 medium).
        last: the context is only read: it has no output projection, MLP or gates.

    Source: Esser et al. 2024, figure 2; the order of the vectors is that of Stability's code.
    """

    heads: int
    mlp_ratio: float
    qk_norm: bool
    dual: bool
    last: bool
    attention: str
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(
        self, streams: tuple[jax.Array, jax.Array], c: jax.Array, angles: jax.Array | None, keep: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, context = streams
        tokens, dtypes = context.shape[1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        vectors = Modulation(9 if self.dual else 6, **dtypes, name="modulation")(c)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2, *more = (vectors[:, i] for i in range(vectors.shape[1]))
        own = Modulation(2 if self.last else 6, **dtypes, name="context_modulation")(c)

        normed = layers.normalize(x)
        q, k, v = self._qkv(layers.modulate(normed, shift_1, scale_1), "qkv", "")
        modulated = layers.modulate(layers.normalize(context), own[:, 0], own[:, 1])
        q_c, k_c, v_c = self._qkv(modulated, "context_qkv", "_context")
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in ((q_c, q), (k_c, k), (v_c, v)))
        y = checkpoint_name(dot_product_attention(q, k, v, self._kernel(x)), "attention")
        new = x + gate_1[:, None] * self._out(y[:, tokens:], "out")
        if self.dual:
            shift_3, scale_3, gate_3 = more
            q, k, v = self._qkv(layers.modulate(normed, shift_3, scale_3), "qkv_2", "_2")
            if angles is not None:
                q, k = rotate(q, angles), rotate(k, angles)
            y_2 = checkpoint_name(dot_product_attention(q, k, v, self._kernel(x)), "attention")
            new = new + gate_3[:, None] * self._out(y_2, "out_2")
        new = new + gate_2[:, None] * self._mlp(layers.modulate(layers.normalize(new), shift_2, scale_2), "mlp")
        other = context
        if not self.last:
            other = context + own[:, 2][:, None] * self._out(y[:, :tokens], "context_out")
            modulated = layers.modulate(layers.normalize(other), own[:, 3], own[:, 4])
            other = other + own[:, 5][:, None] * self._mlp(modulated, "context_mlp")
        new, other = new.astype(self.dtype), other.astype(self.dtype)
        if keep is not None:
            new, other = jnp.where(keep, new, x), jnp.where(keep, other, context)
        return (constrain_batch(new, tokens=True), constrain_batch(other)), None

    def _kernel(self, x: jax.Array) -> str:
        return attention_kernel(self.attention, self.dtype, x.shape[-1] // self.heads)

    def _qkv(self, x: jax.Array, name: str, ending: str) -> list[jax.Array]:
        apart = self._kernel(x) == "cudnn"
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        q, k, v = layers.Projections(3, self.heads, apart, **dtypes, name=name)(x.astype(self.dtype))
        if self.qk_norm:
            q, k = (HeadNorm(self.param_dtype, name=f"norm_{what}{ending}")(y) for what, y in (("query", q), ("key", k)))
        return [q, k, v]

    def _out(self, y: jax.Array, name: str) -> jax.Array:
        width, init = y.shape[-2] * y.shape[-1], layers.xavier_uniform
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype, "dot_general": dot_general}
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, **dtypes, name=name)
        return checkpoint_name(out(y), "attention_out")

    def _mlp(self, x: jax.Array, name: str) -> jax.Array:
        hidden = int(x.shape[-1] * self.mlp_ratio)
        return layers.MLP(hidden, dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x.astype(self.dtype))


class VectorEmbedding(nn.Module):
    """Linear, SiLU, linear of a vector: [B, P] -> [B, D]; both kernels start as normal(0.02)."""

    width: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(name: str) -> nn.Dense:
            init = layers.normal_002
            return nn.Dense(self.width, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        return linear("out")(nn.silu(linear("in")(x.astype(self.dtype))))


class Embedded(NamedTuple):
    """Inputs of the blocks.

    Fields:
        x: [B, N, D] tokens of the image or clip.
        context: [B, M, D] tokens of the text.
        c: [B, D] time and pooled text.
        angles: f32[N, E / 2] of rotary positions, or [B, N, E / 2] where clips have frame rates; None with a table.
    """

    x: jax.Array
    context: jax.Array
    c: jax.Array
    angles: jax.Array | np.ndarray | None


class MMDiT(TokenBlocks, nn.Module):
    """MM-DiT: (x_t [B, H, W, C] or [B, F, H, W, C], t f32[B], cond) -> f32[..., out_channels], for the condition
    {"context": [B, M, context_width], "pooled": [B, pooled_width]}, and optionally {"known": f32[B, F, H, W, C], "known_mask":
    f32[B, F, H, W, 1]}, the given part of a clip and 1 where it is given, and {"fps": f32[B]}, frames per second.

    A `models.network.Network`. An image is a clip of one frame: both give the same numbers. The
    blocks' parameters are stacks: `dual_blocks` of the first blocks, if there are some, then `blocks`, then `last_block` alone,
    whose text stream ends. control {"keep": bool[depth]} skips the blocks where it is False (skip-layer guidance).

    Fields:
        patch_size: side p of a patch, in latents or pixels; a clip has patches of one frame.
        depth: number of blocks.
        width: features of a token.
        heads: attention heads; divides the width.
        context_width, pooled_width: of the text encoders' outputs; 4096 and 2048 in Stable Diffusion 3. 0 for no pooled text.
        out_channels: C for a flow.
        qk_norm: RMSNorm of queries and keys, per head.
        dual_blocks: number of blocks, from the first, with a second self-attention over the image.
        position: "table", sine-cosine of a grid, added to the patches (images only), or "rope", rotary positions of
            (frame, row, column).
        table_side, table_base: the table is the centre of one with table_side x table_side entries, whose positions are
            table_base / table_side apart; None is the input's own grid in whole steps.
        rope_widths: features of a head for frame, row and column; None for about an eighth and twice seven sixteenths.
        rope_frequencies: how far the pairs turn from a token to the next, see `rotary.FREQUENCIES`. "auto" chooses for each axis
            by the grid: quarter and half turns in turn for up to 4 tokens, from a quarter turn to one over the axis for up to 32,
            and the published ones, geometric with period 10,000, for more.
        rope_grid: (frames, rows, columns) of tokens that frequencies are chosen for, so that inputs of other sizes have the same;
            None is that of training.
        base_fps: a frame's position is its number times base_fps over the condition's fps; without fps, its number.
        known_frames: takes the given part of a clip: a zero-initialised embedding of (known x mask, mask) is added to the
            patches. Source: Open-Sora 2 (arXiv 2503.09642), section 3.2.
        mlp_ratio: width of the MLP's hidden layer over the network's.
        attention, remat, unroll: as of `DiT`.
        dtype: of activations and matrix products; norms, softmax, rotations and the output are float32.
        param_dtype: of the parameters.
    """

    patch_size: int
    depth: int
    width: int
    heads: int
    out_channels: int
    context_width: int = 4096
    pooled_width: int = 2048
    qk_norm: bool = False
    dual_blocks: int = 0
    position: str = "table"
    table_side: int | None = None
    table_base: int = 64
    rope_widths: tuple[int, int, int] | None = None
    rope_frequencies: str = "auto"
    rope_grid: tuple[int, int, int] | None = None
    base_fps: float = 24.0
    known_frames: bool = False
    mlp_ratio: float = 4.0
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
        linear = {"kernel_init": layers.xavier_uniform, **dtypes}
        self.patch_embedding, self.context_embedding = (nn.Dense(self.width, **linear) for _ in range(2))
        if self.known_frames:
            self.known_embedding = nn.Dense(self.width, use_bias=False, kernel_init=nn.initializers.zeros, **dtypes)
        self.time_embedding = layers.TimeEmbedding(self.width, **dtypes)
        if self.pooled_width:
            self.pooled_embedding = VectorEmbedding(self.width, **dtypes)

        def blocks(count: int, dual: bool, last: bool = False) -> nn.Module:
            axes = (nn.broadcast, nn.broadcast, 0)
            fields = self.heads, self.mlp_ratio, self.qk_norm, dual, last, self.attention
            return stack(JointBlock, count, axes, self.unroll, self.remat)(*fields, **dtypes)

        if self.dual_blocks:
            self.dual = blocks(self.dual_blocks, True)
        if self.depth - 1 > self.dual_blocks:
            self.blocks = blocks(self.depth - 1 - self.dual_blocks, False)
        self.last = blocks(1, False, last=True)
        self.final = FinalLayer(self.patch_size**2 * self.out_channels, True, **dtypes)

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Cond, control: Mapping[str, Any] | None = None) -> jax.Array:
        embedded = self.embed(x_t, t, cond)
        x = self.run_blocks(embedded, control)  # [B, N, D]
        return self.head(x, embedded, x_t.shape)  # [B, ..., out_channels]

    def embed(self, x_t: jax.Array, t: jax.Array, cond: Cond) -> Embedded:
        """Embeds patches, positions, text and time."""
        self.check(x_t.shape[1:])
        check_entries("cond", cond, self._entries(), type(self).__name__)
        self._check_text(cond, len(x_t))
        x = self.patch_embedding(self._patches(x_t).astype(self.dtype))  # [B, N, D]
        if self.known_frames:
            x = self._with_known(x, x_t.shape, cond)
        grid = self._grid(x_t.shape[1:])
        angles = None
        if self.position == "table":
            x = x + self._table(*grid[1:]).astype(self.dtype)
        else:
            angles = self._angles(grid, cond.get(FPS))
        c = self.time_embedding(t)
        if self.pooled_width:
            c = c + self.pooled_embedding(cond[POOLED])
        context = self.context_embedding(cond[CONTEXT].astype(self.dtype))
        return Embedded(constrain_batch(x, tokens=True), constrain_batch(context), c, angles)

    def run_blocks(self, embedded: Embedded, control: Mapping[str, Any] | None = None) -> jax.Array:
        """Runs all blocks; returns the tokens of the image or clip [B, N, D]."""
        keep = blocks_to_keep(control, self.depth, type(self).__name__)
        streams, n = (embedded.x, embedded.context), self.dual_blocks

        def part(start: int, end: int) -> Any:
            return None if keep is None else keep[start:end]

        if n:
            streams, _ = self.dual(streams, embedded.c, embedded.angles, part(0, n))
        if self.depth - 1 > n:
            streams, _ = self.blocks(streams, embedded.c, embedded.angles, part(n, self.depth - 1))
        streams, _ = self.last(streams, embedded.c, embedded.angles, part(self.depth - 1, self.depth))
        return streams[0]

    def head(self, x: jax.Array, embedded: Embedded, shape: Shape) -> jax.Array:
        """Maps tokens to f32[B, ..., out_channels], for an input of `shape`."""
        x = self.final(x.astype(self.dtype), embedded.c).astype(jnp.float32)
        *_, height, width, _ = shape
        if len(shape) == 5:
            frames = shape[1]
            x = x.reshape(len(x) * frames, -1, x.shape[-1])
            return unpatchify(x, self.patch_size, height, width).reshape(*shape[:-1], self.out_channels)
        return unpatchify(x, self.patch_size, height, width)

    def _entries(self) -> tuple[str, ...]:
        """The entries of a condition that the network takes."""
        optional = {POOLED: self.pooled_width, KNOWN: self.known_frames, KNOWN_MASK: self.known_frames}
        return (CONTEXT, *(name for name, on in (optional | {FPS: self.position == "rope"}).items() if on))

    def _with_known(self, x: jax.Array, shape: Shape, cond: Cond) -> jax.Array:
        """The tokens [B, N, D] plus the embedding of the given part; the same tokens where nothing is given."""
        if not cond.keys() & {KNOWN, KNOWN_MASK}:
            if self.is_initializing():
                self.known_embedding(jnp.zeros((1, self.patch_size**2 * (shape[-1] + 1)), self.dtype))
            return x
        known, mask = (self._given(cond, name, (*shape[:-1], width)) for name, width in ((KNOWN, shape[-1]), (KNOWN_MASK, 1)))
        given = jnp.concatenate([known * mask, mask], axis=-1)
        return x + self.known_embedding(self._patches(given).astype(self.dtype))

    def _given(self, cond: Cond, name: str, shape: Shape) -> jax.Array:
        x = cond.get(name)
        if x is None or x.shape != shape:
            have = "missing" if x is None else f"{x.dtype}{list(x.shape)}"
            raise UserError(f'cond["{name}"] is {have}; {list(shape)} is needed, the size of the input')
        return x

    def _angles(self, grid: tuple[int, int, int], fps: jax.Array | None) -> jax.Array | np.ndarray:
        """f32[N, E / 2] of the rotary positions of a grid of tokens, or [B, N, E / 2] for frames per second [B]."""
        axes = tuple(axis.reshape(-1) for axis in np.meshgrid(*map(np.arange, grid), indexing="ij"))
        widths, names = self._rope_widths(), self._frequencies(grid)
        lengths = self.rope_grid or grid
        angles = rope_angles(axes, widths, names, lengths)
        if fps is None:
            return angles
        if fps.ndim != 1:
            raise UserError(
                f'cond["fps"] is {fps.dtype}{list(fps.shape)}; one number of frames per second for each clip is needed'
            )
        scale = (self.base_fps / fps.astype(jnp.float32))[:, None, None]  # [B, 1, 1]
        of_frames = widths[0] // 2
        rest = jnp.broadcast_to(angles[:, of_frames:], (len(fps), *angles[:, of_frames:].shape))
        return jnp.concatenate([angles[:, :of_frames] * scale, rest], axis=-1)

    def _frequencies(self, grid: tuple[int, int, int]) -> tuple[str, ...]:
        """The name of each axis's frequencies."""
        lengths = self.rope_grid or grid
        return tuple(chosen(self.rope_frequencies, n, width) for n, width in zip(lengths, self._rope_widths(), strict=True))

    def for_input(self, latent_shape: Shape) -> "MMDiT":
        """The network with its frequencies fixed for inputs of this size. Warns where they cannot tell neighbours apart."""
        if self.position != "rope":
            return self
        grid = self.rope_grid or self._grid(latent_shape)
        for axis, n, width, name in zip(
            ("frames", "rows", "columns"), grid, self._rope_widths(), self._frequencies(grid), strict=True
        ):
            if cannot_tell_neighbours(name, n, width):
                say(
                    f"warning: model.rope_frequencies is {self.rope_frequencies!r}, and over {n} {axis} of tokens most pairs "
                    "turn so little that attention cannot tell neighbours apart; 'auto' chooses frequencies by the grid"
                )
        return self.clone(rope_grid=tuple(grid))

    def _patches(self, x: jax.Array) -> jax.Array:
        """[B, N, p p C] of an image or clip."""
        frames = x.reshape(-1, *x.shape[-3:])
        return patchify(frames, self.patch_size).reshape(len(x), -1, self.patch_size**2 * x.shape[-1])

    def _grid(self, latent_shape: Shape) -> tuple[int, int, int]:
        """(frames, rows, columns) of tokens."""
        *frames, height, width, _ = latent_shape
        return (frames[0] if frames else 1, height // self.patch_size, width // self.patch_size)

    def _table(self, rows: int, columns: int) -> np.ndarray:
        """[rows columns, D]: the centre of the table of positions."""
        if self.table_side is None:
            return position.sincos_2d(self.width, rows, columns)
        top, left = (self.table_side - rows) // 2, (self.table_side - columns) // 2
        step = self.table_base / self.table_side
        y, x = np.meshgrid((top + np.arange(rows)) * step, (left + np.arange(columns)) * step, indexing="ij")
        halves = [position.sincos_1d(self.width // 2, axis.reshape(-1)) for axis in (x, y)]
        return np.concatenate(halves, axis=1).astype(np.float32)

    def _rope_widths(self) -> tuple[int, int, int]:
        if self.rope_widths is not None:
            first, second, third = self.rope_widths
            return first, second, third
        width = self.width // self.heads
        space = 2 * (7 * width // 32)
        return width - 2 * space, space, space

    def _check_text(self, cond: Cond, batch: int) -> None:
        shapes = {CONTEXT: (self.context_width, 3), POOLED: (self.pooled_width, 2)}
        for name, (width, rank) in shapes.items():
            if name == POOLED and not self.pooled_width:
                continue
            x = cond.get(name)
            if x is None or x.ndim != rank or x.shape[0] != batch or x.shape[-1] != width:
                have = "missing" if x is None else f"{x.dtype}{list(x.shape)}"
                form = f"[{batch}, tokens, {width}]" if rank == 3 else f"[{batch}, {width}]"
                raise UserError(f'cond["{name}"] is {have}; the text encoders\' output {form} is needed (model.{name}_width)')

    def check(self, latent_shape: Shape) -> None:
        """Raises a UserError if the fields do not fit one another or an input (h, w, c) or (f, h, w, c)."""
        self._check_fields()
        if len(latent_shape) not in (3, 4):
            raise UserError(f"the network's input is {' x '.join(map(str, latent_shape))}; MMDiT takes images and clips")
        if len(latent_shape) == 4 and self.position == "table":
            raise UserError("model.position is 'table', which is for images; set it to 'rope' for clips")
        *_, height, width, _ = latent_shape
        check_sides(height, width, self.patch_size)
        longest = max(height, width) // self.patch_size
        if self.position == "table" and self.table_side is not None and longest > self.table_side:
            raise UserError(
                f"the network's input has {longest} patches on a side, more than model.table_side = {self.table_side}; take a "
                "smaller resolution"
            )

    def _check_fields(self) -> None:
        for name, allowed in (
            ("position", POSITIONS),
            ("rope_frequencies", ("auto", *FREQUENCIES)),
            ("attention", IMPLEMENTATIONS),
            ("remat", ("auto", *CHOICES)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("patch_size", "depth", "width", "heads", "context_width", "table_base"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.base_fps < math.inf:
            raise UserError(f"model.base_fps is {self.base_fps}; it must be positive")
        if self.rope_grid is not None and (len(self.rope_grid) != 3 or min(self.rope_grid) < 1):
            raise UserError(f"model.rope_grid is {self.rope_grid}; (frames, rows, columns) of tokens, each at least 1, is needed")
        if self.pooled_width < 0 or self.mlp_ratio <= 0:
            raise UserError(
                f"model.pooled_width is {self.pooled_width} and model.mlp_ratio {self.mlp_ratio}; they must be at least 0 and "
                "positive"
            )
        if not 0 <= self.dual_blocks < self.depth:
            raise UserError(f"model.dual_blocks is {self.dual_blocks}; it must lie in 0 to depth - 1 = {self.depth - 1}")
        if self.width % self.heads:
            raise UserError(f"model.heads = {self.heads} does not divide model.width = {self.width}")
        if self.width % 4:
            raise UserError(f"model.width = {self.width} is not a multiple of 4, which the position table needs")
        if self.position == "rope":
            widths, head = self._rope_widths(), self.width // self.heads
            if len(widths) != 3 or any(width % 2 or width < 0 for width in widths) or sum(widths) != head:
                raise UserError(
                    f"model.rope_widths is {widths}; three even numbers with the sum {head} (the width of a head) are needed"
                )

    def num_tokens(self, latent_shape: Shape) -> int:
        return math.prod(self._grid(latent_shape))

    def macs(self, latent_shape: Shape, cond_shapes: Mapping[str, Shape]) -> int:
        """Multiply-adds of the matrix products, the text's included."""
        d, n, m, p = self.width, self.num_tokens(latent_shape), cond_shapes[CONTEXT][0], self.patch_size
        hidden = int(d * self.mlp_ratio)
        stream = 4 * d * d + 2 * d * hidden  # of a token: q, k, v, out and the MLP
        total = n * p * p * latent_shape[-1] * d + m * self.context_width * d + 256 * d + d * d
        total += (self.pooled_width * d + d * d) if self.pooled_width else 0
        total += n * p * p * (latent_shape[-1] + 1) * d if self.known_frames else 0
        total += self.depth * n * stream + (self.depth - 1) * m * stream + m * 3 * d * d
        total += self.depth * 2 * (n + m) * n * d + (self.depth - 1) * 2 * (n + m) * m * d  # the last block needs no text
        total += 2 * (n + m) * m * d  # but computes it
        total += self.depth * 6 * d * d + (self.depth - 1) * 6 * d * d + 2 * d * d  # modulation
        total += self.dual_blocks * (n * 4 * d * d + 2 * n * n * d + 3 * d * d)
        return total + 2 * d * d + n * d * p * p * self.out_channels

    def describe(self) -> str:
        return (
            f"{type(self).__name__} depth {self.depth} width {self.width} heads {self.heads} patch {self.patch_size} "
            f"({self.position}, {jnp.dtype(self.dtype).name})"
        )

    def for_platform(self, platform: str) -> "MMDiT":
        unroll, remat = form_of_loop(self.unroll, self.remat, platform)
        kernel = attention_kernel(self.attention, self.dtype, self.width // self.heads, platform)
        return self.clone(unroll=unroll, remat=remat, attention=kernel)
