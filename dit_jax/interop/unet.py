"""U-Nets in the layouts of guided-diffusion (ADM), of CompVis' latent-diffusion (LDM), and of diffusers.

Layouts:
    official: of ADM, the tensors of `guided_diffusion.unet.UNetModel`; of LDM, those of `LatentDiffusion`: the network under
        `model.diffusion_model.`, and the class table `cond_stage_model.embedding.weight`. Of a whole checkpoint of LDM the other
        tensors (first stage, schedule) are left out, and the moving average `model_ema.` is preferred, as LDM's sampling does.
    diffusers: `UNet2DModel` for ADM, `UNet2DConditionModel` for LDM, with their config.json. diffusers has no place for LDM's
        class table, so it keeps the name that it has in the official layout; `from_pretrained` ignores it with a warning.

The order of the rows of ADM's `qkv`, [3 C, C, 1], is not visible in a file: "legacy", (head, {q, k, v}, E), is the default of
guided-diffusion, and all released models have it except ADM@64, which has the "new" order, ({q, k, v}, head, E). LDM has the
legacy order where it has this module. The order is that of ADM@64 for tensors of its shapes, and else the legacy one, unless
`config` says "use_new_attention_order". A converter that assumes one order for all files is silently wrong for the others.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensor, Tensors, check, common_dtype
from dit_jax.models.convolutional import MLP_RATIO
from dit_jax.models.unet import PUBLISHED, Piece, Stage, UNet

NETWORK = "unet"
LAYOUTS = ("official", "diffusers")
# What tensors may not say: our fields, and their names in the config of `read`.
HINTS = {"heads": "num_heads", "head_width": "num_head_channels", "num_classes": "num_classes"}
LDM_PREFIX, LDM_AVERAGE = "model.diffusion_model.", "model_ema."
LDM_TABLE = "cond_stage_model.embedding.weight"
ADM_LABELS = "label_emb.weight"
CLASSES = {False: "UNet2DModel", True: "UNet2DConditionModel"}  # of diffusers, by whether there is a context
PLACE = 'JSON under "config" in the metadata of a .safetensors file'
USUAL_CLASSES = (10, 100, 200, 365, 1_000, 21_841, 21_843)
OUTER = {  # our module: official name, diffusers' name
    "time_embedding/in": ("time_embed.0", "time_embedding.linear_1"),
    "time_embedding/out": ("time_embed.2", "time_embedding.linear_2"),
    "input/conv": ("input_blocks.0.0", "conv_in"),
    "output/norm": ("out.0", "conv_norm_out"),
    "output/conv": ("out.2", "conv_out"),
}
BLOCK = {  # of a residual block
    "norm_1": ("in_layers.0", "norm1"),
    "conv_1": ("in_layers.2", "conv1"),
    "embedding": ("emb_layers.1", "time_emb_proj"),
    "norm_2": ("out_layers.0", "norm2"),
    "conv_2": ("out_layers.3", "conv2"),
    "skip": ("skip_connection", "conv_shortcut"),
}
TRANSFORMER = {  # of LDM's transformer: the same names in both layouts
    "norm": ("norm",),
    "proj_in": ("proj_in",),
    "norm_self": ("transformer_blocks.0.norm1",),
    "self_attention/qkv": tuple(f"transformer_blocks.0.attn1.to_{x}" for x in "qkv"),
    "self_attention/out": ("transformer_blocks.0.attn1.to_out.0",),
    "norm_cross": ("transformer_blocks.0.norm2",),
    "cross_attention/query": ("transformer_blocks.0.attn2.to_q",),
    "cross_attention/key_value": tuple(f"transformer_blocks.0.attn2.to_{x}" for x in "kv"),
    "cross_attention/out": ("transformer_blocks.0.attn2.to_out.0",),
    "norm_mlp": ("transformer_blocks.0.norm3",),
    "mlp/in": ("transformer_blocks.0.ff.net.0.proj",),
    "mlp/out": ("transformer_blocks.0.ff.net.2",),
    "proj_out": ("proj_out",),
}


FIXED: dict[str, Any] = {  # fields of diffusers' config.json with the only value that is read; they may be missing
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
}
FIXED_ADM = FIXED | {"add_attention": True, "mid_block_type": ("UNetMidBlock2D",)}
FIXED_LDM = FIXED | {
    "addition_embed_type": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}


class Link(NamedTuple):
    """One of our parameters and the tensors that hold it.

    Fields:
        kind: "convolution" (OIHW there, HWIO here), "matrix" ([out, in] there, perhaps with axes of size 1) or "plain".
        shape: of our parameter.
        names: of their tensors, whose rows are joined.
        theirs: the shape of each.
        legacy_heads: heads of a `qkv` whose rows are in the legacy order; 0 for others.
    """

    kind: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    theirs: tuple[int, ...]
    legacy_heads: int = 0

    def to_ours(self, arrays: list[np.ndarray]) -> np.ndarray:
        array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        if self.legacy_heads:  # (head, {q, k, v}, E) -> ({q, k, v}, head, E)
            array = array.reshape(self.legacy_heads, 3, -1, *array.shape[1:]).swapaxes(0, 1)
        if self.kind == "convolution":
            return array.transpose(2, 3, 1, 0)
        return (array.reshape(-1, self.theirs[1]).T if self.kind == "matrix" else array).reshape(self.shape)

    def to_theirs(self, array: np.ndarray) -> list[np.ndarray]:
        rows = len(self.names) * self.theirs[0]
        if self.kind == "convolution":
            array = array.transpose(3, 2, 0, 1)
        elif self.kind == "matrix":
            array = array.reshape(-1, rows).T
        array = array.reshape(rows, -1)
        if self.legacy_heads:
            array = array.reshape(3, self.legacy_heads, -1, array.shape[1]).swapaxes(0, 1).reshape(rows, -1)
        return [part.reshape(self.theirs) for part in np.split(array, len(self.names))]


def recognises(names: Collection[str], layout: str) -> bool:
    """Whether tensors of these names are a U-Net in this layout."""
    if layout == "official":
        return any(name.removeprefix(LDM_PREFIX) == "input_blocks.0.0.weight" for name in names)
    return {"conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.time_emb_proj.weight"} <= set(names)


def read(
    tensors: Tensors, layout: str, what: str, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our parameters, read lazily, and the config sections that the tensors determine: "model", "process" and perhaps "task".

    Args:
        what: the file, for error messages.
        config: of "diffusers", config.json; of "official", what the tensors do not say, as `write` returns it: num_heads or
            num_head_channels (known for the published sizes), use_new_attention_order, low_res_channels (of other images than
            RGB), and num_classes, where the label table may or may not have a row for the null label.

    Raises:
        UserError: the tensors or the config are not a U-Net that dit_jax computes, or do not say enough.
    """
    if layout == "official":
        config = config or {}
        tensors = _without_prefix(tensors, what)
        fields, channels = _infer(tensors, what, config)
    else:
        if config is None:
            raise UserError(f"{what} needs the config.json of its folder; copy it from where the weights came from")
        fields, channels = _of_diffusers(tensors, what, config)
    network = UNet(**fields)
    network.check_fields()
    dtype = common_dtype(tensors, what)
    found = links(network, layout, channels, _is_legacy(fields, config))
    check(tensors, {name: link.theirs for link in found.values() for name in link.names}, what)
    process: dict[str, Any] = {"name": "gaussian", "num_timesteps": 1000, "prediction": "noise"}
    process["schedule"] = "cosine" if _same_sizes(fields, "ADM@64") else "linear"
    if network.context_width:
        process |= {"schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    process["variance"] = "learned_range" if fields["out_channels"] == 2 * channels else "fixed_small"
    model = {name: value for name, value in fields.items() if name != "out_channels"}
    more = {"attention": "auto", "remat": "auto", "dtype": "float32", "param_dtype": dtype.name}
    sections: dict[str, Any] = {"model": {"name": NETWORK, **model, **more}, "process": process}
    if network.num_classes and not network.null_label:
        sections["task"] = {"name": "diffusion", "cond_dropout": 0.0}
    return {path: _gathered(link, tensors, dtype) for path, link in found.items()}, sections


def write(
    tensors: Tensors, layout: str, model: Mapping[str, Any], latent_shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(their tensors, their config), of our parameters: config.json of diffusers' folder, or what official tensors do not say.

    Args:
        model: the section "model" of their config.
        latent_shape: (h, w, c) of the network's input.

    Raises:
        UserError: the layout cannot represent the network.
    """
    ignored = ("name", "dtype", "param_dtype", "attention", "remat")
    fields: dict[str, Any] = {name: value for name, value in model.items() if name not in ignored}
    channels = latent_shape[-1]
    fields["out_channels"] = tensors["output/conv/bias"].shape[0]
    network = UNet(**fields)
    network.check(latent_shape)
    legacy = _is_legacy(fields, {})
    if layout == "diffusers":
        config = _config(network, latent_shape)
    else:
        if network.norm_groups != 32:
            raise UserError(f"model.norm_groups is {network.norm_groups}, and the papers' code has 32; write --to=diffusers")
        config = {"num_heads": network.heads, "num_head_channels": network.head_width, "use_new_attention_order": not legacy}
        config |= {"low_res_channels": network.low_res_channels, "num_classes": network.num_classes}
    found = links(network, layout, channels, legacy)
    check(tensors, {path: link.shape for path, link in found.items()}, "the network")
    theirs: dict[str, Tensor] = {}
    for path, link in found.items():
        for i, name in enumerate(link.names):
            theirs[name] = _part(link, tensors[path], i)
    if layout == "official" and network.context_width:
        theirs = {name if name == LDM_TABLE else LDM_PREFIX + name: tensor for name, tensor in theirs.items()}
    return theirs, config


def links(network: UNet, layout: str, channels: int, legacy: bool) -> dict[str, Link]:
    """{our path: its tensors}, for an input of so many channels.

    Args:
        legacy: the order of the rows of `qkv` in the layout "official".
    """
    official, found = layout == "official", {}

    def add(path: str, names: tuple[str, ...], inputs: int, shape: tuple[int, ...], **more: Any) -> None:
        found.update(_layer(path, names, inputs, shape, **more))

    embedding, name = 4 * network.channels, (lambda path: (OUTER[path][not official],))
    add("time_embedding/in", name("time_embedding/in"), network.channels, (embedding,))
    add("time_embedding/out", name("time_embedding/out"), embedding, (embedding,))
    add("input/conv", name("input/conv"), channels + network.low_res_channels, (network.widths[0],), kernel=(3, 3))
    add("output/norm", name("output/norm"), 0, (network.widths[0],))
    add("output/conv", name("output/conv"), network.widths[0], (network.out_channels,), kernel=(3, 3))
    if network.num_classes:
        table = (network.num_classes + network.null_label, network.context_width or embedding)
        own = ADM_LABELS if official else "class_embedding.weight"
        found["label_embedding/embedding"] = Link("plain", table, (LDM_TABLE if network.context_width else own,), table)
    for stage, stem_of in _stems(network, official):
        for i, piece in enumerate(stage.pieces):
            found |= _piece(network, f"{stage.name}/{piece.name}", stem_of(piece, i), piece, official, legacy)
    return found


def _stems(network: UNet, official: bool) -> Iterator[tuple[Stage, Callable[[Piece, int], str]]]:
    """(stage, (piece, its place in the stage) -> the name of its module)."""
    entries = {"down": itertools.count(1), "up": itertools.count(), "middle": itertools.count()}
    levels = len(network.multipliers)
    for stage in network.stages():
        entry = next(entries[stage.side])

        def in_official(piece: Piece, i: int, side: str = stage.side, entry: int = entry) -> str:
            return {"down": f"input_blocks.{entry}.{i}", "up": f"output_blocks.{entry}.{i}", "middle": f"middle_block.{i}"}[side]

        def in_diffusers(piece: Piece, i: int, stage: Stage = stage) -> str:
            if stage.side == "middle":
                return ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")[i]
            level = stage.level if stage.side == "down" else levels - 1 - stage.level
            kinds = {"block": f"resnets.{stage.place}", "attention": f"attentions.{stage.place}"}
            kinds |= {"downsample": "downsamplers.0", "upsample": "upsamplers.0"}
            return f"{stage.side}_blocks.{level}.{kinds[piece.kind]}"

        yield stage, in_official if official else in_diffusers


def _layer(
    path: str,
    names: tuple[str, ...],
    inputs: int,
    shape: tuple[int, ...],
    *,
    kernel: tuple[int, ...] = (),
    bias: bool = True,
    legacy_heads: int = 0,
    ours: tuple[int, ...] = (),
) -> dict[str, Link]:
    """The links of a layer's kernel and bias; of a norm's scale and bias if `inputs` is 0.

    Args:
        shape: of our bias: the outputs.
        kernel: further axes of their weight: (3, 3) of a convolution, (1, 1) or (1,) of one that is a matrix.
        ours: the inputs of our kernel, if they are several axes.
    """
    outputs = int(np.prod(shape))
    rows = outputs // len(names)
    weights, biases = (tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    found = {}
    if not inputs:
        found[f"{path}/scale"] = Link("plain", shape, weights, (rows,))
    elif kernel == (3, 3):
        found[f"{path}/kernel"] = Link("convolution", (3, 3, inputs, *shape), weights, (rows, inputs, 3, 3))
    else:
        theirs = (rows, inputs, *kernel)
        found[f"{path}/kernel"] = Link("matrix", (*(ours or (inputs,)), *shape), weights, theirs, legacy_heads)
    if bias:
        found[f"{path}/bias"] = Link("plain", shape, biases, (rows,), legacy_heads)
    return found


def _piece(network: UNet, path: str, stem: str, piece: Piece, official: bool, legacy: bool) -> dict[str, Link]:
    if piece.kind == "attention":
        if network.context_width:
            return _transformer(network, path, stem, piece.features)
        return _attention(network, path, stem, piece.features, official, legacy)
    if piece.kind != "block" and not network.resblock_updown:
        own = "op" if official and piece.kind == "downsample" else "conv"
        return _layer(f"{path}/conv", (f"{stem}.{own}",), piece.inputs, (piece.features,), kernel=(3, 3))
    names = {ours: (f"{stem}.{theirs[not official]}",) for ours, theirs in BLOCK.items()}
    vectors = 2 if network.scale_shift_norm else 1
    inputs, features = piece.inputs, (piece.features,)
    found = _layer(f"{path}/norm_1", names["norm_1"], 0, (inputs,))
    found |= _layer(f"{path}/conv_1", names["conv_1"], inputs, features, kernel=(3, 3))
    found |= _layer(f"{path}/embedding", names["embedding"], 4 * network.channels, (vectors, *features))
    found |= _layer(f"{path}/norm_2", names["norm_2"], 0, features)
    found |= _layer(f"{path}/conv_2", names["conv_2"], piece.features, features, kernel=(3, 3))
    if inputs != piece.features:
        found |= _layer(f"{path}/skip", names["skip"], inputs, features, kernel=(1, 1))
    return found


def _attention(network: UNet, path: str, stem: str, width: int, official: bool, legacy: bool) -> dict[str, Link]:
    count = network.heads_of(width)
    heads = (count, width // count)
    found = _layer(f"{path}/norm", (f"{stem}.norm" if official else f"{stem}.group_norm",), 0, (width,))
    names = (f"{stem}.qkv",) if official else tuple(f"{stem}.to_{x}" for x in "qkv")
    kernel, order = ((1,) if official else ()), (count if official and legacy else 0)
    found |= _layer(f"{path}/qkv", names, width, (3, *heads), kernel=kernel, legacy_heads=order)
    out = f"{stem}.proj_out" if official else f"{stem}.to_out.0"
    return found | _layer(f"{path}/out", (out,), width, (width,), kernel=kernel, ours=heads)


def _transformer(network: UNet, path: str, stem: str, width: int) -> dict[str, Link]:
    count = network.heads_of(width)
    heads, hidden = (count, width // count), MLP_RATIO * width
    layers: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {  # inputs, outputs
        "norm": (0, (width,), {}),
        "proj_in": (width, (width,), {"kernel": (1, 1)}),
        "norm_self": (0, (width,), {}),
        "self_attention/qkv": (width, (3, *heads), {"bias": False}),
        "self_attention/out": (width, (width,), {"ours": heads}),
        "norm_cross": (0, (width,), {}),
        "cross_attention/query": (width, heads, {"bias": False}),
        "cross_attention/key_value": (network.context_width, (2, *heads), {"bias": False}),
        "cross_attention/out": (width, (width,), {"ours": heads}),
        "norm_mlp": (0, (width,), {}),
        "mlp/in": (width, (2, hidden), {}),
        "mlp/out": (hidden, (width,), {}),
        "proj_out": (width, (width,), {"kernel": (1, 1)}),
    }
    found = {}
    for name, (inputs, outputs, more) in layers.items():
        theirs = tuple(f"{stem}.{own}" for own in TRANSFORMER[name])
        found |= _layer(f"{path}/{name}", theirs, inputs, outputs, **more)
    return found


def _gathered(link: Link, tensors: Tensors, dtype: np.dtype) -> Tensor:
    return Tensor(link.shape, dtype, lambda: link.to_ours([np.asarray(tensors[name].load()) for name in link.names]))


def _part(link: Link, tensor: Tensor, i: int) -> Tensor:
    return Tensor(link.theirs, tensor.dtype, lambda: link.to_theirs(np.asarray(tensor.load()))[i])


def _without_prefix(tensors: Tensors, what: str) -> dict[str, Tensor]:
    """The network's tensors and the class table, without LDM's prefix; of its moving average, if there is one.

    Raises:
        UserError: the moving average lacks tensors.
    """
    inside = {name.removeprefix(LDM_PREFIX): name for name in tensors if name.startswith(LDM_PREFIX)}
    if not inside:
        return dict(tensors)
    if any(name.startswith(LDM_AVERAGE) for name in tensors):  # its names have no dots
        inside = {name: LDM_AVERAGE + f"diffusion_model.{name}".replace(".", "") for name in inside}
        if missing := [name for name in inside.values() if name not in tensors]:
            raise UserError(
                f"{what} has a moving average without {missing[0]}; remove {LDM_AVERAGE}* from it, or download it again"
            )
    kept = {name: tensors[own] for name, own in inside.items()}
    return kept | ({LDM_TABLE: tensors[LDM_TABLE]} if LDM_TABLE in tensors else {})


def _infer(tensors: Tensors, what: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """(fields of UNet, channels of its input) of official tensors; `tensors.check` checks what is not read here.

    Raises:
        UserError: the tensors are no such network, or more networks than one.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"{what} is not a U-Net of ADM or LDM: {name} is missing")
        return tensors[name].shape

    entries = 1 + max((int(name.split(".")[1]) for name in tensors if re.match(r"output_blocks\.\d{1,4}\.", name)), default=-1)
    resampling = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight")
    levels = 1 + len({match[1] for match in map(resampling.fullmatch, tensors) if match})
    blocks, rest = divmod(entries, levels)
    if rest or blocks < 2:
        raise UserError(f"{what} is not a U-Net of ADM or LDM: {entries} output blocks and {levels} levels")
    firsts = [f"input_blocks.{1 + level * blocks}" for level in range(levels)]
    channels = shape("time_embed.0.weight")[1]
    widths = [shape(f"{first}.0.out_layers.3.weight")[0] for first in firsts]
    attending = [any(name.startswith(f"{first}.1.") for name in tensors) for first in firsts]
    context = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    out_channels, inputs = shape("out.2.weight")[0], shape("input_blocks.0.0.weight")[1]
    fields: dict[str, Any] = {
        "channels": channels,
        "multipliers": _multipliers(widths, channels),
        "num_res_blocks": blocks - 1,
        "attention_factors": tuple(2**level for level in range(levels) if attending[level]),
        "scale_shift_norm": shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        "resblock_updown": f"input_blocks.{blocks}.0.op.weight" not in tensors,
        "context_width": shape(context)[1] if context in tensors else 0,
        "out_channels": out_channels,
        "low_res_channels": _low_res(inputs, out_channels, what, config),
    }
    if fields["context_width"]:
        fields |= _classes(shape(LDM_TABLE)[0], True, what, config)
    else:
        fields |= _classes(tensors[ADM_LABELS].shape[0] if ADM_LABELS in tensors else 0, False, what, config)
    return fields | _heads(fields, what, config), inputs - fields["low_res_channels"]


def _multipliers(widths: list[int], channels: int) -> tuple[float, ...]:
    return tuple(width // channels if width % channels == 0 else width / channels for width in widths)


def _low_res(inputs: int, outputs: int, what: str, config: Mapping[str, Any]) -> int:
    """Channels of the image to upsample. guided-diffusion's networks are for RGB: 6 inputs are two images."""
    if "low_res_channels" in config:
        return int(config["low_res_channels"])
    if (inputs, outputs) == (6, 6):
        return 3
    if outputs in (inputs, 2 * inputs):
        return 0
    raise UserError(
        f"{what} has {inputs} channels in and {outputs} out, which does not say how many of them are an image to upsample; give "
        f"low_res_channels in its config, {PLACE}"
    )


def _classes(rows: int, null: bool, what: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """{"num_classes", "null_label"} of a table of so many rows.

    null: whether the paper's table has a row for the null label.
    """
    classes = config.get("num_classes")
    if rows == 0:
        return {"num_classes": 0, "null_label": True}
    if classes is None:
        if (rows if null else rows - 1) in USUAL_CLASSES:
            raise UserError(
                f"{what} has a label table of {rows} rows, which may be {rows} classes, or {rows - 1} and the null label; give "
                f"--num_classes, or num_classes in its config, {PLACE}"
            )
        return {"num_classes": rows - null, "null_label": null}
    if rows - classes not in (0, 1):
        raise UserError(f"{what} has a label table of {rows} rows, and num_classes is {classes}; give {rows} or {rows - 1}")
    return {"num_classes": classes, "null_label": rows != classes}


def _same_sizes(fields: Mapping[str, Any], name: str) -> bool:
    """Whether fields are those of a published network, up to its classes, its output and its heads."""
    published = UNet(**PUBLISHED[name].fields)
    sizes = ("channels", "num_res_blocks", "scale_shift_norm", "resblock_updown", "context_width", "low_res_channels")
    same = all(fields.get(size, getattr(published, size)) == getattr(published, size) for size in sizes)
    return same and all(tuple(fields[size]) == tuple(getattr(published, size)) for size in ("multipliers", "attention_factors"))


def _heads(fields: Mapping[str, Any], what: str, config: Mapping[str, Any]) -> dict[str, int]:
    """{"heads", "head_width"}: of the config, or of the published network of these sizes."""
    heads, width = config.get("num_heads") or 0, config.get("num_head_channels") or 0
    if heads or width:
        return {"heads": heads, "head_width": width}
    for name, published in PUBLISHED.items():
        if _same_sizes(fields, name):
            network = UNet(**published.fields)
            return {"heads": network.heads, "head_width": network.head_width}
    raise UserError(
        f"{what}: the sizes are those of no published network ({', '.join(PUBLISHED)}), and tensors do not say the number of "
        f"attention heads; give --heads, or num_heads or num_head_channels in its config, {PLACE}"
    )


def _is_legacy(fields: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the rows of `qkv` are in the legacy order, see the module's docstring."""
    if "use_new_attention_order" in config:
        return not config["use_new_attention_order"]
    return not _same_sizes(fields, "ADM@64")


def _of_diffusers(tensors: Tensors, what: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """(fields of UNet, channels of its input) of a folder of diffusers.

    Raises:
        UserError: config.json is of another class or of a network that dit_jax does not compute; lists the fields.
    """
    kind = config.get("_class_name")
    if kind not in CLASSES.values():
        raise UserError(f"{what}: config.json describes a {kind!r:.100}, not a {' or '.join(CLASSES.values())}")
    is_ldm = kind == CLASSES[True]
    needed = ("block_out_channels", "down_block_types", "up_block_types", "in_channels", "out_channels", "attention_head_dim")
    if missing := [name for name in needed if config.get(name) is None]:
        raise UserError(f"{what}: config.json has no {', '.join(missing)}; copy it from where the weights came from")
    widths, inputs = list(config["block_out_channels"]), int(config["in_channels"])
    channels, levels = widths[0], range(len(widths))
    fields: dict[str, Any] = {
        "channels": channels,
        "multipliers": _multipliers(widths, channels),
        "num_res_blocks": config.get("layers_per_block", 2),
        "attention_factors": tuple(2**i for i in levels if "Attn" in config["down_block_types"][i]),
        "scale_shift_norm": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "resblock_updown": not is_ldm and config.get("downsample_type", "conv") == "resnet",
        "norm_groups": config.get("norm_num_groups", 32),
        "context_width": config.get("cross_attention_dim", 1280) if is_ldm else 0,
        "out_channels": config["out_channels"],
        "low_res_channels": config.get("low_res_channels", 0),
    }
    if is_ldm and LDM_TABLE not in tensors:
        raise UserError(
            f"{what} is a network with cross-attention and without LDM's class table ({LDM_TABLE}); only class-conditional "
            "networks are read, such as LDM's. Convert its original checkpoint with --from=official"
        )
    table = LDM_TABLE if is_ldm else "class_embedding.weight"
    fields |= _classes(tensors[table].shape[0] if table in tensors else 0, is_ldm, what, config)
    fields |= _heads_of_diffusers(widths, is_ldm, what, config["attention_head_dim"])
    wanted = _config(UNet(**fields), (64, 64, inputs - fields["low_res_channels"]))
    fixed = FIXED_LDM if is_ldm else FIXED_ADM
    given = fixed | {"norm_num_groups": 32, "layers_per_block": 2} | dict(config)
    problems = [
        f"{name} is {given.get(name)!r}, and dit_jax computes {value!r}"
        for name, value in wanted.items()
        if name != "sample_size" and _plain(given.get(name, value)) != _plain(value)
    ]
    if problems:
        raise UserError(f"{what}: config.json describes another network than dit_jax computes:\n  " + "\n  ".join(problems))
    return fields, inputs - fields["low_res_channels"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _heads_of_diffusers(widths: list[int], is_ldm: bool, what: str, given: Any) -> dict[str, int]:
    """{"heads", "head_width"}: attention_head_dim is a width in UNet2DModel, and a number of heads in UNet2DConditionModel."""
    if not is_ldm:
        return {"heads": 0, "head_width": int(given)}
    counts = [given] * len(widths) if isinstance(given, int) else list(given)
    per_head = {width / count for width, count in zip(widths, counts, strict=True)}
    if len(set(counts)) == 1:
        return {"heads": counts[0], "head_width": 0}
    if len(per_head) == 1:
        return {"heads": 0, "head_width": int(per_head.pop())}
    raise UserError(
        f"{what}: attention_head_dim is {given} for the channels {widths}; one number of heads is needed, or one width of heads"
    )


def _config(network: UNet, latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """diffusers' config.json of a network.

    Raises:
        UserError: diffusers' module cannot represent it.
    """
    is_ldm, levels = bool(network.context_width), len(network.multipliers)
    if network.widths[0] != network.channels:
        raise UserError(
            f"model.multipliers begins with {network.multipliers[0]}, and in diffusers the first level has as many channels "
            "as the time's table; write --to=official"
        )
    if is_ldm and network.resblock_updown:
        raise UserError("UNet2DConditionModel has no model.resblock_updown; write --to=official")
    attending = [2**level in network.attention_factors for level in range(levels)]
    heads: Any = [network.heads_of(width) for width in network.widths]
    if not is_ldm:
        each = {width // network.heads_of(width) for width in network.attention_widths()}
        if len(each) > 1:
            raise UserError(
                f"model.heads is {network.heads}, and UNet2DModel has heads of one width; these have {sorted(each)}. Write "
                "--to=official"
            )
        heads = each.pop()
    elif network.heads:
        heads = network.heads
    config: dict[str, Any] = {
        "_class_name": CLASSES[is_ldm],
        "sample_size": latent_shape[0] if latent_shape[0] == latent_shape[1] else list(latent_shape[:2]),
        "in_channels": latent_shape[2] + network.low_res_channels,
        "out_channels": network.out_channels,
        "block_out_channels": list(network.widths),
        "layers_per_block": network.num_res_blocks,
        "attention_head_dim": heads,
        "norm_num_groups": network.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift_norm else "default",
        **(FIXED_LDM if is_ldm else FIXED_ADM),
    }
    if is_ldm:
        plain, attention = "{}Block2D", "CrossAttn{}Block2D"
        config["cross_attention_dim"] = network.context_width
    else:
        plain = "Resnet{}sampleBlock2D" if network.resblock_updown else "{}Block2D"
        attention = "Attn{}Block2D"
        sampling = "resnet" if network.resblock_updown else "conv"
        config |= {"downsample_type": sampling, "upsample_type": sampling, "attn_norm_num_groups": network.norm_groups}
        config["num_class_embeds"] = network.num_classes + network.null_label if network.num_classes else None
    kinds = [attention if here else plain for here in attending]
    config["down_block_types"] = [kind.format("Down") for kind in kinds]
    config["up_block_types"] = [kind.format("Up") for kind in reversed(kinds)]
    # diffusers ignores these two, which the tensors do not say.
    config |= {"num_classes": network.num_classes} if network.num_classes else {}
    return config | ({"low_res_channels": network.low_res_channels} if network.low_res_channels else {})
