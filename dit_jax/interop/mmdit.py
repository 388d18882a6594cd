"""Converts MM-DiT between Stability's layout (of Stable Diffusion 3 and 3.5), that of diffusers, and ours.

Stability's names begin with `model.diffusion_model.`, in files of the transformer alone and of a whole model, and so do those
that are written. Both layouts store the table of positions, which ours computes. diffusers has separate queries, keys and values.
Two of its layers have halves (scale, shift), which are (shift, scale) in Stability's and ours: `norm_out.linear`, and the last
`norm1_context.linear`.
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
from dit_jax.models.mmdit import CONTEXT, POOLED, MMDiT
from dit_jax.models.position import sincos_1d

NETWORK = "mmdit"
LAYOUTS = ("official", "diffusers")
PREFIX = "model.diffusion_model."
HEAD_WIDTH = 64
TABLE_BASE = 64
PATCH = {"official": "x_embedder.proj", "diffusers": "pos_embed.proj"}
POSITION = {"official": "pos_embed", "diffusers": "pos_embed.pos_embed"}
OUTER = {  # our module: Stability's, diffusers'
    "time_embedding/in": ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    "time_embedding/out": ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    "pooled_embedding/in": ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    "pooled_embedding/out": ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    "context_embedding": ("context_embedder", "context_embedder"),
    "final/modulation/linear": ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    "final/linear": ("final_layer.linear", "proj_out"),
}
INNER = {  # of a block; fused modules have three names in diffusers
    "modulation/linear": ("x_block.adaLN_modulation.1", "norm1.linear"),
    "context_modulation/linear": ("context_block.adaLN_modulation.1", "norm1_context.linear"),
    "qkv": ("x_block.attn.qkv", "attn.to_q attn.to_k attn.to_v"),
    "context_qkv": ("context_block.attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    "qkv_2": ("x_block.attn2.qkv", "attn2.to_q attn2.to_k attn2.to_v"),
    "out": ("x_block.attn.proj", "attn.to_out.0"),
    "context_out": ("context_block.attn.proj", "attn.to_add_out"),
    "out_2": ("x_block.attn2.proj", "attn2.to_out.0"),
    "mlp/in": ("x_block.mlp.fc1", "ff.net.0.proj"),
    "mlp/out": ("x_block.mlp.fc2", "ff.net.2"),
    "context_mlp/in": ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    "context_mlp/out": ("context_block.mlp.fc2", "ff_context.net.2"),
    "norm_query": ("x_block.attn.ln_q", "attn.norm_q"),
    "norm_key": ("x_block.attn.ln_k", "attn.norm_k"),
    "norm_query_context": ("context_block.attn.ln_q", "attn.norm_added_q"),
    "norm_key_context": ("context_block.attn.ln_k", "attn.norm_added_k"),
    "norm_query_2": ("x_block.attn2.ln_q", "attn2.norm_q"),
    "norm_key_2": ("x_block.attn2.ln_k", "attn2.norm_k"),
}
OUTPUTS = ("out", "out_2", "context_out")  # whose kernels are [heads, width of a head, D]
BLOCKS = {"official": "joint_blocks.{}.", "diffusers": "transformer_blocks.{}."}


def recognises(names: Collection[str], layout: str) -> bool:
    """Whether tensors with these names are of an MM-DiT in the layout."""
    if layout == "official":
        return any(name.removeprefix(PREFIX) == "joint_blocks.0.context_block.attn.qkv.weight" for name in names)
    return "transformer_blocks.0.attn.add_q_proj.weight" in names


def shapes_of(net: MMDiT, channels: int) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path, for an input of so many channels."""
    side = net.patch_size
    x, t = jnp.zeros((1, side, side, channels)), jnp.zeros(1)
    cond = {CONTEXT: jnp.zeros((1, 1, net.context_width)), POOLED: jnp.zeros((1, net.pooled_width))}
    params = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def links(net: MMDiT, shapes: Mapping[str, tuple[int, ...]], layout: str) -> dict[str, Link]:
    """{our path: its tensors}; the patch embedding is a linear layer here."""
    which = LAYOUTS.index(layout)
    starts = {"dual": 0, "blocks": net.dual_blocks, "last": net.depth - 1}
    found = {}
    for path in shapes:
        module, kind = path.rsplit("/", 1)
        stack, _, inner = module.partition("/")
        if stack in starts:
            names, start = [BLOCKS[layout] + name for name in INNER[inner][which].split()], starts[stack]
        else:
            names, start = [PATCH[layout] if module == "patch_embedding" else OUTER[module][which]], 0
        inputs = {"kernel": 2 if stack in starts and inner in OUTPUTS else 1}.get(kind, 0)
        found[path] = Link(tuple(name + (".bias" if kind == "bias" else ".weight") for name in names), inputs, start)
    return found


def read(
    tensors: Tensors, layout: str, what: str, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(our parameters, read lazily, the section "model" that the tensors determine).

    Raises:
        UserError: the tensors are not an MM-DiT that dit_jax computes.
    """
    if layout == "official":
        prefixed = any(name.startswith(PREFIX) for name in tensors)
        tensors = {name.removeprefix(PREFIX): x for name, x in tensors.items() if name.startswith(PREFIX) or not prefixed}
    net, channels = _infer(tensors, layout, what)
    shapes = shapes_of(net, channels)
    known = links(net, shapes, layout)
    expected = their_shapes(known, shapes)
    p, patch = net.patch_size, PATCH[layout] + ".weight"
    expected |= {patch: (net.width, channels, p, p), POSITION[layout]: (1, (net.table_side or 0) ** 2, net.width)}
    check(tensors, expected, what)
    _check_table(tensors[POSITION[layout]], net, what)
    shape = (net.width, p * p * channels)
    flat = {
        **tensors,
        patch: mapped(tensors[patch], lambda x: x.transpose(0, 2, 3, 1).reshape(shape), shape),
    }
    if layout == "diffusers":
        flat |= {name: _swapped(flat[name]) for name in _swaps(net)}
    fields = {name: getattr(net, name) for name in ("patch_size", "depth", "width", "heads", "context_width", "pooled_width")}
    fields |= {"qk_norm": net.qk_norm, "dual_blocks": net.dual_blocks, "position": "table", "table_side": net.table_side}
    trained = {name: x for name, x in tensors.items() if name != POSITION[layout]}
    fields |= {"table_base": TABLE_BASE, "dtype": "float32", "param_dtype": common_dtype(trained, what).name}
    return to_ours(known, shapes, flat), {"model": {"name": NETWORK, **fields}}


def write(
    tensors: Tensors, layout: str, model: Mapping[str, Any], latent_shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(their tensors, config.json of diffusers or None), of our parameters.

    Raises:
        UserError: the layout cannot represent the network.
    """
    ignored = ("name", "dtype", "param_dtype", "attention", "remat", "unroll")
    p, channels = model["patch_size"], latent_shape[-1]
    out_channels = tensors["final/linear/bias"].shape[0] // p**2
    net = MMDiT(**{name: value for name, value in model.items() if name not in ignored}, out_channels=out_channels)
    if net.position != "table" or net.table_side is None or net.mlp_ratio != 4 or net.width != HEAD_WIDTH * net.heads:
        raise UserError(
            "the layouts of Stability and diffusers need model.position = table, a model.table_side, mlp_ratio 4 and "
            f"heads of width {HEAD_WIDTH}; write --to=dit_jax"
        )
    shapes = {path: tensor.shape for path, tensor in tensors.items()}
    theirs = to_theirs(links(net, shapes, layout), tensors)
    patch = PATCH[layout] + ".weight"
    shape = (net.width, channels, p, p)
    theirs[patch] = mapped(theirs[patch], lambda x: x.reshape(net.width, p, p, channels).transpose(0, 3, 1, 2), shape)
    if layout == "diffusers":
        theirs |= {name: _swapped(theirs[name]) for name in _swaps(net)}
    dtype = tensors["final/linear/bias"].dtype
    table = _table(net).astype(dtype)[None]
    theirs[POSITION[layout]] = Tensor(table.shape, dtype, lambda: table)
    if layout == "official":
        return {PREFIX + name: x for name, x in theirs.items()}, None
    return theirs, _config(net, channels, latent_shape[0])


def _infer(tensors: Tensors, layout: str, what: str) -> tuple[MMDiT, int]:
    """(the network, its input's channels)."""
    block = BLOCKS[layout].format(0)
    names = {
        "patch": PATCH[layout] + ".weight",
        "position": POSITION[layout],
        "context": "context_embedder.weight",
        "pooled": OUTER["pooled_embedding/in"][LAYOUTS.index(layout)] + ".weight",
        "final": OUTER["final/linear"][LAYOUTS.index(layout)] + ".weight",
    }
    if missing := [name for name in names.values() if name not in tensors]:
        raise UserError(f"{what} is not an MM-DiT in this layout: {', '.join(missing)} missing")
    width, channels, p, _ = tensors[names["patch"]].shape
    pattern = re.compile(re.escape(BLOCKS[layout].split("{}")[0]) + r"(\d{1,9})\.(.*)")
    blocks = [match for match in map(pattern.match, tensors) if match]
    depth = 1 + max(int(match[1]) for match in blocks)
    dual = 1 + max((int(match[1]) for match in blocks if "attn2." in match[2]), default=-1)
    norm = block + INNER["norm_query"][LAYOUTS.index(layout)] + ".weight"
    net = MMDiT(
        patch_size=p,
        depth=depth,
        width=width,
        heads=width // HEAD_WIDTH,
        out_channels=tensors[names["final"]].shape[0] // p**2,
        context_width=tensors[names["context"]].shape[1],
        pooled_width=tensors[names["pooled"]].shape[1],
        qk_norm=norm in tensors,
        dual_blocks=dual,
        table_side=math.isqrt(tensors[names["position"]].shape[1]),
        table_base=TABLE_BASE,
    )
    return net, channels


def _table(net: MMDiT) -> np.ndarray:
    """[S^2, D] float32: the whole table of positions."""
    side = net.table_side or 0
    steps = np.arange(side) * (net.table_base / side)
    y, x = np.meshgrid(steps, steps, indexing="ij")
    return np.concatenate([sincos_1d(net.width // 2, axis.reshape(-1)) for axis in (x, y)], axis=1).astype(np.float32)


def _check_table(tensor: Tensor, net: MMDiT, what: str) -> None:
    error = float(np.abs(tensor.load()[0].astype(np.float32) - _table(net)).max())
    if not error <= max(1e-5, float(jnp.finfo(tensor.dtype).eps)):
        raise UserError(
            f"{what}: its table of positions differs by {error:.3g} from the sine-cosine one, which is supported alone"
        )


def _swapped(tensor: Tensor) -> Tensor:
    """The halves of the first axis exchanged."""
    return mapped(tensor, lambda x: np.roll(x, len(x) // 2, axis=0), tensor.shape)


def _swaps(net: MMDiT) -> list[str]:
    modules = ("norm_out.linear", f"transformer_blocks.{net.depth - 1}.norm1_context.linear")
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def _config(net: MMDiT, channels: int, side: int) -> dict[str, Any]:
    """config.json of `SD3Transformer2DModel`."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": side,
        "patch_size": net.patch_size,
        "in_channels": channels,
        "num_layers": net.depth,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": net.heads,
        "joint_attention_dim": net.context_width,
        "caption_projection_dim": net.width,
        "pooled_projection_dim": net.pooled_width,
        "out_channels": net.out_channels,
        "pos_embed_max_size": net.table_side,
        "dual_attention_layers": list(range(net.dual_blocks)),
        "qk_norm": "rms_norm" if net.qk_norm else None,
    }
