"""Converts DiT weights to and from the layout of the paper's code, which SiT and most other code bases share.

D width, L depth, C channels, p patch, N tokens.  A linear layer's weight is [out, in] in the official layout and [in, ...] in
ours. Official blocks are separate; ours are one stack. The official patch embedding is a convolution [D, C, p, p]; ours is a
matrix [p p C, D]. The official layout stores the position table; ours computes it.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensor, Tensors, common_dtype
from dit_jax.models.position import sincos_2d

OUR_TABLE = "label_embedding/embedding"
PATCH, TABLE, POSITION = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"
NAMES = {  # our path: official name
    "patch_embedding/kernel": PATCH,
    "patch_embedding/bias": "x_embedder.proj.bias",
    "time_embedding/in/kernel": "t_embedder.mlp.0.weight",
    "time_embedding/in/bias": "t_embedder.mlp.0.bias",
    "time_embedding/out/kernel": "t_embedder.mlp.2.weight",
    "time_embedding/out/bias": "t_embedder.mlp.2.bias",
    OUR_TABLE: TABLE,
    "final/modulation/linear/kernel": "final_layer.adaLN_modulation.1.weight",
    "final/modulation/linear/bias": "final_layer.adaLN_modulation.1.bias",
    "final/linear/kernel": "final_layer.linear.weight",
    "final/linear/bias": "final_layer.linear.bias",
}
BLOCK_NAMES = {  # our path under blocks/, stacked: official name under blocks.i. of block i
    "modulation/linear/kernel": "adaLN_modulation.1.weight",
    "modulation/linear/bias": "adaLN_modulation.1.bias",
    "attention/qkv/kernel": "attn.qkv.weight",
    "attention/qkv/bias": "attn.qkv.bias",
    "attention/out/kernel": "attn.proj.weight",
    "attention/out/bias": "attn.proj.bias",
    "mlp/in/kernel": "mlp.fc1.weight",
    "mlp/in/bias": "mlp.fc1.bias",
    "mlp/out/kernel": "mlp.fc2.weight",
    "mlp/out/bias": "mlp.fc2.bias",
}
Shapes = Mapping[str, tuple[int, ...]]  # our parameters: {path joined with "/": shape}


class Architecture(NamedTuple):
    """The sizes of a network that its tensors determine; the number of heads is not one of them."""

    patch_size: int
    depth: int
    width: int
    mlp_width: int
    num_classes: int
    in_channels: int
    out_channels: int
    dtype: np.dtype


def infer(tensors: Tensors, what: str, rename: Callable[[str], str] = str, block_prefix: str = "blocks") -> Architecture:
    """Infers a network's sizes from the shapes of a few tensors; `tensors.check` checks the others.

    Args:
        rename: official name -> name in this file.
        block_prefix: text before the number of a block.

    Raises:
        UserError: those tensors are missing or misshapen, the dtypes differ, or the sizes fit no DiT.
    """
    ranks = {
        rename(name): rank
        for name, rank in {PATCH: 4, TABLE: 2, "blocks.0.mlp.fc1.weight": 2, "final_layer.linear.weight": 2}.items()
    }
    bad = [name for name, rank in ranks.items() if name not in tensors or len(tensors[name].shape) != rank]
    if bad:
        raise UserError(
            f"{what} is not a DiT in this layout: {', '.join(bad)} missing or of another rank. It has "
            f"{len(tensors)} tensors: {', '.join(list(tensors)[:5])}, ..."
        )
    (width, channels, patch, patch_2), (rows, _), (mlp_width, _), (features, _) = (tensors[name].shape for name in ranks)
    block = re.compile(re.escape(block_prefix) + r"\.(\d{1,9})\.")
    depth = 1 + max(int(match[1]) for match in map(block.match, tensors) if match)
    out_channels, rest = divmod(features, max(patch * patch, 1))
    sizes = width, channels, patch, mlp_width, features
    if 0 in sizes or patch != patch_2 or rest or out_channels not in (channels, 2 * channels) or rows < 2 or depth > len(tensors):
        raise UserError(
            f"{what} is not a DiT: patches {patch} x {patch_2}, {channels} channels in, {features} features out, "
            f"{rows} rows in the label table, {depth} blocks; a DiT has square patches, p p C or 2 p p C features "
            "out, at least 2 rows and all of its blocks"
        )
    return Architecture(patch, depth, width, mlp_width, rows - 1, channels, out_channels, common_dtype(tensors, what))


def grid_side(tensors: Tensors, what: str) -> int:
    """Tokens per side, from the length of the position table.

    Raises:
        UserError: the table is missing, or its length is not a square.
    """
    shape = tensors[POSITION].shape if POSITION in tensors else ()
    side = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if side < 1 or shape[:2] != (1, side * side):
        raise UserError(f"{what}: {POSITION} is {list(shape) if shape else 'missing'}; [1, N, width] with a square N is needed")
    return side


def check_position(tensor: Tensor, what: str) -> None:
    """Raises unless the stored position table equals the one that our network computes, to 1e-5 or its dtype's precision.

    Raises:
        UserError: it differs, for example because it was trained or interpolated; our network does not support that.
    """
    _, tokens, width = tensor.shape
    side = math.isqrt(tokens)
    error = float(np.abs(tensor.load()[0].astype(np.float32) - sincos_2d(width, side, side)).max())
    if not error <= max(1e-5, float(jnp.finfo(tensor.dtype).eps)):
        raise UserError(
            f"{what}: {POSITION} differs by {error:.3g} from the sine-cosine table of a {side} x {side} grid; "
            "other position embeddings are not supported"
        )


def check_kind(shapes: Shapes) -> None:
    """Raises unless the layout can represent the network: class-conditional, with adaLN-Zero blocks.

    Raises:
        UserError: it has other conditioning blocks than adaLN-Zero, or no classes.
    """
    known = NAMES.keys() | {f"blocks/{name}" for name in BLOCK_NAMES}
    if shapes.keys() != known or shapes["blocks/modulation/linear/bias"][1] != 6:
        differ = ", ".join(sorted(shapes.keys() ^ known)) or "4 modulation vectors instead of 6"
        raise UserError(
            "the layouts of the paper's code and of diffusers can only hold class-conditional networks with "
            f"model.conditioning = adaln_zero; this one differs: {differ}"
        )


def expected(shapes: Shapes, patch_size: int, side: int) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a network, from the shapes of our parameters.

    Raises:
        UserError: what `check_kind` refuses.
    """
    check_kind(shapes)
    layout = {}
    for path, shape in shapes.items():
        for name, part in parts(path, shape):
            layout[name] = their_shape(path, part, patch_size)
    return layout | {POSITION: (1, side * side, shapes["patch_embedding/bias"][-1])}


def to_ours(tensors: Tensors, shapes: Shapes) -> dict[str, Tensor]:
    """Converts official tensors, checked against `expected`, to our parameters; each is read lazily.

    Args:
        shapes: of our parameters.
    """
    return {path: _gather(path, shape, tensors) for path, shape in shapes.items()}


def to_theirs(ours: Tensors, patch_size: int, side: int, grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Converts our parameters to official tensors, including the position table; each is read lazily.

    grid: `position_grid` of the network.

    Raises:
        UserError: the network has parts that the layout cannot represent.
    """
    check_kind({path: tensor.shape for path, tensor in ours.items()})
    read = lru_cache(maxsize=1)(lambda path: ours[path].load())  # the blocks of a stack are read one after another
    theirs = {}
    for path, tensor in ours.items():
        for i, (name, part) in enumerate(parts(path, tensor.shape)):
            shape = their_shape(path, part, patch_size)

            def load(path=path, shape=shape, i=i):
                return array_to_theirs(path, read(path)[i] if path.startswith("blocks/") else read(path), shape)

            theirs[name] = Tensor(shape, tensor.dtype, load)
    bias = ours["patch_embedding/bias"]
    table = sincos_2d(bias.shape[0], side, side, grid)[None].astype(bias.dtype)
    return theirs | {POSITION: Tensor(table.shape, table.dtype, lambda: table)}


def parts(path: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """[(official name, shape of our part)]: one entry, or one for each block of a stack."""
    if path in NAMES:
        return [(NAMES[path], shape)]
    name = BLOCK_NAMES[path.removeprefix("blocks/")]
    return [(f"blocks.{i}.{name}", shape[1:]) for i in range(shape[0])]


def one_to_theirs(path: str, array: np.ndarray, patch_size: int) -> dict[str, np.ndarray]:
    """The official tensors of one of our parameters."""
    blocks = array if path.startswith("blocks/") else [array]
    return {
        name: array_to_theirs(path, block, their_shape(path, part, patch_size))
        for (name, part), block in zip(parts(path, array.shape), blocks, strict=True)
    }


def one_to_ours(path: str, shape: tuple[int, ...], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """One of our parameters, of its official tensors."""
    held = {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}  # type: ignore[misc]
    return _gather(path, shape, held).load()


def their_shape(path: str, shape: tuple[int, ...], patch_size: int) -> tuple[int, ...]:
    """The shape of one of our parameters there; of a stack of blocks, the shape of one."""
    if path == "patch_embedding/kernel":
        return shape[1], shape[0] // patch_size**2, patch_size, patch_size
    if path.endswith("kernel"):
        inputs = 2 if path.endswith("attention/out/kernel") else 1  # contracted leading axes of our kernel
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return shape if path.endswith(("embedding", "position_bias")) else (math.prod(shape),)


def array_to_ours(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One of our parameters, or a block's part of it, of this shape, from theirs."""
    if path == "patch_embedding/kernel":
        array = array.transpose(2, 3, 1, 0)
    elif path.endswith("kernel"):
        array = array.T
    return array.reshape(shape)


def array_to_theirs(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Their tensor, of this shape, from one of our parameters or a block's part of it."""
    if path == "patch_embedding/kernel":
        features, channels, *patch = shape
        return array.reshape(*patch, channels, features).transpose(3, 2, 0, 1)
    if path.endswith("kernel"):
        return array.reshape(shape[::-1]).T
    return array.reshape(shape)


def _gather(path: str, shape: tuple[int, ...], tensors: Tensors) -> Tensor:
    each = parts(path, shape)
    dtype = tensors[each[0][0]].dtype

    def load():
        if not path.startswith("blocks/"):
            return array_to_ours(path, tensors[each[0][0]].load(), shape)
        stack = np.empty(shape, dtype)
        for i, (name, part) in enumerate(each):
            stack[i] = array_to_ours(path, tensors[name].load(), part)
        return stack

    return Tensor(shape, dtype, load)
