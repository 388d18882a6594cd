"""Converts PixArt between the layout of its authors' code, that of diffusers (`PixArtTransformer2DModel`), and ours.

The authors' files store the table of positions, which ours computes and which says the resolution. They also store
`y_embedder.y_embedding`, random numbers that their code has in place of the empty text. These are left out, as in diffusers: the
null condition here is the encoding of "". diffusers' files have no table; `interpolation_scale` of the config scales the
positions, which is our `position_grid`.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dit_jax.errors import UserError
from dit_jax.interop.block_stacks import Link, mapped, their_shapes, to_ours, to_theirs
from dit_jax.interop.tensors import Tensor, Tensors, check, common_dtype
from dit_jax.models.pixart import CONTEXT, PixArt
from dit_jax.models.position import sincos_2d

NETWORK = "pixart"
LAYOUTS = ("official", "diffusers")
HINTS = {"heads": "num_attention_heads"}
HEAD_WIDTH = 72  # of all published sizes; the authors' files do not say it
PATCH = {"official": "x_embedder.proj", "diffusers": "pos_embed.proj"}
TABLE, NULL_TEXT = "pos_embed", "y_embedder.y_embedding"
SCALES = (1, 2)  # by which published networks divide positions
OUTER = {  # our module: the authors' name, diffusers'
    "patch_embedding": (PATCH["official"], PATCH["diffusers"]),
    "time_embedding/in": ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
    "time_embedding/out": ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
    "modulation": ("t_block.1", "adaln_single.linear"),
    "context_embedding/in": ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    "context_embedding/out": ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    "final": ("final_layer.linear", "proj_out"),
}
INNER = {  # of a block; modules that are fused here have several names
    "attention/qkv": ("attn.qkv", "attn1.to_q attn1.to_k attn1.to_v"),
    "attention/out": ("attn.proj", "attn1.to_out.0"),
    "cross_attention/query": ("cross_attn.q_linear", "attn2.to_q"),
    "cross_attention/key_value": ("cross_attn.kv_linear", "attn2.to_k attn2.to_v"),
    "cross_attention/out": ("cross_attn.proj", "attn2.to_out.0"),
    "mlp/in": ("mlp.fc1", "ff.net.0.proj"),
    "mlp/out": ("mlp.fc2", "ff.net.2"),
}
BLOCKS = {"official": "blocks.{}.", "diffusers": "transformer_blocks.{}."}
VECTORS = {
    "final_vectors": ("final_layer.scale_shift_table", "scale_shift_table"),
    "blocks/vectors": ("blocks.{}.scale_shift_table", "transformer_blocks.{}.scale_shift_table"),
}


def recognises(names: Collection[str], layout: str) -> bool:
    """Whether tensors with these names are of a PixArt in the layout."""
    which = LAYOUTS.index(layout)
    return {f"{OUTER[module][which]}.weight" for module in ("modulation", "context_embedding/in")} <= set(names)


def shapes_of(net: PixArt, channels: int) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path, for an input of so many channels."""
    x, cond = jnp.zeros((1, net.patch_size, net.patch_size, channels)), {CONTEXT: jnp.zeros((1, 1, net.context_width))}
    params = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), cond)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def links(shapes: Mapping[str, tuple[int, ...]], layout: str) -> dict[str, Link]:
    """{our path: its tensors}; the patch embedding is a linear layer here."""
    found, which = {}, LAYOUTS.index(layout)
    for path in shapes:
        if path in VECTORS:
            found[path] = Link((VECTORS[path][which],))
            continue
        module, kind = path.rsplit("/", 1)
        inner = module.removeprefix("blocks/")
        names = [BLOCKS[layout] + name for name in INNER[inner][which].split()] if inner != module else [OUTER[module][which]]
        inputs = {"kernel": 2 if inner.endswith("attention/out") else 1}.get(kind, 0)
        found[path] = Link(tuple(name + (".bias" if kind == "bias" else ".weight") for name in names), inputs)
    return found


def read(
    tensors: Tensors, layout: str, what: str, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(our parameters, read lazily, the section "model" that tensors and config.json determine).

    Raises:
        UserError: the tensors or the config are not a PixArt that dit_jax computes.
    """
    config = _checked_config(tensors, layout, what, config)
    patch, text, final = (
        f"{OUTER[name][LAYOUTS.index(layout)]}.weight" for name in ("patch_embedding", "context_embedding/in", "final")
    )
    table = [TABLE] if layout == "official" else []
    if missing := [name for name in (patch, text, final, *table) if name not in tensors]:
        raise UserError(f"{what} is not a PixArt: {', '.join(missing)} missing")
    width, channels, p, _ = tensors[patch].shape
    pattern = re.compile(re.escape(BLOCKS[layout].split("{}")[0]) + r"(\d{1,9})\.")
    depth = 1 + max(int(m[1]) for m in map(pattern.match, tensors) if m)
    if layout == "official":
        side, scale, heads = *_positions(tensors[TABLE], p, what), config.get("num_attention_heads") or _heads(width, what)
    else:
        side, heads = config.get("sample_size", 128), config.get("num_attention_heads", 16)
        scale = config.get("interpolation_scale") or max(side // 64, 1)
    grid = None if scale == 1 else (round(side / p / scale),) * 2
    net = PixArt(p, depth, width, heads, tensors[final].shape[0] // p**2, tensors[text].shape[1], position_grid=grid)
    shapes = shapes_of(net, channels)
    known = links(shapes, layout)
    kept = {name: tensor for name, tensor in tensors.items() if layout != "official" or name not in (TABLE, NULL_TEXT)}
    check(kept, their_shapes(known, shapes) | {patch: (width, channels, p, p)}, what)
    flat = (width, p * p * channels)
    own = {**kept, patch: mapped(kept[patch], lambda x: x.transpose(0, 2, 3, 1).reshape(flat), flat)}
    fields = {"patch_size": p, "depth": depth, "width": width, "heads": heads, "context_width": net.context_width}
    fields |= {"position_grid": grid, "dtype": "float32", "param_dtype": common_dtype(kept, what).name}
    return to_ours(known, shapes, own), {"model": {"name": NETWORK, **fields}, "input_side": side}


def _checked_config(tensors: Tensors, layout: str, what: str, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """config.json of diffusers' folder; what is known beside the authors' file.

    Raises:
        UserError: there is none, or the network has the size and aspect ratio of the image as a condition.
    """
    if layout == "diffusers" and config is None:
        raise UserError(f"{what} needs the config.json of its folder; copy it from where the weights came from")
    config = config or {}
    other_norm = layout == "diffusers" and config.get("norm_type", "ada_norm_single") != "ada_norm_single"
    if other_norm or config.get("use_additional_conditions") or any(name.startswith("csize_embedder.") for name in tensors):
        raise UserError(
            f"{what}: a PixArt with use_additional_conditions (csize_embedder), or with another norm than ada_norm_single, is "
            "not read"
        )
    return config


def _heads(width: int, what: str) -> int:
    if width % HEAD_WIDTH:
        raise UserError(
            f"{what} does not say its number of heads, and its width {width} is no multiple of {HEAD_WIDTH}; give --heads"
        )
    return width // HEAD_WIDTH


def _positions(tensor: Tensor, patch: int, what: str) -> tuple[int, int]:
    """(side of the input, what positions are divided by), of the authors' table of positions.

    Raises:
        UserError: it is none of the tables that are computed here.
    """
    table = tensor.load().astype(np.float32)
    rows = math.isqrt(table.shape[1])
    if table.ndim == 3 and len(table) == 1 and rows**2 == table.shape[1]:
        tolerance = max(1e-5, float(jnp.finfo(tensor.dtype).eps))
        for scale in SCALES:
            if rows % scale == 0 and np.abs(table[0] - _table(table.shape[2], rows, scale)).max() <= tolerance:
                return rows * patch, scale
    raise UserError(
        f"{what}: its table of positions {list(table.shape)} is not the sine-cosine one of a square, with a scale of "
        f"{' or '.join(map(str, SCALES))}"
    )


def _table(width: int, rows: int, scale: int) -> np.ndarray:
    return sincos_2d(width, rows, rows, (rows // scale, rows // scale))


def write(
    tensors: Tensors, layout: str, model: Mapping[str, Any], latent_shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(their tensors, config.json of diffusers or None), of our parameters.

    Raises:
        UserError: the layout cannot represent the network.
    """
    height, width, channels = latent_shape
    p, features = model["patch_size"], tensors["patch_embedding/bias"].shape[0]
    grid = model.get("position_grid")
    if height != width or model.get("mlp_ratio", 4.0) != 4 or (grid is not None and grid[0] != grid[1]):
        raise UserError("both layouts need a square input, mlp_ratio 4 and a square position_grid; write --to=dit_jax")
    theirs = to_theirs(links({path: tensor.shape for path, tensor in tensors.items()}, layout), tensors)
    patch, shape = f"{PATCH[layout]}.weight", (features, channels, p, p)
    theirs[patch] = mapped(theirs[patch], lambda x: x.reshape(features, p, p, channels).transpose(0, 3, 1, 2), shape)
    if layout == "official":
        rows = height // p
        table = sincos_2d(features, rows, rows, grid)[None].astype(tensors["final/bias"].dtype)
        return theirs | {TABLE: Tensor(table.shape, table.dtype, lambda: table)}, None
    config = {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": model["heads"],
        "attention_head_dim": features // model["heads"],
        "in_channels": channels,
        "out_channels": tensors["final/bias"].shape[0] // p**2,
        "num_layers": tensors["blocks/vectors"].shape[0],
        "sample_size": height,
        "patch_size": p,
        "cross_attention_dim": features,
        "caption_channels": tensors["context_embedding/in/kernel"].shape[0],
        "interpolation_scale": 1 if grid is None else height // p // grid[0],
        "use_additional_conditions": False,
        "norm_type": "ada_norm_single",
    }
    return theirs, config
