"""Converts PixArt-alpha between the layout of diffusers (`PixArtTransformer2DModel`) and ours.

There is no table of positions in the file. `interpolation_scale` of the config scales them, which is our `position_grid`.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from dit_jax.errors import UserError
from dit_jax.interop.block_stacks import Link, mapped, their_shapes, to_ours, to_theirs
from dit_jax.interop.tensors import Tensor, Tensors, check, common_dtype
from dit_jax.models.pixart import CONTEXT, PixArt

NETWORK = "pixart"
LAYOUTS = ("diffusers",)
PATCH = "pos_embed.proj"
OUTER = {  # our module: diffusers' name
    "patch_embedding": PATCH,
    "time_embedding/in": "adaln_single.emb.timestep_embedder.linear_1",
    "time_embedding/out": "adaln_single.emb.timestep_embedder.linear_2",
    "modulation": "adaln_single.linear",
    "context_embedding/in": "caption_projection.linear_1",
    "context_embedding/out": "caption_projection.linear_2",
    "final": "proj_out",
}
INNER = {  # of a block; fused modules have several names
    "attention/qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention/out": ("attn1.to_out.0",),
    "cross_attention/query": ("attn2.to_q",),
    "cross_attention/key_value": ("attn2.to_k", "attn2.to_v"),
    "cross_attention/out": ("attn2.to_out.0",),
    "mlp/in": ("ff.net.0.proj",),
    "mlp/out": ("ff.net.2",),
}
VECTORS = {"final_vectors": "scale_shift_table", "blocks/vectors": "transformer_blocks.{}.scale_shift_table"}


def recognises(names: Collection[str], layout: str) -> bool:
    """Whether tensors with these names are of a PixArt in the layout."""
    return layout in LAYOUTS and {"adaln_single.linear.weight", "caption_projection.linear_1.weight"} <= set(names)


def shapes_of(net: PixArt, channels: int) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path, for an input of so many channels."""
    x, cond = jnp.zeros((1, net.patch_size, net.patch_size, channels)), {CONTEXT: jnp.zeros((1, 1, net.context_width))}
    params = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), cond)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def links(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Link]:
    """{our path: its tensors}; the patch embedding is a linear layer here."""
    found = {}
    for path in shapes:
        if path in VECTORS:
            found[path] = Link((VECTORS[path],))
            continue
        module, kind = path.rsplit("/", 1)
        inner = module.removeprefix("blocks/")
        names = [f"transformer_blocks.{{}}.{name}" for name in INNER[inner]] if inner != module else [OUTER[module]]
        inputs = {"kernel": 2 if inner.endswith("attention/out") else 1}.get(kind, 0)
        found[path] = Link(tuple(name + (".bias" if kind == "bias" else ".weight") for name in names), inputs)
    return found


def read(
    tensors: Tensors, layout: str, what: str, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(our parameters, read lazily, the section "model" that tensors and config.json determine).

    Raises:
        UserError: the tensors or the config are not a PixArt-alpha that dit_jax computes.
    """
    if config is None:
        raise UserError(f"{what} needs the config.json of its folder; copy it from where the weights came from")
    if config.get("use_additional_conditions") or config.get("norm_type", "ada_norm_single") != "ada_norm_single":
        raise UserError(
            f"{what}: a PixArt with use_additional_conditions, or with another norm than ada_norm_single, is not read"
        )
    patch, text, final = f"{PATCH}.weight", "caption_projection.linear_1.weight", "proj_out.weight"
    if missing := [name for name in (patch, text, final) if name not in tensors]:
        raise UserError(f"{what} is not a PixArt: {', '.join(missing)} missing")
    width, channels, p, _ = tensors[patch].shape
    depth = 1 + max(int(m[1]) for m in (re.match(r"transformer_blocks\.(\d{1,9})\.", name) for name in tensors) if m)
    heads, side = config.get("num_attention_heads", 16), config.get("sample_size", 128)
    scale = config.get("interpolation_scale") or max(side // 64, 1)
    grid = None if scale == 1 else (round(side / p / scale),) * 2
    net = PixArt(p, depth, width, heads, tensors[final].shape[0] // p**2, tensors[text].shape[1], position_grid=grid)
    shapes = shapes_of(net, channels)
    known = links(shapes)
    check(tensors, their_shapes(known, shapes) | {patch: (width, channels, p, p)}, what)
    flat = (width, p * p * channels)
    own = {**tensors, patch: mapped(tensors[patch], lambda x: x.transpose(0, 2, 3, 1).reshape(flat), flat)}
    fields = {"patch_size": p, "depth": depth, "width": width, "heads": heads, "context_width": net.context_width}
    fields |= {"position_grid": grid, "dtype": "float32", "param_dtype": common_dtype(tensors, what).name}
    return to_ours(known, shapes, own), {"model": {"name": NETWORK, **fields}, "input_side": side}


def write(
    tensors: Tensors, layout: str, model: Mapping[str, Any], latent_shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(their tensors, config.json), of our parameters.

    Raises:
        UserError: diffusers' module cannot represent the network.
    """
    height, width, channels = latent_shape
    p, features = model["patch_size"], tensors["patch_embedding/bias"].shape[0]
    grid = model.get("position_grid")
    if height != width or model.get("mlp_ratio", 4.0) != 4 or (grid is not None and grid[0] != grid[1]):
        raise UserError("diffusers' module needs a square input, mlp_ratio 4 and a square position_grid; write --to=dit_jax")
    theirs = to_theirs(links({path: tensor.shape for path, tensor in tensors.items()}), tensors)
    patch, shape = f"{PATCH}.weight", (features, channels, p, p)
    theirs[patch] = mapped(theirs[patch], lambda x: x.reshape(features, p, p, channels).transpose(0, 3, 1, 2), shape)
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
