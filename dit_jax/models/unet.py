"""The U-Nets that DiT replaces: ADM's (Dhariwal & Nichol 2021, arXiv 2105.05233) and LDM's (Rombach et al. 2022, 2112.10752).

B batch, H x W pixels (of an image or of latents), N = H W tokens, C channels, E width of a head, D = 4 `channels` width of the
embedding of time and label.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.errors import UserError
from dit_jax.models.attention import IMPLEMENTATIONS, attention_kernel
from dit_jax.models.convolutional import (
    MLP_RATIO,
    REMAT_POLICIES,
    AttentionBlock,
    Downsample,
    Input,
    Layer,
    Output,
    ResBlock,
    SpatialTransformer,
    TimeEmbedding,
    Upsample,
    double,
    enlarged,
    halve,
    remat_for,
)
from dit_jax.models.layers import Dtype
from dit_jax.models.network import MIXED, Cond, Shape, check_entries, label_vectors
from dit_jax.models.published import Fid, Published
from dit_jax.parallel.mesh import constrain_batch
from dit_jax.parallel.rules import Rules

# Convolutions and projections of the embedding are never split over tensor, see models/dit.py.
RULES: Rules = (
    (r"(conv_1|conv_2|conv)/kernel", (None, None, "fsdp", None)),  # [3, 3, in, out]
    (r"skip/kernel", ("fsdp", None)),
    (r"\w+/embedding/kernel", ("fsdp", None, None)),  # [D, 1 or 2, C]
    (r"(attention|self_attention)/qkv/kernel", ("fsdp", None, "tensor", None)),  # [C, 3, H, E]
    (r"attention/qkv/bias", (None, "tensor", None)),
    (r"cross_attention/query/kernel", ("fsdp", "tensor", None)),  # [C, H, E]
    (r"cross_attention/key_value/kernel", ("fsdp", None, "tensor", None)),  # [context width, 2, H, E]
    (r"(attention|self_attention|cross_attention)/out/kernel", ("tensor", None, "fsdp")),  # [H, E, C]
    (r"(proj_in|proj_out)/kernel", ("fsdp", None)),
    (r"mlp/in/kernel", ("fsdp", None, "tensor")),  # [C, 2, 4C]
    (r"mlp/in/bias", (None, "tensor")),
    (r"mlp/out/kernel", ("tensor", "fsdp")),  # [4C, C]
    (r"time_embedding/(in|out)/kernel", (None, "fsdp")),
    (r"label_embedding/embedding", (None, "fsdp")),
    (r"(conv_1|conv_2|conv|skip|embedding|out|proj_in|proj_out|time_embedding/in)/bias", ()),
    (r"\w*norm\w*/(scale|bias)", ()),
)
MATRICES = {  # see `Network.matrices`; kernels of convolutions are none
    r"(attention|self_attention)/qkv/kernel": "isoo",
    r"cross_attention/query/kernel": "ioo",
    r"cross_attention/key_value/kernel": "isoo",
    r"(attention|self_attention|cross_attention)/out/kernel": "iio",
    r"attention/(proj_in|proj_out)/kernel": "io",
    r"attention/mlp/in/kernel": "iso",
    r"attention/mlp/out/kernel": "io",
}
LOW_RES = "low_res"  # entry of a condition: the image that is upsampled


class Piece(NamedTuple):
    """A module of the network: "block", "attention", "downsample" or "upsample".

    Fields:
        name: of the module in its stage.
        inputs, features: channels of its input and output.
        factor: by which its input is smaller than the network's.
    """

    kind: str
    name: str
    inputs: int
    features: int
    factor: int


class Stage(NamedTuple):
    """What lies between two skip connections: an entry of `input_blocks` or `output_blocks` in the papers' code, or the middle.

    Fields:
        side: "down": its output is kept for a skip connection; "up": its input is joined with what was kept last; "middle".
        level, place: of the down or up side; the place in a level counts its stages.
    """

    side: str
    level: int
    place: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """Of the module: "down_0_1", "middle"."""
        return self.side if self.side == "middle" else f"{self.side}_{self.level}_{self.place}"


class StageLayer(Layer):
    """The pieces of a stage.  [B, H, W, C], embedding [B, D], context [B, M, ...] or None -> [B, H', W', C'].

    Fields: see `UNet`; `pieces` with the heads of each.
    """

    pieces: tuple[tuple[Piece, int], ...]
    scale_shift: bool
    resblock_updown: bool
    attention: str
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, context: jax.Array | None) -> jax.Array:
        for piece, heads in self.pieces:
            x = self.module(piece, heads, context)(x, context if piece.kind == "attention" else embedding).astype(self.dtype)
        return constrain_batch(x)

    def module(self, piece: Piece, heads: int, context: jax.Array | None) -> nn.Module:
        shared, kind = (self.norm_groups, self.dtype, self.param_dtype), piece.kind
        if kind == "attention":
            layer = AttentionBlock if context is None else SpatialTransformer
            return self.rematerialized(layer)(*shared, heads, self.attention, name=piece.name)
        if kind != "block" and not self.resblock_updown:
            return (Downsample if kind == "downsample" else Upsample)(*shared, name=piece.name)
        resample = {"block": None, "downsample": halve, "upsample": double}[kind]
        return self.rematerialized(ResBlock)(*shared, piece.features, self.scale_shift, resample, name=piece.name)

    def rematerialized(self, layer: Any) -> Any:
        if self.remat == "none":
            return layer
        # XLA would merge the recomputation with the first computation (CSE).
        return nn.remat(layer, prevent_cse=True, policy=REMAT_POLICIES[self.remat])


ADM = {"norm_groups": 32, "num_classes": 1000, "null_label": False, "out_channels": 6}
LDM = {
    "scale_shift_norm": False,
    "resblock_updown": False,
    "context_width": 512,
    "num_classes": 1000,
    "null_label": True,
}
_ADM_PAPER = "Dhariwal & Nichol 2021, table 5"
PUBLISHED = {
    "ADM@64": Published(
        {**ADM, "channels": 192, "multipliers": (1, 2, 3, 4), "num_res_blocks": 3, "attention_factors": (2, 4, 8)},
        (64, 64, 3),
        (Fid(2.07, "no guidance, trained with dropout 0.1", _ADM_PAPER),),
    ),
    "ADM@128": Published(
        {**ADM, "channels": 256, "multipliers": (1, 1, 2, 3, 4), "attention_factors": (4, 8, 16), "heads": 4, "head_width": 0},
        (128, 128, 3),
        (Fid(5.91, "no guidance", _ADM_PAPER), Fid(2.97, "classifier guidance", _ADM_PAPER)),
    ),
    "ADM@256": Published(
        {**ADM, "channels": 256, "multipliers": (1, 1, 2, 2, 4, 4), "attention_factors": (8, 16, 32)},
        (256, 256, 3),
        (Fid(10.94, "no guidance", _ADM_PAPER), Fid(4.59, "classifier guidance", _ADM_PAPER)),
    ),
    "ADM@512": Published(
        {**ADM, "channels": 256, "multipliers": (0.5, 1, 1, 2, 2, 4, 4), "attention_factors": (16, 32, 64)},
        (512, 512, 3),
        (Fid(23.24, "no guidance", _ADM_PAPER), Fid(7.72, "classifier guidance", _ADM_PAPER)),
    ),
    "ADM-U@256": Published(
        {
            **ADM,
            "channels": 192,
            "multipliers": (1, 1, 2, 2, 4, 4),
            "attention_factors": (8, 16, 32),
            "heads": 4,
            "head_width": 0,
            "low_res_channels": 3,
        },
        (256, 256, 3),
        (
            Fid(7.49, "after ADM@64, no guidance", _ADM_PAPER),
            Fid(3.94, "after ADM@64 with classifier guidance", _ADM_PAPER),
        ),
        after="ADM@64",
        cond_shapes={"label": (), LOW_RES: (64, 64, 3)},
    ),
    "ADM-U@512": Published(
        {
            **ADM,
            "channels": 192,
            "multipliers": (1, 1, 2, 2, 4, 4),
            "attention_factors": (16, 32),
            "low_res_channels": 3,
        },
        (512, 512, 3),
        (
            Fid(9.96, "after ADM@128, no guidance", _ADM_PAPER),
            Fid(3.85, "after ADM@128 with classifier guidance", _ADM_PAPER),
        ),
        after="ADM@128",
        cond_shapes={"label": (), LOW_RES: (128, 128, 3)},
    ),
    "LDM-4@256": Published(
        {
            **LDM,
            "channels": 192,
            "multipliers": (1, 2, 3, 5),
            "attention_factors": (2, 4, 8),
            "heads": 1,
            "head_width": 0,
            "out_channels": 3,
        },
        (64, 64, 3),
        (
            Fid(10.56, "no guidance", "Rombach et al. 2022, table 10"),
            Fid(3.60, "classifier-free guidance 1.5", "Rombach et al. 2022, table 10"),
        ),
    ),
    "LDM-8@256": Published(
        {
            **LDM,
            "channels": 256,
            "multipliers": (1, 2, 4),
            "attention_factors": (1, 2, 4),
            "head_width": 32,
            "out_channels": 4,
        },
        (32, 32, 4),
        (
            Fid(15.51, "no guidance", "Rombach et al. 2022, table 10"),
            Fid(7.76, "classifier guidance", "Rombach et al. 2022, table 10"),
        ),
    ),
}


class UNet(nn.Module):
    """U-Net: (x_t [B, H, W, C], t f32[B] network time, cond {"label": int[B]}) -> f32[B, H, W, out_channels].

    A `models.network.Network`. The defaults are ADM's; LDM's are `scale_shift_norm` and `resblock_updown` False and a
    `context_width`. Networks take no random numbers, so there is no dropout. (Of the published models only ADM at 64 px has it.)

    The condition: {"label": int32[B]} unless `num_classes` is 0; {"second_label": int[B], "second_share": f32[B]} mixes the
    embeddings of two labels; {"low_res": f32[B, h, w, low_res_channels]}, the image to upsample, if `low_res_channels` is set.

    Fields:
        channels: width of the network, which `multipliers` multiply; the embedding has four times as many.
        multipliers: of the channels of each level; each level but the first has half the size of the one before.
        num_classes: number of labels; 0 for an unconditional network.
        out_channels: 2 C when the process learns its variance, else C.
        num_res_blocks: residual blocks of a level on the way down; there is one more on the way up.
        attention_factors: downsampling factors of the levels with attention, as in (8, 16, 32) for 32, 16 and 8 pixels of 256.
        head_width: of the attention; 0 if `heads` is set.
        heads: attention heads, each of the level's whole width over `heads`; 0 if `head_width` is set.
        scale_shift_norm: the embedding scales and shifts the output of the second norm; False adds it before the norm.
        resblock_updown: residual blocks change the size; False takes a convolution with stride 2, and nearest pixels with a
            convolution.
        context_width: 0: attention is over pixels, and the label's embedding is added to that of the time. Otherwise the label's
            embedding, of this width, is the context to which the transformers of LDM attend.
        null_label: the label table has a last row for the null label, which classifier-free guidance needs. ADM's has none, and
            is trained with task.cond_dropout = 0.
        low_res_channels: of the image to upsample, which is resized bilinearly and joined with x_t; 0 if there is none.
        norm_groups: groups of the group norms; divides the channels of every level.
        attention: implementation: "xla", "cudnn" (GPUs, 16-bit dtypes), or "auto": cuDNN if it supports the heads of every level
            (`attention.attention_kernel`).
        remat: which activations a residual block or a transformer stores for its gradient, in addition to its input; the others
            are recomputed.
            "auto": "elementwise" on a TPU, else "none".
            "none": all.
            "elementwise": outputs of convolutions, linear layers and attention; norms, SiLU and softmax are recomputed.
            "full": none.
        dtype: of activations and products; norms, softmax and the output are float32.
        param_dtype: of the parameters.
    """

    channels: int
    multipliers: tuple[float, ...]
    num_classes: int
    out_channels: int
    num_res_blocks: int = 2
    attention_factors: tuple[int, ...] = (8, 16, 32)
    head_width: int = 64
    heads: int = 0
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    context_width: int = 0
    null_label: bool = True
    low_res_channels: int = 0
    norm_groups: int = 32
    attention: str = "auto"
    remat: str = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    rules = RULES
    matrices = MATRICES
    mixes_labels = True
    remat_policies = ("none", *REMAT_POLICIES)
    published = PUBLISHED

    @property
    def label_table(self) -> str:
        """Path of the label table; "" if it has no row for the null label."""
        return "label_embedding/embedding" if self.has_null_label else ""

    @property
    def has_null_label(self) -> bool:
        return bool(self.num_classes) and self.null_label

    @property
    def size_unit(self) -> int:
        """Both sides of an input are multiples of it."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(self.channels * multiplier) for multiplier in self.multipliers)

    def heads_of(self, width: int) -> int:
        return self.heads or width // self.head_width

    def stages(self) -> list[Stage]:
        """The stages in order: down, middle, up."""
        widths, blocks, attending = self.widths, self.num_res_blocks, self.attention_factors
        here, factor, stages, kept = widths[0], 1, [], [widths[0]]

        def pieces(inputs: int, features: int) -> list[Piece]:
            attention = [Piece("attention", "attention", features, features, factor)] if factor in attending else []
            return [Piece("block", "block", inputs, features, factor), *attention]

        for level, width in enumerate(widths):
            for i in range(blocks):
                stages.append(Stage("down", level, i, tuple(pieces(here, width))))
                here = width
                kept.append(here)
            if level < len(widths) - 1:
                stages.append(Stage("down", level, blocks, (Piece("downsample", "downsample", here, here, factor),)))
                kept.append(here)
                factor *= 2
        kinds = (("block", "block_0"), ("attention", "attention"), ("block", "block_1"))
        stages.append(Stage("middle", level, 0, tuple(Piece(kind, name, here, here, factor) for kind, name in kinds)))
        for level, width in reversed([*enumerate(widths)]):
            for i in range(blocks + 1):
                stage = pieces(here + kept.pop(), width)
                if level and i == blocks:
                    stage.append(Piece("upsample", "upsample", width, width, factor))
                    factor //= 2
                stages.append(Stage("up", level, i, tuple(stage)))
                here = width
        return stages

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Cond, control: Mapping[str, Any] | None = None) -> jax.Array:
        self.check(x_t.shape[1:])
        self._check_condition(cond, len(x_t))
        check_entries("control", control, (), type(self).__name__)
        shared = (self.norm_groups, self.dtype, self.param_dtype)
        if self.low_res_channels:
            x_t = jnp.concatenate([x_t, enlarged(cond[LOW_RES], x_t.shape[1:3]).astype(x_t.dtype)], axis=-1)
        embedding = TimeEmbedding(*shared, self.channels, name="time_embedding")(t)
        context = None
        if self.num_classes:
            label = label_vectors(self._label_table(), cond, len(x_t), self.num_classes, self.null_label)
            embedding, context = (embedding, label[:, None]) if self.context_width else (embedding + label, None)
        x = Input(*shared, self.widths[0], name="input")(x_t.astype(self.dtype))
        kept = [x]
        resolved = self.for_platform(jax.default_backend())
        for stage in self.stages():
            if stage.side == "up":
                x = jnp.concatenate([x, kept.pop()], axis=-1)
            with_heads = tuple((piece, self.heads_of(piece.features)) for piece in stage.pieces)
            x = StageLayer(
                *shared,
                with_heads,
                self.scale_shift_norm,
                self.resblock_updown,
                resolved.attention,
                resolved.remat,
                name=stage.name,
            )(x, embedding, context)
            if stage.side == "down":
                kept.append(x)
        return Output(*shared, self.out_channels, name="output")(x).astype(jnp.float32)

    def _label_table(self) -> nn.Embed:
        """Labels [B] -> [B, D], or [B, context_width]."""
        return nn.Embed(
            self.num_classes + self.null_label,
            self.context_width or 4 * self.channels,
            embedding_init=nn.initializers.normal(1.0),  # PyTorch's
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="label_embedding",
        )

    def _check_condition(self, cond: Cond, batch: int) -> None:
        name, labels = type(self).__name__, ("label", *MIXED) if self.num_classes else ()
        check_entries("cond", cond, (*labels, *((LOW_RES,) if self.low_res_channels else ())), name)
        if not self.low_res_channels:
            return
        found = jnp.shape(cond[LOW_RES]) if LOW_RES in (cond or {}) else None
        if found is None or len(found) != 4 or (found[0], found[3]) != (batch, self.low_res_channels):
            shape = "missing" if found is None else list(found)
            raise UserError(
                f'cond["{LOW_RES}"] is {shape}; the image to upsample is needed, [{batch}, h, w, {self.low_res_channels}] '
                "(model.low_res_channels = 0 is for a network that does not upsample)"
            )

    def check(self, latent_shape: Shape) -> None:
        """Raises a UserError if the fields do not fit one another or an input of latent_shape (h, w, c)."""
        self.check_fields()
        size = " x ".join(map(str, latent_shape))
        if len(latent_shape) != 3:
            raise UserError(
                f"the network's input is {size}, but UNet takes images (height x width x channels); choose a network for clips"
            )
        unit = self.size_unit
        if latent_shape[0] % unit or latent_shape[1] % unit:
            raise UserError(
                f"the network's input is {size}, and {len(self.multipliers)} levels halve its size to 1/{unit}; change the "
                f"resolution so that both sides are multiples of {unit}, or give model.multipliers fewer levels"
            )

    def check_fields(self) -> None:
        """Raises a UserError if the fields do not fit one another."""
        if self.remat not in ("auto", *self.remat_policies):
            raise UserError(f"model.remat is {self.remat!r}; it must be one of auto, {', '.join(self.remat_policies)}")
        if self.attention not in IMPLEMENTATIONS:
            raise UserError(f"model.attention is {self.attention!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
        for name in ("channels", "num_res_blocks", "norm_groups", "out_channels"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_classes", "context_width", "low_res_channels", "heads", "head_width"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 0")
        if self.channels % 2:
            raise UserError(f"model.channels is {self.channels}; it must be even, for the cosines and sines of the time")
        if not self.multipliers or min(self.multipliers) <= 0:
            raise UserError(f"model.multipliers is {self.multipliers}; give a positive number for each level, as in (1, 2, 4)")
        for multiplier, width in zip(self.multipliers, self.widths, strict=True):
            if width != self.channels * multiplier or width % self.norm_groups:
                raise UserError(
                    f"model.multipliers {multiplier} x model.channels {self.channels} = {self.channels * multiplier:g}, not a "
                    f"multiple of model.norm_groups {self.norm_groups}; change one of them"
                )
        self._check_attention()

    def _check_attention(self) -> None:
        factors = [2**level for level in range(len(self.multipliers))]
        if strange := sorted(set(self.attention_factors) - set(factors)):
            raise UserError(
                f"model.attention_factors has {strange[0]}, and the {len(factors)} levels have the factors "
                f"{', '.join(map(str, factors))}; leave it out"
            )
        if bool(self.heads) == bool(self.head_width):
            raise UserError(
                f"model.heads is {self.heads} and model.head_width is {self.head_width}; set one of them, and the other to 0"
            )
        for width in self.attention_widths():
            name = "heads" if self.heads else "head_width"
            if width % getattr(self, name):
                raise UserError(
                    f"model.{name} = {getattr(self, name)} does not divide {width}, the channels of a level with attention; "
                    f"choose a divisor, or other model.channels"
                )
        if self.context_width and not self.num_classes:
            raise UserError(
                f"model.context_width is {self.context_width} and model.num_classes is 0: there is no label to attend to; "
                "set both, or neither"
            )

    def attention_widths(self) -> list[int]:
        """Channels of the attention layers; the middle always has one."""
        here = [width for level, width in enumerate(self.widths) if 2**level in self.attention_factors]
        return sorted({*here, self.widths[-1]})

    def num_tokens(self, latent_shape: Shape) -> int:
        """Pixels of the finest level."""
        height, width, _ = latent_shape
        return height * width

    def macs(self, latent_shape: Shape, cond_shapes: Mapping[str, Shape] | None = None) -> int:
        return sum(self.macs_by_part(latent_shape).values())

    def macs_by_part(self, latent_shape: Shape) -> dict[str, int]:
        """Multiply-adds of convolutions and matrix products, by part of the network.

        Norms, softmax and other elementwise operations are not counted; products with zero padding are.
        """
        height, width, channels = latent_shape
        embedding, pixels = 4 * self.channels, height * width
        parts = dict.fromkeys(("input", "time_embedding", "block", "downsample", "upsample", "attention", "output"), 0)
        parts["input"] = 9 * (channels + self.low_res_channels) * self.widths[0] * pixels
        parts["time_embedding"] = self.channels * embedding + embedding**2
        parts["output"] = 9 * self.widths[0] * self.out_channels * pixels
        for piece in itertools.chain.from_iterable(stage.pieces for stage in self.stages()):
            area = pixels // piece.factor**2
            if piece.kind == "attention":
                parts["attention"] += self._attention_macs(piece.features, area)
                continue
            after = {"block": area, "downsample": area // 4, "upsample": area * 4}[piece.kind]
            if piece.kind == "block" or self.resblock_updown:
                parts[piece.kind] += self._block_macs(piece, after)
            else:
                parts[piece.kind] += 9 * piece.inputs * piece.features * after
        return parts

    def _block_macs(self, piece: Piece, pixels: int) -> int:
        skip = piece.inputs * piece.features if piece.inputs != piece.features else 0
        vectors = 2 if self.scale_shift_norm else 1
        convolutions = 9 * piece.features * (piece.inputs + piece.features) * pixels
        return convolutions + skip * pixels + 4 * self.channels * vectors * piece.features

    def _attention_macs(self, width: int, tokens: int) -> int:
        itself = 4 * tokens * width**2 + 2 * tokens**2 * width
        if not self.context_width:
            return itself
        # The context is one token: its average is a multiplication without a sum, which is not counted.
        cross = 2 * tokens * width**2 + 2 * self.context_width * width + tokens * width
        return 2 * tokens * width**2 + itself + cross + 3 * MLP_RATIO * tokens * width**2

    def activation_bytes(self, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int]) -> int:
        """Lower bound; the mesh's axes tensor and sequence do not split a U-Net's activations, except those of attention."""
        pixels, remat, numbers = self.num_tokens(latent_shape), remat_for(self.remat, "tpu"), 0
        for piece in itertools.chain.from_iterable(stage.pieces for stage in self.stages()):
            area = pixels // piece.factor**2
            after = {"downsample": area // 4, "upsample": area * 4}.get(piece.kind, area)
            numbers += piece.inputs * area
            if remat == "full" or (piece.kind in ("downsample", "upsample") and not self.resblock_updown):
                continue
            if piece.kind == "attention":
                numbers += 4 * piece.features * area // mesh_shape["tensor"]  # queries, keys, values and their attention
            else:  # the first convolution; without rematerialisation, the inputs of both
                numbers += (piece.features + (piece.inputs + piece.features) * (remat == "none")) * after
        return numbers * rows * jnp.dtype(self.dtype).itemsize

    def savings(self, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int], activations: int) -> dict[str, int]:
        saved = {}
        for policy, cost in (("elementwise", "recomputes elementwise operations"), ("full", "a third more arithmetic")):
            if self.remat == "none" or (policy == "full" and self.remat == "elementwise"):
                before = self.activation_bytes(latent_shape, rows, mesh_shape)
                after = self.clone(remat=policy).activation_bytes(latent_shape, rows, mesh_shape)
                saved[f"--config.model.remat={policy} ({cost})"] = int(activations * (1 - after / before))
        return saved

    def describe(self) -> str:
        heads = f"{self.heads} heads" if self.heads else f"heads of {self.head_width}"
        kind = "LDM" if self.context_width else "ADM"
        levels = " ".join(f"{multiplier:g}" for multiplier in self.multipliers)
        return f"{type(self).__name__} ({kind}) channels {self.channels} x {levels}, {heads} ({jnp.dtype(self.dtype).name})"

    def for_platform(self, platform: str) -> "UNet":
        kernels = {
            attention_kernel(self.attention, self.dtype, width // self.heads_of(width), platform)
            for width in self.attention_widths()
        }
        return self.clone(
            attention=kernels.pop() if len(kernels) == 1 else "xla", remat=remat_for(self.remat, platform), parent=None
        )
