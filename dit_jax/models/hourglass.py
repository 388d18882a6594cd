"""The Hourglass Diffusion Transformer (HDiT) of Crowson et al. 2024 (arXiv 2401.11605), in the form of k-diffusion's code.

B batch, h x w grid of tokens, C channels, D width of a level, F = 3 D, H heads of width E, M width of the mapping network.
No layer has a bias.
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
from dit_jax.models import layers
from dit_jax.models.attention import IMPLEMENTATIONS, attention_kernel, dot_product_attention
from dit_jax.models.local_attention import neighborhood_attention, window_attention
from dit_jax.models.network import Cond, Shape, check_entries, label_vectors
from dit_jax.models.patches import patchify, unpatchify
from dit_jax.models.products import dot_general
from dit_jax.models.published import Fid, Published
from dit_jax.models.stack import CHOICES, STORES_NOTHING_INSIDE, form_of_loop, savings, stack
from dit_jax.parallel.mesh import constrain_batch
from dit_jax.parallel.rules import Rules

LEVEL = r"(down_\d+|middle|up_\d+)"
RULES: Rules = (  # a spec covers the trailing dimensions; the layers of a level are one stack
    (r"attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # [D, 3, H, E]
    (r"attention/out/kernel", ("tensor", None, "fsdp")),  # [H, E, D]
    (r"attention/scale", ()),
    (r"mlp/in/kernel", ("fsdp", None, "tensor")),  # [D, 2, F]
    (r"mlp/out/kernel", ("tensor", "fsdp")),  # [F, D]
    (rf"{LEVEL}/(attention|mlp)_norm/kernel", (None, "fsdp")),  # [M, D]; never over tensor, see DiT's modulation
    (r"(patch_in|time_embedding|augmentation_embedding)/kernel", (None, "fsdp")),
    (r"(time|augmentation)_fourier/constant", ()),
    (r"label_embedding/embedding", (None, "fsdp")),
    (r"mapping/block_\d+/in/kernel", (None, None, "fsdp")),  # [M, 2, 3 M]
    (r"mapping/block_\d+/out/kernel", (None, "fsdp")),
    (r"(merge|split)_\d+/kernel", (None, "fsdp")),
    (r"split_\d+/share", ()),
    (r"patch_out/kernel", ("fsdp", None)),
    (r"(norm|norm_in|norm_out|out_norm)/scale", ()),
)
MATRICES = {  # see `Network.matrices`
    rf"{LEVEL}/attention/qkv/kernel": "isoo",
    rf"{LEVEL}/attention/out/kernel": "iio",
    rf"{LEVEL}/mlp/in/kernel": "iso",
    rf"{LEVEL}/mlp/out/kernel": "io",
    rf"{LEVEL}/(attention|mlp)_norm/kernel": "io",
    r"mapping/block_\d+/in/kernel": "iso",
    r"mapping/block_\d+/out/kernel": "io",
    r"(merge|split)_\d+/kernel": "io",
}
# `optimizer.groups` of k-diffusion (`param_groups`). The mapping network and the layers that modulate norms have a third of the
# rate. Matrices decay; scales, the label table and the layers behind Fourier features do not.
GROUPS = (
    (rf"{LEVEL}/(attention|mlp)_norm/kernel", 1 / 3, None),
    (r"mapping/.*kernel", 1 / 3, None),
    (r"mapping/.*scale", 1 / 3, 0.0),
    (r"(out_norm/scale|attention/scale|share|(time|augmentation)_embedding/kernel|label_embedding/embedding)", 1.0, 0.0),
)
ATTENTIONS = ("neighborhood", "shifted_window", "global")
# Activations inside a layer that its gradient reads, in units of [B, h, w, D]: qkv, attention, and both halves of the MLP.
STORED_INSIDE = 10
EPSILON = 1e-6  # of norms, and of the squared length of queries and keys
# Turns of a Fourier feature of frequency 1 over all times. With more, neighbouring times are unrelated; with fewer, all alike.
SMALLEST_TURNS, MOST_TURNS = 0.05, 20.0
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(-1, 1) / sqrt(inputs), as PyTorch's Linear

_SOURCE = "Crowson et al. 2024 (arXiv 2401.11605)"


def _published(widths: tuple[int, ...], depths: tuple[int, ...], fids: tuple[Fid, ...] = ()) -> Published:
    fields = {"patch_size": 4, "widths": widths, "depths": depths, "num_classes": 1000, "out_channels": 3}
    return Published(fields, (256, 256, 3), fids, "edm")


PUBLISHED = {
    "HDiT-S@256": _published((256, 512, 1024), (2, 2, 8)),
    "HDiT-M@256": _published((320, 640, 1280), (2, 2, 12)),
    "HDiT-L@256": _published(
        (384, 768, 1536), (2, 2, 16), (Fid(6.92, "no guidance", _SOURCE), Fid(3.21, "classifier-free guidance", _SOURCE))
    ),
}


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x scale / rms(x) over the last axis in float32, epsilon 1e-6.  [..., D] -> [..., D] float32."""
    x = x.astype(jnp.float32)
    return x * (scale.astype(jnp.float32) * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON))


class RMSNorm(nn.Module):
    """`rms_norm` with a trained scale, in the dtype of x."""

    param_dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)).astype(x.dtype)


class Fourier(nn.Module):
    """[cos(2 pi v W), sin(2 pi v W)] of v [B, k] with W [k, width / 2], f32[B, width].

    W is drawn from N(0, 1) at the start. It is a parameter named `constant`: saved with the others, never trained
    (`tasks.state.CONSTANT`).
    """

    width: int
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, v: jax.Array) -> jax.Array:
        w = self.param("constant", nn.initializers.normal(1.0), (v.shape[-1], self.width // 2), self.param_dtype)
        w = jax.lax.stop_gradient(w).astype(jnp.float32)
        angles = 2 * jnp.pi * jnp.matmul(v.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def geglu(values_and_gates: jax.Array) -> jax.Array:
    """value * gelu(gate) with the exact GELU.  [..., 2, F] -> [..., F].  Source: Shazeer 2020, equation 6."""
    value, gate = values_and_gates[..., 0, :], values_and_gates[..., 1, :]
    return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """Linear to (values, gates), GEGLU, zero-initialized linear.  [..., D] -> [..., D]."""

    hidden_width: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype, "dot_general": dot_general}
        into = nn.DenseGeneral((2, self.hidden_width), kernel_init=torch_uniform, **linear, name="in")
        hidden = geglu(checkpoint_name(into(x), "mlp_in"))
        return checkpoint_name(nn.Dense(x.shape[-1], kernel_init=layers.zeros, **linear, name="out")(hidden), "mlp_out")


class MappingBlock(nn.Module):
    """x + FF(RMSNorm(x)) of the condition [B, M]."""

    hidden_width: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        y = RMSNorm(self.param_dtype, name="norm")(x)
        hidden = geglu(nn.DenseGeneral((2, self.hidden_width), kernel_init=torch_uniform, **linear, name="in")(y))
        return x + nn.Dense(x.shape[-1], kernel_init=layers.zeros, **linear, name="out")(hidden)


class MappingNetwork(nn.Module):
    """The mapping network: RMSNorm, `depth` blocks, RMSNorm.  [B, M] -> [B, M]."""

    depth: int
    hidden_width: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = RMSNorm(self.param_dtype, name="norm_in")(x)
        for i in range(self.depth):
            x = MappingBlock(self.hidden_width, self.dtype, self.param_dtype, name=f"block_{i}")(x)
        return RMSNorm(self.param_dtype, name="norm_out")(x)


class AdaRMSNorm(nn.Module):
    """x (1 + c W) / rms(x) with W zero at the start.  x [B, h, w, D], c [B, M] -> [B, h, w, D] in `dtype`."""

    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        kernel = self.param("kernel", layers.zeros, (c.shape[-1], x.shape[-1]), self.param_dtype)
        c, kernel = nn.dtypes.promote_dtype(c, kernel, dtype=self.dtype)
        scale = constrain_batch(c @ kernel)  # replicated over fsdp and tensor, see DiT's modulation
        return rms_norm(x, 1 + scale.astype(jnp.float32)[:, None, None]).astype(self.dtype)


def cosine_similarity(q: jax.Array, k: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(q, k) in float32 with length sqrt(scale): their products are scale times the cosine of the angle between them.

    Args:
        q, k: [..., H, E].
        scale: [H].
    """
    root = jnp.sqrt(scale.astype(jnp.float32))[:, None]

    def scaled(x):
        x = x.astype(jnp.float32)
        return x * (root * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + EPSILON))

    return scaled(q), scaled(k)


def cell_centers(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """The centres of h rows and w columns of cells in a box whose longer side is [-1, 1]; (f64[h], f64[w]).

    The centre of a merged cell is the mean of those of its four parts, so each level computes its own.
    """

    def centers(n, half):
        return half * (2 * np.arange(n) + 1 - n) / n

    return centers(h, min(1.0, h / w)), centers(w, min(1.0, w / h))


def rope_frequencies(heads: int, head_width: int) -> np.ndarray:
    """f64[H, E / 8]: H E / 8 numbers spaced evenly in their logarithm from pi to below 10 pi; head j has j, j + H, j + 2 H, ..

    Source: Crowson et al. 2024, section 4.3, and k-diffusion's `AxialRoPE`.
    """
    count = head_width // 8
    return np.exp(np.linspace(np.log(np.pi), np.log(10 * np.pi), heads * count + 1)[:-1]).reshape(count, heads).T


def axial_rope(h: int, w: int, heads: int, head_width: int) -> jax.Array:
    """Angles f32[h, w, H, E / 4] of axial rotary positions: an eighth of E turns with the row, then an eighth with the column."""
    count, frequencies = head_width // 8, rope_frequencies(heads, head_width)
    rows, columns = (jnp.asarray(center[:, None, None] * frequencies, jnp.float32) for center in cell_centers(h, w))
    shape = (h, w, heads, count)
    return jnp.concatenate([jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)], axis=-1)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (x_i, x_(i + E/4)) of the first half of E by angles [h, w, H, E / 4].  x f32[B, h, w, H, E]."""
    pairs = angles.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class Kind(NamedTuple):
    """The attention of a level.

    Fields:
        name: one of ATTENTIONS.
        size: side of a neighbourhood or a window; 0 for global attention.
        kernel: of global attention, see `attention.attention_kernel`.
    """

    name: str
    size: int
    kernel: str

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, shift: jax.Array) -> jax.Array:
        """softmax(q k^T) v of [B, h, w, H, E]."""
        if self.name == "neighborhood":
            return neighborhood_attention(q, k, v, self.size)
        if self.name == "shifted_window":
            return window_attention(q, k, v, self.size, shift)
        b, h, w, heads, width = q.shape
        q, k, v = (x.reshape(b, h * w, heads, width) for x in (q, k, v))
        return dot_product_attention(q, k, v, self.kernel, scale=1.0).reshape(b, h, w, heads, width)

    def keys(self, tokens: int) -> int:
        """Keys of a query."""
        return self.size**2 or tokens


class Attention(nn.Module):
    """Multi-head attention by cosine similarity with axial rotary positions.  [B, h, w, D] -> [B, h, w, D].

    Source: Crowson et al. 2024, section 4.3.
    """

    heads: int
    kind: Kind
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array) -> jax.Array:
        linear = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype, "dot_general": dot_general}
        _, h, w, width = x.shape
        head_width = width // self.heads
        into = nn.DenseGeneral((3, self.heads, head_width), kernel_init=torch_uniform, **linear, name="qkv")
        qkv = checkpoint_name(into(x), "qkv")
        scale = self.param("scale", nn.initializers.constant(10.0), (self.heads,), self.param_dtype)
        q, k = cosine_similarity(qkv[..., 0, :, :], qkv[..., 1, :, :], scale)
        angles = axial_rope(h, w, self.heads, head_width)
        q, k = (rotate(part, angles).astype(self.dtype) for part in (q, k))
        y = checkpoint_name(self.kind(q, k, qkv[..., 2, :, :], shift), "attention")
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=layers.zeros, **linear, name="out")
        return checkpoint_name(out(y), "attention_out")


class Layer(nn.Module):
    """x + attention(AdaRMSNorm(x, c)), then x + FF(AdaRMSNorm(x, c)).

    Called with x [B, h, w, D], the condition c [B, M] and the shift of windows; returns (x, None), as `nn.scan` requires.
    """

    heads: int
    hidden_width: int
    kind: Kind
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, shift: jax.Array) -> tuple[jax.Array, None]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normed = AdaRMSNorm(**dtypes, name="attention_norm")(x, c)
        x = x + Attention(self.heads, self.kind, **dtypes, name="attention")(normed, shift)
        normed = AdaRMSNorm(**dtypes, name="mlp_norm")(x, c)
        x = x + FeedForward(self.hidden_width, **dtypes, name="mlp")(normed)
        return constrain_batch(x, tokens=True), None


class TokenSplit(nn.Module):
    """Splits each token in 2 x 2 and mixes them with the skip: skip + share (x - skip), with share 1/2 at the start.

    The paper's equation 2 has the two the other way round; this is what its code computes.
    x [B, h, w, D'], skip [B, 2 h, 2 w, D] -> [B, 2 h, 2 w, D].
    """

    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        b, h, w, _ = x.shape
        kernel = self.param("kernel", torch_uniform, (x.shape[-1], 4 * skip.shape[-1]), self.param_dtype)
        share = self.param("share", nn.initializers.constant(0.5), (1,), self.param_dtype)
        x, skip, kernel, share = nn.dtypes.promote_dtype(x, skip, kernel, share, dtype=self.dtype)
        x = unpatchify((x @ kernel).reshape(b, h * w, -1), 2, 2 * h, 2 * w)
        return skip + share * (x - skip)


class HourglassDiT(nn.Module):
    """HDiT: (input [B, H, W, C], t f32[B] network time, cond {"label": int[B]}) -> f32[B, H, W, out_channels].

    A `models.network.Network`. A token of level 0 is a patch; each further level merges 2 x 2 tokens. Every level but the last
    has its layers on the way down, and as many others on the way up, behind the skip. The layers of a level are one stack of
    parameters under down_i, middle or up_i, whether or not the loop over them is unrolled.

    Time and label, and an optional {"augmentation": f32[B, 9]} (k-diffusion's numbers of an augmented image; zeros if absent),
    pass through the mapping network and scale the norms. Label `num_classes` is the null label; with `num_classes = 0` the
    network is unconditional and takes no label.

    t is a number of order 1: ln(sigma) / 4 of the process "edm", for which the network was made, or 0 to 1 of "flow". The times
    of "gaussian" are 0 to 999; set `time_scale` to 0.001 for it (`check_times`).

    Fields:
        patch_size: side of a patch, in latents or pixels.
        widths: features of a token, of each level, finest first; multiples of head_width.
        depths: layers of each level.
        num_classes: number of labels; 0 for an unconditional network.
        attentions: of each level, one of ATTENTIONS; None for neighborhood, and global in the last level.
        kernel_size: side of a neighbourhood, in tokens; odd.
        window_size: side of a window, in tokens; even. Every other layer's windows are shifted by half of it.
        head_width: features of a head, a multiple of 8.
        mlp_ratio: width of the feed-forward's hidden layer over the level's.
        mapping_width: features of the condition.
        mapping_depth: blocks of the mapping network.
        time_scale: factor of t.
        out_channels: 2 C when the process learns its variance, else C.
        attention: implementation of global attention: "xla", "cudnn" (GPUs, 16-bit dtypes), or "auto", see
            `attention.attention_kernel`.
        remat: which activations a layer stores for its gradient, as in DiT: auto, none, elementwise, dots, full or offload.
        unroll: False scans over the layers of a level; True unrolls; None unrolls on a GPU.
        dtype: of activations and matrix products; norms, softmax, rotations and the output are float32.
        param_dtype: of the parameters.
    """

    patch_size: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    num_classes: int
    out_channels: int
    attentions: tuple[str, ...] | None = None
    kernel_size: int = 7
    window_size: int = 8
    head_width: int = 64
    mlp_ratio: float = 3.0
    mapping_width: int = 256
    mapping_depth: int = 2
    time_scale: float = 1.0
    attention: str = "auto"
    remat: str = "auto"
    unroll: bool | None = None
    dtype: layers.Dtype = jnp.float32
    param_dtype: layers.Dtype = jnp.float32

    rules = RULES
    matrices = MATRICES
    label_table = "label_embedding/embedding"
    published = PUBLISHED
    remat_policies = CHOICES

    def setup(self) -> None:
        self._check_fields()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear = {"use_bias": False, "kernel_init": torch_uniform, "dot_general": dot_general, **dtypes}
        self.patch_in = nn.Dense(self.widths[0], **linear)
        self.time_fourier, self.augmentation_fourier = (Fourier(self.mapping_width, self.param_dtype) for _ in range(2))
        self.time_embedding, self.augmentation_embedding = (nn.Dense(self.mapping_width, **linear) for _ in range(2))
        if self.num_classes:
            init = nn.initializers.normal(1.0)
            self.label_embedding = nn.Embed(self.num_classes + 1, self.mapping_width, embedding_init=init, **dtypes)
        self.mapping = MappingNetwork(self.mapping_depth, 3 * self.mapping_width, **dtypes)
        last = len(self.widths) - 1
        self.down = [self._level(i) for i in range(last)]
        self.merge = [nn.Dense(self.widths[i + 1], **linear) for i in range(last)]
        self.middle = self._level(last)
        self.split = [TokenSplit(**dtypes) for _ in range(last)]
        self.up = [self._level(i) for i in range(last)]
        self.out_norm = RMSNorm(self.param_dtype)
        self.patch_out = nn.Dense(self.patch_size**2 * self.out_channels, **linear | {"kernel_init": layers.zeros})

    def _level(self, i: int) -> nn.Module:
        """The layers of level i, as one scan."""
        width = self.widths[i]
        return stack(Layer, self.depths[i], (nn.broadcast, 0), self.unroll, self.remat)(
            width // self.head_width, int(width * self.mlp_ratio), self._kind(i), self.dtype, self.param_dtype
        )

    def _kind(self, i: int) -> Kind:
        """The attention of level i."""
        name = self.attentions[i] if self.attentions else "global" if i == len(self.widths) - 1 else "neighborhood"
        size = {"neighborhood": self.kernel_size, "shifted_window": self.window_size, "global": 0}[name]
        return Kind(name, size, self.attention)

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Cond, control: Mapping[str, Any] | None = None) -> jax.Array:
        check_entries("control", control, (), type(self).__name__)
        self.check(x_t.shape[1:])
        c = self.condition(t, cond, len(x_t))
        b, height, width, _ = x_t.shape
        h, w = height // self.patch_size, width // self.patch_size
        x = self.patch_in(patchify(x_t, self.patch_size).astype(self.dtype)).reshape(b, h, w, -1)
        x, skips = constrain_batch(x, tokens=True), []
        for level, merge, depth in zip(self.down, self.merge, self.depths, strict=False):
            x, _ = level(x, c, self._shifts(0, depth))
            skips.append(x)
            x = merge(patchify(x, 2)).reshape(b, x.shape[1] // 2, x.shape[2] // 2, -1)
        x, _ = self.middle(x, c, self._shifts(0, self.depths[-1]))
        for level, split, depth, skip in reversed(list(zip(self.up, self.split, self.depths, skips, strict=False))):
            x, _ = level(split(x, skip), c, self._shifts(depth, depth))
        x = self.patch_out(self.out_norm(x).reshape(b, h * w, -1))
        return unpatchify(x, self.patch_size, height, width).astype(jnp.float32)

    def _shifts(self, first: int, depth: int) -> jax.Array:
        """int32[depth]: the shift of the windows of layers first, first + 1, ..; on the way up the numbers go on."""
        return jnp.asarray([i % 2 * (self.window_size // 2) for i in range(first, first + depth)], jnp.int32)

    def condition(self, t: jax.Array, cond: Cond, batch: int) -> jax.Array:
        """[B, M]: the output of the mapping network."""
        labels = ("label",) if self.num_classes else ()
        check_entries("cond", cond, (*labels, "augmentation"), type(self).__name__)
        augmentation = (cond or {}).get("augmentation", jnp.zeros((batch, 9)))
        if augmentation.shape != (batch, 9):
            raise UserError(f'cond["augmentation"] has shape {augmentation.shape}; it must be ({batch}, 9)')
        c = self.time_embedding(self.time_fourier(self.time_scale * t.astype(jnp.float32)[:, None]))
        c = c + self.augmentation_embedding(self.augmentation_fourier(augmentation))
        if self.num_classes:
            c = c + label_vectors(self.label_embedding, cond, batch, self.num_classes)
        return self.mapping(c)

    def check_times(self, low: float, high: float) -> None:
        """Raises a UserError if the Fourier features cannot tell the times of a process apart, which are from low to high."""
        turns = abs(self.time_scale) * (high - low)
        if not SMALLEST_TURNS <= turns <= MOST_TURNS:
            raise UserError(
                f"the process gives times from {low:g} to {high:g}; times model.time_scale = {self.time_scale:g}, they turn the "
                f"network's Fourier features {turns:g} times: set model.time_scale to about {1 / (high - low):g}"
            )

    def check(self, latent_shape: Shape) -> None:
        """Raises a UserError if the fields do not fit one another or an input of latent_shape (h, w, c)."""
        self._check_fields()
        if len(latent_shape) != 3:
            raise UserError(
                f"the network's input is {' x '.join(map(str, latent_shape))}, but HDiT takes images (height x width x "
                "channels); choose a network for clips"
            )
        factor = self.size_unit
        if any(side % factor for side in latent_shape[:2]):
            raise UserError(
                f"the network's input is {latent_shape[0]} x {latent_shape[1]}, not a multiple of {factor} (model.patch_size = "
                f"{self.patch_size}, times 2 for each further level); change the resolution, the patch size or model.widths"
            )
        for i in range(len(self.widths)):
            kind, grid = self._kind(i), self._grid(latent_shape, i)
            text = f"level {i} has {grid[0]} x {grid[1]} tokens"
            if kind.name == "neighborhood" and min(grid) < kind.size:
                raise UserError(
                    f"{text}, fewer than model.kernel_size = {kind.size} in a row; set a smaller one, or global attention"
                )
            if kind.name == "shifted_window" and (grid[0] % kind.size or grid[1] % kind.size):
                raise UserError(f"{text}, not a multiple of model.window_size = {kind.size}; choose a window that divides both")

    def _grid(self, latent_shape: Shape, i: int) -> tuple[int, int]:
        """(rows, columns) of tokens of level i."""
        height, width, _ = latent_shape
        return height // (self.patch_size << i), width // (self.patch_size << i)

    def _check_fields(self) -> None:
        levels = len(self.widths)
        for name in ("widths", "depths"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise UserError(f"model.{name} is {values}; it must be a tuple of positive numbers, one for each level")
        for name in ("depths", "attentions"):
            values = getattr(self, name)
            if values is not None and len(values) != levels:
                raise UserError(
                    f"model.{name} is {tuple(values)} and model.widths {tuple(self.widths)}; each needs one entry for each level"
                )
        for name in self.attentions or ():
            if name not in ATTENTIONS:
                raise UserError(f"model.attentions has {name!r}; each must be one of {', '.join(ATTENTIONS)}")
        for name in ("patch_size", "mapping_width"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_classes", "mapping_depth"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 0")
        if (
            self.mapping_width % 2
            or self.window_size % 2
            or self.window_size < 2
            or self.kernel_size % 2 != 1
            or self.kernel_size < 1
        ):
            raise UserError(
                f"model.mapping_width is {self.mapping_width}, model.window_size {self.window_size} and model.kernel_size "
                f"{self.kernel_size}; the first two must be even, and the last odd"
            )
        if self.head_width < 8 or self.head_width % 8:
            raise UserError(f"model.head_width is {self.head_width}; it must be a multiple of 8, which the rotations need")
        if bad := [width for width in self.widths if width % self.head_width]:
            raise UserError(
                f"model.widths has {bad[0]}, not a multiple of model.head_width = {self.head_width}; choose multiples, or "
                "another head_width"
            )
        if self.mlp_ratio <= 0 or self.time_scale == 0:
            raise UserError(f"model.mlp_ratio is {self.mlp_ratio} and model.time_scale {self.time_scale}; both must be above 0")
        if self.remat not in ("auto", *CHOICES):
            raise UserError(f"model.remat is {self.remat!r}; it must be one of auto, {', '.join(CHOICES)}")
        if self.attention not in IMPLEMENTATIONS:
            raise UserError(f"model.attention is {self.attention!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")

    @property
    def size_unit(self) -> int:
        """Both sides of an input are multiples of a token of the last level; positions are fractions of the longer side."""
        return self.patch_size << (len(self.widths) - 1)

    def num_tokens(self, latent_shape: Shape) -> int:
        return math.prod(self._grid(latent_shape, 0))

    def _levels(self) -> list[tuple[int, int]]:
        """[(level, layers)], with both ways."""
        last = len(self.widths) - 1
        return [(i, depth * (1 if i == last else 2)) for i, depth in enumerate(self.depths)]

    def macs(self, latent_shape: Shape, cond_shapes: Mapping[str, Shape] | None = None) -> int:
        return sum(self.macs_by_part(latent_shape).values())

    def macs_by_part(self, latent_shape: Shape) -> dict[str, int]:
        """Multiply-adds of the matrix products, by part of the network, as k-diffusion counts them.

        A query of a neighbourhood has kernel_size^2 keys, and of a window window_size^2. Norms, softmax and rotations are not
        counted.
        """
        tokens = [math.prod(self._grid(latent_shape, i)) for i in range(len(self.widths))]
        pixels, m = latent_shape[0] * latent_shape[1], self.mapping_width
        parts = {
            "patches": pixels * self.widths[0] * (latent_shape[2] + self.out_channels),
            "merge_and_split": sum(
                2 * 4 * tokens[i + 1] * self.widths[i] * self.widths[i + 1] for i in range(len(self.widths) - 1)
            ),
            "mapping": 2 * m * m + self.mapping_depth * 9 * m * m,
            "modulation": 0,
            "attention_linear": 0,
            "attention_product": 0,
            "mlp": 0,
        }
        for i, count in self._levels():
            n, d = tokens[i], self.widths[i]
            parts["modulation"] += count * 2 * m * d
            parts["attention_linear"] += count * n * 4 * d * d
            parts["attention_product"] += count * 2 * n * self._kind(i).keys(n) * d
            parts["mlp"] += count * n * 3 * d * int(d * self.mlp_ratio)
        return parts

    def activation_bytes(self, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int]) -> int:
        inside = 0 if self.remat in STORES_NOTHING_INSIDE else STORED_INSIDE // mesh_shape["tensor"]
        values = sum(
            count * math.prod(self._grid(latent_shape, i)) // mesh_shape["sequence"] * self.widths[i] * (1 + inside)
            for i, count in self._levels()
        )
        return rows * values * jnp.dtype(self.dtype).itemsize

    def savings(self, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int], activations: int) -> dict[str, int]:
        def kept(policy: str) -> int:
            return self.clone(remat=policy).activation_bytes(latent_shape, rows, mesh_shape)

        return savings(self.remat, sum(count for _, count in self._levels()), kept, activations)

    def describe(self) -> str:
        levels = ", ".join(
            f"{depth} x {width} {self._kind(i).name}"
            for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True))
        )
        return f"HDiT patch {self.patch_size}, levels {levels} ({jnp.dtype(self.dtype).name})"

    def for_platform(self, platform: str) -> "HourglassDiT":
        unroll, remat = form_of_loop(self.unroll, self.remat, platform)
        return self.clone(
            unroll=unroll, remat=remat, attention=attention_kernel(self.attention, self.dtype, self.head_width, platform)
        )
