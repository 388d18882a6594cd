"""Converts linear layers of PyTorch in separate blocks to stacked and fused kernels, and back.

A linear layer's weight is [out, in] there, and a kernel [in, ...] here. A fused kernel, of queries, keys and values for example,
has an axis of that length behind [in]: [in, 3, heads, width of a head].
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dit_jax.interop.tensors import Tensor, Tensors

Shape = tuple[int, ...]


class Link(NamedTuple):
    """Where one of our parameters is in other code.

    Fields:
        names: of their tensors, one, or one for each part of a fused parameter. With "{}" for the number of the block, the
            parameter is a stack over blocks.
        inputs: number of contracted leading axes of a kernel, without the stack's; 0 for a parameter that is not a kernel.
        start: number of the first block of the stack.
    """

    names: tuple[str, ...]
    inputs: int = 0
    start: int = 0

    @property
    def fused(self) -> bool:
        return len(self.names) > 1

    @property
    def stacked(self) -> bool:
        return "{}" in self.names[0]


def their_shapes(links: Mapping[str, Link], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """{their name: shape}, of our shapes by path."""
    found = {}
    for path, link in links.items():
        shape = shapes[path]
        for block in range(shape[0] if link.stacked else 1):
            for name in link.names:
                found[name.format(block + link.start)] = _theirs(link, shape[1:] if link.stacked else shape)
    return found


def to_ours(links: Mapping[str, Link], shapes: Mapping[str, Shape], tensors: Tensors) -> dict[str, Tensor]:
    """Our parameters by path, each read lazily, of their tensors, which have `their_shapes`."""
    return {path: _gathered(link, shapes[path], tensors) for path, link in links.items()}


def to_theirs(links: Mapping[str, Link], ours: Tensors) -> dict[str, Tensor]:
    """Their tensors by name, each read lazily, of our parameters."""
    found = {}
    read = functools.lru_cache(maxsize=1)(lambda path: ours[path].load())  # the blocks of a stack are read one after another
    for path, link in links.items():
        tensor = ours[path]
        shape = _theirs(link, tensor.shape[1:] if link.stacked else tensor.shape)
        for block in range(tensor.shape[0] if link.stacked else 1):
            for i, name in enumerate(link.names):

                def load(path=path, link=link, block=block, i=i, shape=shape):
                    return _split(link, read(path)[block] if link.stacked else read(path), i, shape)

                found[name.format(block + link.start)] = Tensor(shape, tensor.dtype, load)
    return found


def mapped(tensor: Tensor, change: Callable[[np.ndarray], np.ndarray], shape: Shape) -> Tensor:
    """A tensor that is changed when it is read, to `shape`."""
    return Tensor(shape, tensor.dtype, lambda: change(tensor.load()))


def _theirs(link: Link, part: Shape) -> Shape:
    """The shape of one of their tensors, of that of our parameter in one block."""
    features = part[link.inputs + link.fused :]
    if link.inputs:
        return math.prod(features), math.prod(part[: link.inputs])
    is_bias = link.fused or link.names[0].endswith(".bias")
    return (math.prod(features),) if is_bias else part


def _gathered(link: Link, shape: Shape, tensors: Tensors) -> Tensor:
    dtype = tensors[link.names[0].format(link.start)].dtype
    part = shape[1:] if link.stacked else shape
    own = part[: link.inputs] + part[link.inputs + link.fused :]  # of one of the fused

    def one(block: int) -> np.ndarray:
        arrays = [tensors[name.format(block + link.start)].load() for name in link.names]
        arrays = [(x.T if link.inputs else x).reshape(own) for x in arrays]
        return np.stack(arrays, axis=link.inputs) if link.fused else arrays[0]

    def load() -> np.ndarray:
        if not link.stacked:
            return one(0)
        stack = np.empty(shape, dtype)
        for block in range(shape[0]):
            stack[block] = one(block)
        return stack

    return Tensor(shape, dtype, load)


def _split(link: Link, array: np.ndarray, i: int, shape: Shape) -> np.ndarray:
    part = np.take(array, i, axis=link.inputs) if link.fused else array
    return part.reshape(shape[::-1]).T if link.inputs else part.reshape(shape)
