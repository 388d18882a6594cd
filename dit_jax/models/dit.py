"""The Diffusion Transformer of Peebles & Xie 2023 (arXiv 2212.09748), with its four conditioning blocks.

B batch, H x W x C input, p patch, N = HW / p^2 tokens, M conditioning tokens, D width.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.errors import UserError
from dit_jax.models import layers, position
from dit_jax.models.attention import IMPLEMENTATIONS, attention_kernel
from dit_jax.models.network import MIXED, Cond, Shape, check_entries, label_vectors
from dit_jax.models.patches import check_sides, patchify, unpatchify
from dit_jax.models.published import Fid, Published
from dit_jax.models.sizes import FIDS, MODELS, SIZES
from dit_jax.models.sizes import fields as fields_of_size
from dit_jax.models.stack import CHOICES, TokenBlocks, blocks_to_keep, form_of_loop, stack
from dit_jax.parallel.mesh import constrain_batch
from dit_jax.parallel.rules import Rules

# A spec covers the trailing dimensions. A stack of blocks adds a leading dimension, which is not split.
RULES: Rules = (
    (r"(attention|cross_attention)/qkv/kernel", ("fsdp", None, "tensor", None)),  # [D, 3, H, E]
    (r"(attention|cross_attention)/qkv/bias", (None, "tensor", None)),
    (r"cross_attention/query/kernel", ("fsdp", "tensor", None)),  # [D, H, E]
    (r"cross_attention/query/bias", ("tensor", None)),
    (r"cross_attention/key_value/kernel", ("fsdp", None, "tensor", None)),  # [D, 2, H, E]
    (r"cross_attention/key_value/bias", (None, "tensor", None)),
    (r"(attention|cross_attention)/out/kernel", ("tensor", None, "fsdp")),  # [H, E, D]
    (r"mlp/in/kernel", ("fsdp", "tensor")),  # [D, 4D]
    (r"mlp/in/bias", ("tensor",)),
    (r"mlp/out/kernel", ("tensor", "fsdp")),  # [4D, D]
    # Never over tensor: with gate and MLP both split over (fsdp, tensor), XLA gave wrong numbers on meshes such as (2, 2, 2).
    (r"modulation/linear/kernel", ("fsdp", None, None)),  # [D, 6, D]
    (r"patch_embedding/kernel", (None, "fsdp")),
    (r"time_embedding/(in|out)/kernel", (None, "fsdp")),
    (r"label_embedding/embedding", (None, "fsdp")),
    (r"final/linear/kernel", ("fsdp", None)),
    (r"(out|linear|patch_embedding|time_embedding/in)/bias", ()),
    (r"norm(_\w+)?/(scale|bias)", ()),
)
MATRICES = {  # of the blocks, which Muon treats as such, and the kinds of their trailing axes; see `Network.matrices`
    r"blocks/(attention|cross_attention)/qkv/kernel": "isoo",
    r"blocks/cross_attention/query/kernel": "ioo",
    r"blocks/cross_attention/key_value/kernel": "isoo",
    r"blocks/(attention|cross_attention)/out/kernel": "iio",
    r"blocks/mlp/(in|out)/kernel": "io",
    r"blocks/modulation/linear/kernel": "iso",
}
CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")


class Modulation(nn.Module):
    """`count` vectors of width D from silu(c); the projection is zero-initialized.  [B, D] -> [B, count, D] float32."""

    count: int
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, c: jax.Array) -> jax.Array:
        linear = nn.DenseGeneral(
            (self.count, c.shape[-1]), kernel_init=layers.zeros, dtype=self.dtype, param_dtype=self.param_dtype, name="linear"
        )
        # Replicated over fsdp and tensor on purpose, see `parallel.rules`.
        return constrain_batch(linear(nn.silu(c)))


class Block(nn.Module):
    """One transformer block.

    Called with x [B, N, D], the pooled condition c [B, D], the conditioning tokens [B, M, D] and `keep`, a boolean scalar (False
    returns x unchanged; None means True). Returns (x, None), as `nn.scan` requires.
      adaln_zero       shift, scale and gate of both sub-layers regressed from c; gates start at zero (identity block)
      adaln            shift and scale only
      cross_attention  self-attention, cross-attention to the conditioning tokens, MLP; norms with parameters
      in_context       a plain block; x already contains the conditioning tokens
    Source: Peebles & Xie 2023, section 3.2, figure 3.
    """

    heads: int
    mlp_ratio: float
    conditioning: str
    attention: str
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, tokens: jax.Array, keep: jax.Array | None = None) -> tuple[jax.Array, None]:
        start, dtypes = x, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = layers.Attention(self.heads, self.attention, **dtypes, name="attention")
        mlp = layers.MLP(int(x.shape[-1] * self.mlp_ratio), **dtypes, name="mlp")
        if self.conditioning in ("adaln_zero", "adaln"):
            gated = self.conditioning == "adaln_zero"
            vectors = Modulation(6 if gated else 4, **dtypes, name="modulation")(c)
            parts = [vectors[:, i] for i in range(vectors.shape[1])]
            # The order of the paper's code: (shift, scale, gate) of attention, then of the MLP.
            (shift_1, scale_1, *gates_1), (shift_2, scale_2, *gates_2) = parts[: len(parts) // 2], parts[len(parts) // 2 :]
            gate_1, gate_2 = (gates_1[0][:, None], gates_2[0][:, None]) if gated else (1, 1)
            x = x + gate_1 * attention(layers.modulate(layers.normalize(x), shift_1, scale_1).astype(self.dtype))
            x = x + gate_2 * mlp(layers.modulate(layers.normalize(x), shift_2, scale_2).astype(self.dtype))
        else:

            def norm(name):
                return nn.LayerNorm(layers.NORM_EPSILON, **dtypes, name=name)

            x = x + attention(norm("norm_attention")(x))
            if self.conditioning == "cross_attention":
                cross = layers.Attention(self.heads, self.attention, **dtypes, name="cross_attention")
                x = x + cross(norm("norm_cross")(x), tokens)
            x = x + mlp(norm("norm_mlp")(x))
        x = x.astype(self.dtype) if keep is None else jnp.where(keep, x.astype(self.dtype), start)
        return constrain_batch(x, tokens=True), None


class FinalLayer(nn.Module):
    """Layer norm (modulated by c with adaLN), then a zero-initialized linear layer.  [B, N, D] -> [B, N, features]."""

    features: int
    modulated: bool
    dtype: layers.Dtype
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.modulated:
            vectors = Modulation(2, **dtypes, name="modulation")(c)
            x = layers.modulate(layers.normalize(x), vectors[:, 0], vectors[:, 1]).astype(self.dtype)
        else:
            x = nn.LayerNorm(layers.NORM_EPSILON, **dtypes, name="norm")(x)
        return nn.Dense(self.features, kernel_init=layers.zeros, **dtypes, name="linear")(x)


class Embedded(NamedTuple):
    """Inputs of the transformer blocks.

    Fields:
        x: [B, N, D] tokens; with in-context conditioning [B, N + M, D].
        c: [B, D] the pooled condition.
        tokens: [B, M, D] the conditioning tokens.
    """

    x: jax.Array
    c: jax.Array
    tokens: jax.Array


def _published() -> dict[str, Published]:
    """The twelve models at both resolutions, then the other conditionings of XL/2."""

    def published(model: str, resolution: int, *fids: Fid, **more: Any) -> Published:
        fields = {**fields_of_size(model), "num_classes": 1000, "out_channels": 8, **more}
        return Published(fields, (resolution // 8, resolution // 8, 4), fids)

    def after_400k(fid: float, table: int = 4) -> Fid:
        return Fid(fid, "400k steps, no guidance", f"Peebles & Xie 2023, table {table}")

    def final(fid: float, guidance: str, table: int) -> Fid:
        return Fid(fid, guidance, f"Peebles & Xie 2023, table {table}")

    table = {f"{model}@256": published(model, 256, after_400k(FIDS[model][1])) for model in MODELS}
    table |= {f"{model}@512": published(model, 512) for model in MODELS}
    best = final(9.62, "no guidance", 2), final(2.27, "guidance 1.5", 2)
    table["XL/2@256"] = table["XL/2@256"]._replace(fids=(*table["XL/2@256"].fids, *best))
    table["XL/2@512"] = table["XL/2@512"]._replace(fids=(final(12.03, "no guidance", 3), final(3.04, "guidance 1.5", 3)))
    for conditioning, fid in {"adaln": 25.21, "cross_attention": 26.14, "in_context": 35.24}.items():
        table[f"XL/2@256 {conditioning}"] = published("XL/2", 256, after_400k(fid), conditioning=conditioning)
    return table


class DiT(TokenBlocks, nn.Module):
    """Diffusion Transformer: (x_t [B, H, W, C], t f32[B] network time, cond {"label": int[B]}) -> f32[B, H, W, out_channels].

    A `models.network.Network`. Label `num_classes` is the null label; with `num_classes = 0` the network is unconditional and
    takes no label. {"second_label": int[B], "second_share": f32[B]} mixes the embeddings of two labels. The blocks' parameters
    are one stack of length `depth` under `blocks`, whether or not the loop over them is unrolled. control {"keep": bool[depth]}
    skips the blocks where it is False (skip-layer guidance).

    Fields:
        patch_size: side p of a patch, in latents or pixels; an image has (H / p) (W / p) tokens.
        depth: number of blocks.
        width: features of a token.
        heads: attention heads; divides the width.
        num_classes: number of labels; 0 for an unconditional network.
        mlp_ratio: width of the MLP's hidden layer over the network's.
        out_channels: 2 C when the process learns its variance, else C.
        conditioning: one of CONDITIONINGS.
        attention: implementation: "xla", "cudnn" (GPUs, 16-bit dtypes), or "auto", see `attention.attention_kernel`.
        remat: which activations a block stores for its gradient, in addition to its input; the others are recomputed.
            "auto": "none" on a GPU, else "elementwise"; see `form_of_loop`.
            "none": all.
            "elementwise": outputs of linear layers and attention; norms, modulation, GELU and softmax are recomputed.
            "dots": outputs of linear layers, including the modulation; attention is recomputed too.
            "full": none.
            "offload": as "elementwise", stored in host memory until the backward pass.
        unroll: False scans over the blocks (compile time does not grow with depth); True unrolls; None unrolls on a GPU.
        position_grid: (rows, columns) of tokens to which positions are scaled, that of training, so that an input of another
            size keeps their range (`position.sincos_2d`); None for the input's own grid.
        dtype: of activations and matrix products; norms, softmax and the output are float32.
        param_dtype: of the parameters.
    """

    patch_size: int
    depth: int
    width: int
    heads: int
    num_classes: int
    out_channels: int
    mlp_ratio: float = 4.0
    conditioning: str = "adaln_zero"
    attention: str = "auto"
    remat: str = "auto"
    unroll: bool | None = None
    position_grid: tuple[int, int] | None = None
    dtype: layers.Dtype = jnp.float32
    param_dtype: layers.Dtype = jnp.float32

    rules = RULES
    published = _published()
    matrices = MATRICES
    label_table = "label_embedding/embedding"
    mixes_labels = True
    remat_policies = CHOICES

    @staticmethod
    def family(fields: Mapping[str, Any]) -> str:
        """Models of equal depth and width: "XL" for the paper's sizes, "4 x 128" (depth x width) for others."""
        shape = fields["depth"], fields["width"]
        names = {(size.depth, size.width): name for name, size in SIZES.items()}
        return names.get(shape) or f"{shape[0]} x {shape[1]}"

    @property
    def size_unit(self) -> int:
        """Both sides of an input are multiples of the patch's."""
        return self.patch_size

    @classmethod
    def of(cls, size: str, *, num_classes: int, out_channels: int = 8, **fields: Any) -> "DiT":
        """A model of the paper, "S/8" to "XL/2".

            network = dit_jax.models.DiT.of("S/8", num_classes=10)
            params = network.init(key, x_t, t, {"label": y})  # x_t [B, 32, 32, 4], t f32[B], y int32[B]
            output = network.apply(params, x_t, t, {"label": y})  # [B, 32, 32, 8]

        Args:
            out_channels: 8 for the 4 channels of the paper's latents and their learned variance.
            fields: others of DiT.

        Raises:
            UserError: no such size or patch.
        """
        return cls(**fields_of_size(size), num_classes=num_classes, out_channels=out_channels, **fields)

    def setup(self) -> None:
        self._check_fields()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patch_embedding = nn.Dense(self.width, kernel_init=layers.xavier_uniform, **dtypes)
        self.time_embedding = layers.TimeEmbedding(self.width, **dtypes)
        if self.num_classes:
            self.label_embedding = nn.Embed(self.num_classes + 1, self.width, embedding_init=layers.normal_002, **dtypes)
        axes = (nn.broadcast, nn.broadcast, 0)
        self.blocks = stack(Block, self.depth, axes, self.unroll, self.remat)(
            self.heads, self.mlp_ratio, self.conditioning, self.attention, **dtypes
        )
        modulated = self.conditioning in ("adaln_zero", "adaln")
        self.final = FinalLayer(self.patch_size**2 * self.out_channels, modulated, **dtypes)

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Cond, control: Mapping[str, Any] | None = None) -> jax.Array:
        embedded = self.embed(x_t, t, cond)
        x = self.run_blocks(embedded, control)  # [B, N, D]
        return self.head(x, embedded, x_t.shape)  # [B, H, W, out_channels]

    def embed(self, x_t: jax.Array, t: jax.Array, cond: Cond) -> Embedded:
        """Embeds patches, positions, time and label."""
        self.check(x_t.shape[1:])
        check_entries("cond", cond, ("label", *MIXED) if self.num_classes else (), type(self).__name__)
        _, h, w, _ = x_t.shape
        p = self.patch_size
        x = self.patch_embedding(patchify(x_t, p).astype(self.dtype))  # [B, N, D]
        x = x + position.sincos_2d(self.width, h // p, w // p, self.position_grid).astype(self.dtype)
        vectors: list[Any] = [self.time_embedding(t)]
        if self.num_classes:
            vectors.append(label_vectors(self.label_embedding, cond, len(x_t), self.num_classes))
        c = sum(vectors)  # [B, D]
        tokens = jnp.stack(vectors, axis=1)  # [B, M, D]
        if self.conditioning == "in_context":
            x = jnp.concatenate([x, tokens], axis=1)  # [B, N + M, D]
        return Embedded(constrain_batch(x, tokens=True), c, tokens)

    def run_blocks(self, embedded: Embedded, control: Mapping[str, Any] | None = None) -> jax.Array:
        """Runs all blocks; returns the tokens [B, N, D]."""
        keep = blocks_to_keep(control, self.depth, type(self).__name__)
        return self.blocks(embedded.x, embedded.c, embedded.tokens, keep)[0]

    def head(self, x: jax.Array, embedded: Embedded, shape: Shape) -> jax.Array:
        """Maps tokens to f32[B, H, W, out_channels], for an input of shape [B, H, W, C]."""
        if self.conditioning == "in_context":
            x = x[:, : -embedded.tokens.shape[1]]
        x = self.final(x.astype(self.dtype), embedded.c)
        return unpatchify(x, self.patch_size, *shape[1:3]).astype(jnp.float32)

    def check(self, latent_shape: Shape) -> None:
        """Raises a UserError if the fields do not fit one another or an input of latent_shape (h, w, c)."""
        self._check_fields()
        if len(latent_shape) != 3:
            raise UserError(
                f"the network's input is {' x '.join(map(str, latent_shape))}, but DiT takes images (height x width x channels); "
                "choose a network for clips"
            )
        check_sides(*latent_shape[:2], self.patch_size)

    def _check_fields(self) -> None:
        if self.conditioning not in CONDITIONINGS:
            raise UserError(f"model.conditioning is {self.conditioning!r}; it must be one of {', '.join(CONDITIONINGS)}")
        if self.remat not in ("auto", *CHOICES):
            raise UserError(f"model.remat is {self.remat!r}; it must be one of auto, {', '.join(CHOICES)}")
        if self.attention not in IMPLEMENTATIONS:
            raise UserError(f"model.attention is {self.attention!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
        for name in ("patch_size", "depth", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.position_grid is not None and (len(self.position_grid) != 2 or min(self.position_grid) < 1):
            raise UserError(f"model.position_grid is {self.position_grid}; it must be (rows, columns) of tokens, or None")
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

    def num_tokens(self, latent_shape: Shape) -> int:
        height, width, _ = latent_shape
        return (height // self.patch_size) * (width // self.patch_size)

    def macs(self, latent_shape: Shape, cond_shapes: Mapping[str, Shape] | None = None) -> int:
        return sum(self.macs_by_part(latent_shape).values())

    def macs_by_part(self, latent_shape: Shape) -> dict[str, int]:
        """Multiply-adds of the matrix products, by part of the network.

        Norms, softmax and other elementwise operations are not counted, as in the paper. XLA's own count includes only one of the
        scanned blocks.
        """
        channels, d, p, depth = latent_shape[-1], self.width, self.patch_size, self.depth
        patches = self.num_tokens(latent_shape)
        conditions = 2 if self.num_classes else 1
        tokens = patches + conditions * (self.conditioning == "in_context")
        vectors = {"adaln_zero": 6, "adaln": 4}.get(self.conditioning, 0)
        parts = {
            "patch_embedding": patches * p * p * channels * d,
            "time_embedding": 256 * d + d * d,
            "attention_linear": depth * tokens * 4 * d * d,
            "attention_product": depth * 2 * tokens * tokens * d,
            "mlp": depth * tokens * 2 * d * int(d * self.mlp_ratio),
            "modulation": depth * vectors * d * d + (2 * d * d if vectors else 0),
            "final": patches * d * p * p * self.out_channels,
        }
        if self.conditioning == "cross_attention":
            parts["cross_attention"] = depth * (2 * tokens * d * d + 2 * conditions * d * d + 2 * tokens * conditions * d)
        return parts

    def describe(self) -> str:
        return (
            f"{type(self).__name__} depth {self.depth} width {self.width} heads {self.heads} patch {self.patch_size} "
            f"({self.conditioning}, {jnp.dtype(self.dtype).name})"
        )

    def for_platform(self, platform: str) -> "DiT":
        unroll, remat = form_of_loop(self.unroll, self.remat, platform)
        kernel = attention_kernel(self.attention, self.dtype, self.width // self.heads, platform)
        return self.clone(unroll=unroll, remat=remat, attention=kernel)
