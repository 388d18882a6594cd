"""Converts HDiT's weights to and from the layout of k-diffusion (`image_transformer_v2`).

D width of a level, F width of its feed-forward layer, H heads of width E, M mapping width, p patch, C channels. A linear layer's
weight is [out, in] in k-diffusion and [in, ...] in ours; the orders inside an axis are the same. k-diffusion's layers are
separate; ours are one stack for each level. k-diffusion stores the rotary frequencies; ours are computed.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from functools import lru_cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensor, Tensors, check, common_dtype
from dit_jax.models.hourglass import rope_frequencies

NETWORK = "hourglass"
LAYOUTS = ("official",)
PATCH, TABLE = "patch_in.proj.weight", "class_emb.weight"
NAMES = {  # our path: k-diffusion's name
    "patch_in/kernel": PATCH,
    "time_fourier/constant": "time_emb.weight",
    "time_embedding/kernel": "time_in_proj.weight",
    "augmentation_fourier/constant": "aug_emb.weight",
    "augmentation_embedding/kernel": "aug_in_proj.weight",
    "label_embedding/embedding": TABLE,
    "mapping/norm_in/scale": "mapping.in_norm.scale",
    "mapping/norm_out/scale": "mapping.out_norm.scale",
    "out_norm/scale": "out_norm.scale",
    "patch_out/kernel": "patch_out.proj.weight",
}
NUMBERED = (  # (pattern of our paths, k-diffusion's name)
    (r"mapping/block_(\d+)/norm/scale", r"mapping.blocks.\1.norm.scale"),
    (r"mapping/block_(\d+)/in/kernel", r"mapping.blocks.\1.up_proj.weight"),
    (r"mapping/block_(\d+)/out/kernel", r"mapping.blocks.\1.down_proj.weight"),
    (r"merge_(\d+)/kernel", r"merges.\1.proj.weight"),
    (r"split_(\d+)/kernel", r"splits.\1.proj.weight"),
    (r"split_(\d+)/share", r"splits.\1.fac"),
)
LAYER_NAMES = {  # our path inside a level, stacked: k-diffusion's name inside a layer
    "attention_norm/kernel": "self_attn.norm.linear.weight",
    "attention/qkv/kernel": "self_attn.qkv_proj.weight",
    "attention/scale": "self_attn.scale",
    "attention/out/kernel": "self_attn.out_proj.weight",
    "mlp_norm/kernel": "ff.norm.linear.weight",
    "mlp/in/kernel": "ff.up_proj.weight",
    "mlp/out/kernel": "ff.down_proj.weight",
}
FREQUENCIES = "self_attn.pos_emb.freqs"
LEVEL = re.compile(r"(down|up)_(\d+)/|(middle)/")
KINDS = {"neighborhood": "neighborhood", "shifted-window": "shifted_window", "global": "global"}
SIZES = {"neighborhood": "kernel_size", "shifted_window": "window_size"}  # the field of a kind


def recognises(names: Collection[str], layout: str) -> bool:
    """Whether tensors with these names are of k-diffusion's HDiT."""
    return layout in LAYOUTS and PATCH in names and "time_in_proj.weight" in names and "patch_out.proj.weight" in names


def read(tensors: Tensors, layout: str, what: str, config: Mapping[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Converts the tensors to ours, each read lazily; returns (our tensors, config sections).

    Args:
        config: k-diffusion's, as in the metadata of its .safetensors files: a dict, or {"config": its JSON}. The kinds of
            attention, the patch size and sigma_data are nowhere else.

    Raises:
        UserError: there is no config, it does not fit the tensors, or the network has parts that ours does not have.
    """
    config = _config(config, what)
    fields = _fields(tensors, config["model"], what)
    shapes = shapes_of(fields, tensors[PATCH].shape[1] // fields["patch_size"] ** 2, fields.pop("out_channels"))
    check(tensors, _expected(shapes, fields["head_width"]), what)
    for name in tensors:
        if name.endswith(FREQUENCIES):
            _check_frequencies(tensors[name], name, fields["head_width"], what)
    dtype = common_dtype({name: x for name, x in tensors.items() if not name.endswith(FREQUENCIES)}, what)
    sections = {
        "model": {"name": NETWORK, **fields, "param_dtype": dtype.name},
        **_input(config["model"], tensors[PATCH].shape[1]),
    }
    return {path: _gather(path, shape, tensors) for path, shape in shapes.items()}, sections


def write(
    tensors: Tensors, layout: str, model: Mapping[str, Any], latent_shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Converts our tensors to k-diffusion's, each read lazily; returns (tensors, k-diffusion's config).

    The config belongs into the metadata of the .safetensors file, as JSON under "config".

    Args:
        model: the fields of the network.
        latent_shape: (h, w, c) of its input.
    """
    theirs: dict[str, Tensor] = {}
    read_once = lru_cache(maxsize=1)(lambda path: tensors[path].load())  # the layers of a stack are read one after another
    for path, tensor in tensors.items():
        stacked = LEVEL.match(path) is not None
        for i, (name, shape) in enumerate(_parts(path, tensor.shape)):

            def load(path=path, shape=shape, i=i, stacked=stacked):
                return _to_theirs(path, read_once(path)[i] if stacked else read_once(path), shape)

            theirs[name] = Tensor(_their_shape(path, shape), tensor.dtype, load)
            if path.endswith("attention/scale"):
                table = rope_frequencies(shape[0], model["head_width"]).astype(np.float32).astype(tensor.dtype)
                theirs[name.replace("self_attn.scale", FREQUENCIES)] = Tensor(
                    table.shape, table.dtype, partial(np.asarray, table)
                )
    return theirs, _their_config(model, latent_shape, tensors)


def shapes_of(fields: Mapping[str, Any], channels: int, out_channels: int) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path, of a network with these fields."""
    p, m, e = fields["patch_size"], fields["mapping_width"], fields["head_width"]
    widths, depths = fields["widths"], fields["depths"]
    shapes: dict[str, tuple[int, ...]] = {
        "patch_in/kernel": (p * p * channels, widths[0]),
        "time_fourier/constant": (1, m // 2),
        "time_embedding/kernel": (m, m),
        "augmentation_fourier/constant": (9, m // 2),
        "augmentation_embedding/kernel": (m, m),
        "mapping/norm_in/scale": (m,),
        "mapping/norm_out/scale": (m,),
        "out_norm/scale": (widths[0],),
        "patch_out/kernel": (widths[0], p * p * out_channels),
    }
    if fields["num_classes"]:
        shapes["label_embedding/embedding"] = (fields["num_classes"] + 1, m)
    for i in range(fields["mapping_depth"]):
        shapes |= {
            f"mapping/block_{i}/norm/scale": (m,),
            f"mapping/block_{i}/in/kernel": (m, 2, 3 * m),
            f"mapping/block_{i}/out/kernel": (3 * m, m),
        }
    last = len(widths) - 1
    for i, (d, depth) in enumerate(zip(widths, depths, strict=True)):
        f, heads = int(d * fields["mlp_ratio"]), d // e
        for level in ["middle"] if i == last else [f"down_{i}", f"up_{i}"]:
            shapes |= {
                f"{level}/attention_norm/kernel": (depth, m, d),
                f"{level}/attention/qkv/kernel": (depth, d, 3, heads, e),
                f"{level}/attention/scale": (depth, heads),
                f"{level}/attention/out/kernel": (depth, heads, e, d),
                f"{level}/mlp_norm/kernel": (depth, m, d),
                f"{level}/mlp/in/kernel": (depth, d, 2, f),
                f"{level}/mlp/out/kernel": (depth, f, d),
            }
        if i < last:
            shapes |= {
                f"merge_{i}/kernel": (4 * d, widths[i + 1]),
                f"split_{i}/kernel": (widths[i + 1], 4 * d),
                f"split_{i}/share": (1,),
            }
    return shapes


def _config(config: Mapping[str, Any] | None, what: str) -> Mapping[str, Any]:
    """k-diffusion's config."""
    if config is not None and isinstance(config.get("config"), str):
        try:
            config = json.loads(config["config"])
        except ValueError:
            raise UserError(f"{what}: the `config` of its metadata is not JSON; download it again") from None
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping) or model.get("type") != "image_transformer_v2":
        kind = f"a model of type {model.get('type')!r}" if isinstance(model, Mapping) else "no config of k-diffusion"
        raise UserError(
            f"{what} has {kind}; HDiT's weights need one of type 'image_transformer_v2', which says the kinds of attention: in "
            "the metadata of the .safetensors file, or as config.json beside it"
        )
    assert config is not None
    return config


def _fields(tensors: Tensors, model: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields of our network, from the tensors where they determine them, else from k-diffusion's config."""
    if missing := [name for name in (PATCH, "patch_out.proj.weight", "time_in_proj.weight") if name not in tensors]:
        raise UserError(f"{what} is not k-diffusion's HDiT: {', '.join(missing)} is missing")
    for name, allowed in (("mapping_cond_dim", (0, None)), ("has_variance", (False, None)), ("augment_wrapper", (False, None))):
        if model.get(name) not in allowed:
            raise UserError(f"{what}: model.{name} is {model[name]!r} in its config, and this network has no such input")
    patch, widths, depths = model.get("patch_size"), model.get("widths"), model.get("depths")
    if not isinstance(patch, list | tuple) or len({*patch}) != 1 or len(patch) != 2:
        raise UserError(f"{what}: patch_size is {patch} in its config; [p, p] is needed")
    if not widths or not depths or len(widths) != len(depths):
        raise UserError(f"{what}: widths are {widths} and depths {depths} in its config; both need one number for each level")
    attentions, sizes, head_width = _attentions(model, len(widths), what)
    d_ffs = model.get("d_ffs") or [3 * width for width in widths]
    ratios = {d_ff / width for d_ff, width in zip(d_ffs, widths, strict=True)}
    mapping_width = model.get("mapping_width") or 256
    if len(ratios) != 1 or (model.get("mapping_d_ff") or 3 * mapping_width) != 3 * mapping_width:
        raise UserError(
            f"{what}: d_ffs are {d_ffs} for the widths {widths} and mapping_d_ff is {model.get('mapping_d_ff')}; one ratio for "
            "all levels, and 3 for the mapping network, are supported"
        )
    rows = tensors[TABLE].shape[0] if TABLE in tensors else 1
    features, p = tensors["patch_out.proj.weight"].shape[0], patch[0]
    if features % (p * p) or tensors[PATCH].shape[1] % (p * p):
        raise UserError(f"{what}: {PATCH} is {list(tensors[PATCH].shape)}, which is no network of patches {p} x {p}")
    return {
        "patch_size": p,
        "widths": tuple(widths),
        "depths": tuple(depths),
        "num_classes": rows - 1,
        "attentions": attentions,
        **sizes,
        "head_width": head_width,
        "mlp_ratio": ratios.pop(),
        "mapping_width": mapping_width,
        "mapping_depth": 2 if model.get("mapping_depth") is None else model["mapping_depth"],
        "out_channels": features // (p * p),
    }


def _attentions(model: Mapping[str, Any], levels: int, what: str) -> tuple[tuple[str, ...], dict[str, int], int]:
    """(kind of each level, {"kernel_size": .., "window_size": ..}, width of a head)."""
    default: list[dict[str, Any]] = [{"type": "neighborhood", "d_head": 64, "kernel_size": 7}] * (levels - 1)
    default.append({"type": "global", "d_head": 64})
    specs = model.get("self_attns") or default
    kinds = [KINDS.get(str(spec.get("type"))) for spec in specs]
    sizes: dict[str, set[int]] = {field: set() for field in SIZES.values()}
    for kind, spec in zip(kinds, specs, strict=True):
        if kind in SIZES:
            sizes[SIZES[kind]].add(spec[SIZES[kind]])
    heads = {spec.get("d_head", 64) for spec in specs}
    if len(specs) != levels or None in kinds or len(heads) != 1 or any(len(found) > 1 for found in sizes.values()):
        raise UserError(
            f"{what}: self_attns are {specs} in its config; one of {', '.join(KINDS)} for each of {levels} levels is supported, "
            "with one d_head, kernel_size and window_size"
        )
    return tuple(map(str, kinds)), {field: found.pop() for field, found in sizes.items() if found}, heads.pop()


def _input(model: Mapping[str, Any], features: int) -> dict[str, Any]:
    """The sections of k-diffusion's denoiser and of its input, images in [-1, 1]; `sigma_data` is 1 if it is not given.

    features: of a patch.
    """
    noise = {name: float(model[name]) for name in ("sigma_data", "sigma_min", "sigma_max") if name in model}
    channels = features // model["patch_size"][0] ** 2
    transform: dict[str, Any] = {"name": "image", "channels": channels, "flip": True}
    if side := model.get("input_size"):
        height, width = (side, side) if isinstance(side, int) else side
        transform |= {"resolution": height} | ({"size": (height, width)} if height != width else {})
    return {
        "process": {"name": "edm", "sigma_data": 1.0, **noise},
        "codec": {"name": "pixels", "image_channels": channels, "mean": 0.0, "std": 1.0},
        "sampler": "dpmpp_3m_sde",
    } | ({"transform": transform} if "resolution" in transform else {})


def _check_frequencies(tensor: Tensor, name: str, head_width: int, what: str) -> None:
    """Raises unless the stored rotary frequencies are those that our network computes."""
    wanted = rope_frequencies(tensor.shape[0], head_width)
    error = float(np.abs(tensor.load().astype(np.float64) / wanted - 1).max())
    if not error <= max(1e-5, float(jnp.finfo(tensor.dtype).eps)):
        raise UserError(
            f"{what}: {name} differs by {error:.3g} from the frequencies that HDiT computes; others are not supported"
        )


def _parts(path: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """[(k-diffusion's name, shape of our part)]: one entry, or one for each layer of a level."""
    if path in NAMES:
        return [(NAMES[path], shape)]
    for pattern, name in NUMBERED:
        if match := re.fullmatch(pattern, path):
            return [(match.expand(name), shape)]
    level = LEVEL.match(path)
    if level is None:
        raise KeyError(path)
    prefix = "mid_level" if level[3] else f"{level[1]}_levels.{level[2]}"
    return [(f"{prefix}.{i}.{LAYER_NAMES[path[level.end() :]]}", shape[1:]) for i in range(shape[0])]


def _expected(shapes: Mapping[str, tuple[int, ...]], head_width: int) -> dict[str, tuple[int, ...]]:
    """k-diffusion's names and shapes, from the shapes of our parameters."""
    layout = {}
    for path, shape in shapes.items():
        for name, part in _parts(path, shape):
            layout[name] = _their_shape(path, part)
            if path.endswith("attention/scale"):
                layout[name.replace("self_attn.scale", FREQUENCIES)] = (part[0], head_width // 8)
    return layout


def _is_linear(path: str) -> bool:
    return path.endswith(("kernel", "constant"))


def _their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not _is_linear(path):
        return shape
    inputs = 2 if path.endswith("attention/out/kernel") else 1  # contracted leading axes of our kernel
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def _to_theirs(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(_their_shape(path, shape)[::-1]).T if _is_linear(path) else array.reshape(shape)


def _gather(path: str, shape: tuple[int, ...], tensors: Tensors) -> Tensor:
    """One of our parameters, of k-diffusion's tensors."""
    each, stacked = _parts(path, shape), LEVEL.match(path) is not None
    dtype = tensors[each[0][0]].dtype

    def load():
        arrays = [tensors[name].load() for name, _ in each]
        arrays = [(array.T if _is_linear(path) else array).reshape(part) for array, (_, part) in zip(arrays, each, strict=True)]
        return np.stack(arrays) if stacked else arrays[0]

    return Tensor(shape, dtype, load)


def _their_config(model: Mapping[str, Any], latent_shape: tuple[int, ...], tensors: Tensors) -> dict[str, Any]:
    levels, names = len(model["widths"]), {ours: theirs for theirs, ours in KINDS.items()}
    kinds = model.get("attentions") or ("neighborhood",) * (levels - 1) + ("global",)
    specs = [{"type": names[kind], "d_head": model["head_width"]} for kind in kinds]
    for kind, spec in zip(kinds, specs, strict=True):
        if kind in SIZES:
            spec[SIZES[kind]] = model[SIZES[kind]]
    return {
        "model": {
            "type": "image_transformer_v2",
            "input_channels": latent_shape[-1],
            "input_size": list(latent_shape[:2]),
            "patch_size": [model["patch_size"]] * 2,
            "depths": list(model["depths"]),
            "widths": list(model["widths"]),
            "d_ffs": [int(width * model["mlp_ratio"]) for width in model["widths"]],
            "self_attns": specs,
            "mapping_width": model["mapping_width"],
            "mapping_depth": model["mapping_depth"],
        },
        "dataset": {"num_classes": model["num_classes"]},
    }
