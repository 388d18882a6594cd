"""Converts DINOv2's weights, from the published .pth or from transformers' `Dinov2Model`; sizes are inferred.

    python -m dit_jax.convert --download=dinov2-vitl14 --out=dinov2.safetensors
    python -m dit_jax.convert --from=dinov2 --weights=dinov2_vitl14_pretrain.pth --out=dinov2.safetensors
    python -m dit_jax.convert --from=dinov2 --weights=model.safetensors --out=dinov2.safetensors

The written file has the names of the .pth. The mask token is dropped; only training uses it.
"""

import math
import os
import re

import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensor, Tensors, check, common_dtype, open_converted
from dit_jax.metrics.dinov2 import HEAD_WIDTH, PATCH_SIZE

PATCH = "patch_embed.proj.weight"
# Regular expressions on transformers' names; query, key and value are concatenated separately.
FROM_TRANSFORMERS = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.w12."),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.w3."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
]
QKV = r"^encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$"


def from_published(tensors: Tensors, what: str) -> Tensors:
    """Renames the tensors of either layout to the names of the .pth, checks all of them and drops the mask token.

    Args:
        what: the file, for error messages.
    Raises:
        UserError: tensors are missing, extra or misshapen (all are listed), have several dtypes, or hold NaN or infinity.
    """
    if "embeddings.cls_token" in tensors:
        tensors = _from_transformers(tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
    return {name: tensors[name] for name in _check(tensors, what)}


def _from_transformers(tensors: Tensors) -> Tensors:
    renamed, joined = {}, {}
    for name, tensor in tensors.items():
        match = re.match(QKV, name)
        if match:
            block, part, kind = match.groups()
            joined.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[part] = tensor
            continue
        for pattern, replacement in FROM_TRANSFORMERS:
            new, count = re.subn(pattern, replacement, name)
            if count:
                name = new
                break
        renamed[name] = tensor
    for name, parts in joined.items():
        ordered = [parts[part] for part in ("query", "key", "value") if part in parts]
        if len({(part.shape[1:], part.dtype) for part in ordered}) == 1:  # otherwise `_check` reports it as missing
            renamed[name] = _joined(ordered)
    return renamed


def _joined(parts: list[Tensor]) -> Tensor:
    rows = sum(part.shape[0] for part in parts)
    return Tensor((rows, *parts[0].shape[1:]), parts[0].dtype, lambda: np.concatenate([part.load() for part in parts]))


def load(path: str | os.PathLike) -> dict:
    """Reads the params of `dit_jax.metrics.dinov2.VisionTransformer` as NumPy float32, with stacked blocks.

    Args:
        path: a .safetensors written by `python -m dit_jax.convert --from=dinov2`.
    Raises:
        UserError: the file does not exist or is not a complete safetensors file; or tensors are missing, extra or misshapen (all
            are listed), have several dtypes, or hold NaN or infinity.
    """
    path, tensors = open_converted(path, "DINOv2", "dinov2", "--download=dinov2-vitl14")
    if "embeddings.cls_token" in tensors:
        raise UserError(
            f"{path} has the layout of transformers; convert it with python -m dit_jax.convert --from=dinov2 --weights={path}"
        )
    _check(tensors, str(path))

    depth = _depth(tensors)

    def get(name):
        """One tensor; if the name has an i as the block's number, the stack of all blocks' tensors."""
        if ".i." not in name:
            return tensors[name].load().astype(np.float32)
        return np.stack([get(name.replace(".i.", f".{i}.")) for i in range(depth)])

    def linear(name, *shape):
        """Transposes [L, out, in] to [L, in, out]; `shape` then splits the axes after the first."""
        kernel, bias = get(f"{name}.weight").swapaxes(-1, -2), get(f"{name}.bias")
        return {"kernel": kernel.reshape(depth, *shape) if shape else np.ascontiguousarray(kernel), "bias": bias}

    def norm(name):
        return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    width = tensors["cls_token"].shape[-1]
    heads = width // HEAD_WIDTH
    position = get("pos_embed")[0]
    grid = math.isqrt(len(position) - 1)
    # The class token has a position embedding, registers have none.
    first = [get("cls_token")[0] + position[:1]] + ([get("register_tokens")[0]] if "register_tokens" in tensors else [])
    qkv = linear("blocks.i.attn.qkv", width, 3, heads, HEAD_WIDTH)
    qkv["bias"] = qkv["bias"].reshape(depth, 3, heads, HEAD_WIDTH)
    into, out = _mlp(tensors)
    return {
        "patch_embed": {"kernel": get(PATCH).transpose(2, 3, 1, 0).reshape(-1, width), "bias": get("patch_embed.proj.bias")},
        "pos_embed": position[1:].reshape(grid, grid, width),
        "tokens": np.concatenate(first),
        "blocks": {
            "norm1": norm("blocks.i.norm1"),
            "qkv": qkv,
            "ls1": get("blocks.i.ls1.gamma"),
            "proj": linear("blocks.i.attn.proj", heads, HEAD_WIDTH, width),
            "norm2": norm("blocks.i.norm2"),
            "in": linear(f"blocks.i.mlp.{into}"),
            "out": linear(f"blocks.i.mlp.{out}"),
            "ls2": get("blocks.i.ls2.gamma"),
        },
        "norm": norm("norm"),
    }


def _depth(tensors: Tensors) -> int:
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,9})\.", name))), default=0)


def _mlp(tensors: Tensors) -> tuple[str, str]:
    """Names of the MLP's two layers: gated in the giant size, plain in the others."""
    return ("w12", "w3") if "blocks.0.mlp.w12.weight" in tensors else ("fc1", "fc2")


def _check(tensors: Tensors, what: str) -> dict[str, tuple[int, ...]]:
    """Checks names, shapes, dtype and finiteness of the tensors; returns the layout {name: shape}."""
    layout = _layout(tensors, what)
    check(tensors, layout, what)
    common_dtype(tensors, what)
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.load().astype(np.float32)).all():
            raise UserError(f"{what}: {name} holds NaN or infinity; download or write the file again")
    return layout


def _layout(tensors: Tensors, what: str) -> dict[str, tuple[int, ...]]:
    """The expected {name: shape}; the network's sizes are read from a few of the tensors."""
    into, out = _mlp(tensors)
    ranks = {PATCH: 4, "pos_embed": 3, f"blocks.0.mlp.{out}.weight": 2}
    if "register_tokens" in tensors:
        ranks["register_tokens"] = 3
    missing = [name for name, rank in ranks.items() if name not in tensors or len(tensors[name].shape) != rank]
    if missing:
        raise UserError(
            f"{what} is not DINOv2: {', '.join(missing)} is missing or has another rank. Give the published "
            ".pth, or the model.safetensors of transformers' Dinov2Model"
        )
    if _depth(tensors) > len(tensors):
        raise UserError(f"{what} is not DINOv2: it has {len(tensors)} tensors, but names of {_depth(tensors)} blocks")
    width, channels, patch, _ = tensors[PATCH].shape
    positions, hidden = tensors["pos_embed"].shape[1], tensors[f"blocks.0.mlp.{out}.weight"].shape[1]
    grid = math.isqrt(max(positions - 1, 0))
    for name, value, wanted in (
        ("a patch size", patch, PATCH_SIZE),
        ("image channels", channels, 3),
        ("a width in heads of 64 of", width, width // HEAD_WIDTH * HEAD_WIDTH),
        ("a number of positions", positions, grid * grid + 1),
    ):
        if value != wanted:
            raise UserError(f"{what} has {name} {value}, not {wanted}: it is not a DINOv2 network")
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        f"mlp.{into}": (hidden * (2 if into == "w12" else 1), width),
        f"mlp.{out}": (width, hidden),
    }
    layout = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        PATCH: (width, 3, PATCH_SIZE, PATCH_SIZE),
        "patch_embed.proj.bias": (width,),
    }
    if "register_tokens" in tensors:
        layout["register_tokens"] = 1, tensors["register_tokens"].shape[1], width
    for i in range(_depth(tensors)):
        for name, shape in linears.items():
            layout |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            layout[f"blocks.{i}.{name}"] = (width,)
    return layout | {"norm.weight": (width,), "norm.bias": (width,)}
