"""Converts DiffiT weights to and from the layout of the paper's code: the keys of diffit_256.safetensors.

Names of DiT's frame are DiT's. Each block has its table of relative positions [(2w - 1)^2, heads], which ours has too, and the
index into it [w^2, w^2], int64, which ours computes, as it does the position table. w tokens per side; grids are squares.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dit_jax.errors import UserError
from dit_jax.interop import official
from dit_jax.interop.tensors import Tensor, Tensors, check, common_dtype
from dit_jax.models.diffit import DiffiT
from dit_jax.models.position import sincos_2d

NETWORK = "diffit"
LAYOUTS = ("official",)
NAMES = {path: name for path, name in official.NAMES.items() if "modulation" not in path}
BLOCK_NAMES = {path: name for path, name in official.BLOCK_NAMES.items() if "modulation" not in path} | {
    "attention/condition/kernel": "attn.qkv_temb.weight",
    "attention/condition/bias": "attn.qkv_temb.bias",
    "attention/position_bias": "attn.relative_position_bias_table",
}
INDEX = "attn.relative_position_index"
TABLE = "blocks.0.attn.relative_position_bias_table"


def recognises(names: Collection[str], layout: str) -> bool:
    """Whether tensors with these names are a DiffiT in the layout."""
    return layout in LAYOUTS and "blocks.0.attn.qkv_temb.weight" in names


def read(
    tensors: Tensors, layout: str, what: str, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(our tensors, the sections that they determine: model and process).

    Raises:
        UserError: tensors are missing, misshapen or further ones; the table or index of positions is another one.
    """
    floats = {name: tensor for name, tensor in tensors.items() if not name.endswith(INDEX)}
    sizes = official.infer(floats, what)
    side = official.grid_side(tensors, what)
    if TABLE not in tensors or len(tensors[TABLE].shape) != 2:
        raise UserError(f"{what} has no {TABLE} [(2w - 1)^2, heads]; give a file of DiffiT's code")
    fields = {
        "patch_size": sizes.patch_size,
        "depth": sizes.depth,
        "width": sizes.width,
        "heads": tensors[TABLE].shape[1],
        "num_classes": sizes.num_classes,
        "grid": (side, side),
        "mlp_ratio": sizes.mlp_width / sizes.width,
    }
    shapes = _shapes(fields, sizes.in_channels, sizes.out_channels)
    check(tensors, _expected(shapes, sizes.patch_size, side), what)
    official.check_position(tensors[official.POSITION], what)
    for block in range(sizes.depth):
        _check_index(tensors[f"blocks.{block}.{INDEX}"], f"{what}: blocks.{block}.{INDEX}", side)
    model = {"name": NETWORK, **fields, "attention": "auto", "remat": "auto", "unroll": None, "dtype": "float32"}
    model["param_dtype"] = common_dtype(floats, what).name
    learned = sizes.out_channels == 2 * sizes.in_channels
    process = {"name": "gaussian", "variance": "learned_range" if learned else "fixed_large"}
    sections = {"model": model, "process": process}
    return {path: _gather(path, shape, tensors) for path, shape in shapes.items()}, sections


def write(
    tensors: Tensors, layout: str, model: Mapping[str, Any], latent_shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(tensors in the layout, None: it has no config.json).

    Raises:
        UserError: the layout cannot represent the network: its grid is not a square, or it has no classes.
    """
    (rows, columns), patch_size = model["grid"], model["patch_size"]
    if rows != columns:
        raise UserError(f"model.grid is {(rows, columns)}; the layout of DiffiT's code is of squares only. Write --to=dit_jax")
    if not model["num_classes"]:
        raise UserError("model.num_classes is 0; the layout of DiffiT's code has classes. Write --to=dit_jax")
    read = lru_cache(maxsize=1)(lambda path: tensors[path].load())  # the blocks of a stack are read one after another
    theirs: dict[str, Tensor] = {}
    for path, tensor in tensors.items():
        for i, (name, part) in enumerate(_parts(path, tensor.shape)):
            shape = official.their_shape(path, part, patch_size)

            def load(path=path, shape=shape, i=i):
                return official.array_to_theirs(path, read(path)[i] if path.startswith("blocks/") else read(path), shape)

            theirs[name] = Tensor(shape, tensor.dtype, load)
    bias = tensors["patch_embedding/bias"]
    table = sincos_2d(bias.shape[0], rows, columns)[None].astype(bias.dtype)
    index = position_index(rows)
    theirs[official.POSITION] = Tensor(table.shape, table.dtype, lambda: table)
    for block in range(model["depth"]):
        theirs[f"blocks.{block}.{INDEX}"] = Tensor(index.shape, index.dtype, lambda: index)
    return theirs, None


def position_index(side: int) -> np.ndarray:
    """int64[N, N]: the row of the table for each pair of tokens of a square grid (Swin's index)."""
    y, x = np.divmod(np.arange(side * side), side)
    return (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1


def _check_index(tensor: Tensor, what: str, side: int) -> None:
    index = np.asarray(tensor.load())
    if not np.issubdtype(index.dtype, np.integer) or not np.array_equal(index, position_index(side)):
        raise UserError(f"{what} is not the index of the relative positions on a {side} x {side} grid; others are not supported")


def _shapes(fields: Mapping[str, Any], in_channels: int, out_channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters."""
    network = DiffiT(**fields, out_channels=out_channels)
    side = fields["grid"][0] * fields["patch_size"]
    x, label = jnp.zeros((1, side, side, in_channels)), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), {"label": label})["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def _expected(shapes: Mapping[str, tuple[int, ...]], patch_size: int, side: int) -> dict[str, tuple[int, ...]]:
    """Their names and shapes, from the shapes of our parameters."""
    layout = {}
    for path, shape in shapes.items():
        for name, part in _parts(path, shape):
            layout[name] = official.their_shape(path, part, patch_size)
    indices = {f"blocks.{block}.{INDEX}": (side**2, side**2) for block in range(shapes["blocks/mlp/in/bias"][0])}
    return {**layout, **indices, official.POSITION: (1, side * side, shapes["patch_embedding/bias"][-1])}


def _parts(path: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """[(their name, shape of our part)]: one entry, or one for each block of a stack."""
    if path in NAMES:
        return [(NAMES[path], shape)]
    name = BLOCK_NAMES[path.removeprefix("blocks/")]
    return [(f"blocks.{i}.{name}", shape[1:]) for i in range(shape[0])]


def _gather(path: str, shape: tuple[int, ...], tensors: Tensors) -> Tensor:
    each = _parts(path, shape)
    dtype = tensors[each[0][0]].dtype

    def load():
        if not path.startswith("blocks/"):
            return official.array_to_ours(path, tensors[each[0][0]].load(), shape)
        stack = np.empty(shape, dtype)
        for i, (name, part) in enumerate(each):
            stack[i] = official.array_to_ours(path, tensors[name].load(), part)
        return stack

    return Tensor(shape, dtype, load)
