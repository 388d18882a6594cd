"""Reads the constants of a frozen TensorFlow graph (a GraphDef, .pb) without TensorFlow.

It reads only these fields of the protocol buffer, by their numbers in TensorFlow's graph.proto, node_def.proto,
attr_value.proto, tensor.proto and tensor_shape.proto:
    GraphDef.node 1; NodeDef.name 1, op 2, attr 5 (a map: key 1, value 2); AttrValue.tensor 8;
    TensorProto.dtype 1, tensor_shape 2, tensor_content 4, half_val 13, float_val 5, double_val 6;
    TensorShapeProto.dim 2; Dim.size 1.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensor

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FLOATS: dict[int, np.dtype] = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 19: np.dtype("<f2")}  # by DataType's numbers
VALUES = {1: 5, 2: 6}  # field of TensorProto that has the values if tensor_content is empty
LARGEST_RANK = 8
MAX_FILE_BYTES = 512 << 20  # Inception's graph has 95 MB
MAX_FIELDS = 500_000  # it has some 30,000


def read_constants(path: Path) -> dict[str, Tensor]:
    """Reads all floating-point constants of the graph, {node name: tensor}; other types and other nodes are skipped.

    Raises:
        UserError: the file is not a GraphDef, is truncated, or has a constant whose values do not fill its shape.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{path} has more than {MAX_FILE_BYTES:,} bytes; give the unpacked classify_image_graph_def.pb")
    content, budget = memoryview(path.read_bytes()), itertools.count()
    try:
        constants = {}
        nodes = [_fields(value, budget) for number, kind, value in _walk(content, budget) if (number, kind) == (1, BYTES)]
        for node in nodes:
            if _last_bytes(node, 2) == b"Const":
                name = bytes(_last_bytes(node, 1)).decode()
                tensor = _tensor(name, node, budget)
                if tensor is not None:
                    constants[name] = tensor
    except (ValueError, IndexError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path} is not a complete frozen TensorFlow graph ({error}); give the unpacked classify_image_graph_def.pb, "
            "or download it again"
        ) from None
    if not constants:
        raise UserError(f"{path} is not a frozen TensorFlow graph with constants; give the unpacked classify_image_graph_def.pb")
    return constants


def _tensor(name: str, node, budget) -> Tensor | None:
    for entry in node.get(5, ()):
        pair = _fields(entry, budget)
        if _last_bytes(pair, 1) == b"value":
            proto = _fields(_last_bytes(_fields(_last_bytes(pair, 2), budget), 8), budget)
            break
    else:
        raise ValueError(f"the constant {name} has no value")
    kind = _last(proto, 1, 0)
    if kind not in FLOATS:
        return None
    dimensions = _fields(_last_bytes(proto, 2), budget).get(2, [])
    if len(dimensions) > LARGEST_RANK:
        raise ValueError(f"the constant {name} has {len(dimensions)} dimensions")
    shape = tuple(_last(_fields(dimension, budget), 1, 0) for dimension in dimensions)
    if not all(isinstance(size, int) and size < 2**31 for size in shape):
        raise ValueError(f"the constant {name} has the shape {list(shape)}")
    dtype = FLOATS[kind]
    data = b"".join(proto.get(4, ())) or _values(proto, kind)
    size = math.prod(shape) * dtype.itemsize
    is_one = len(data) == dtype.itemsize < size  # one value for all elements
    if len(data) != size and not (is_one and size <= MAX_FILE_BYTES):
        raise ValueError(f"the constant {name} of shape {list(shape)} has {len(data)} bytes")

    def load():
        values = np.frombuffer(data, dtype)
        return np.full(shape, values[0]) if is_one else values.reshape(shape)

    return Tensor(shape, dtype.newbyteorder("="), load)


def _values(proto, kind: int) -> bytes:
    """float_val or double_val, packed or repeated."""
    return b"".join(proto.get(VALUES[kind], ())) if kind in VALUES else b""


def _fields(message, budget) -> dict[int, list]:
    """{field number: its values in order}."""
    fields: dict[int, list] = {}
    for number, _, value in _walk(message, budget):
        fields.setdefault(number, []).append(value)
    return fields


def _last(fields, number: int, default):
    return fields.get(number, [default])[-1]


def _last_bytes(fields, number: int) -> memoryview | bytes:
    """A field that must not be a number: bytes(2**40) would be as many zeros."""
    value = _last(fields, number, b"")
    if isinstance(value, int):
        raise ValueError(f"field {number} is a number")
    return value


def _walk(message, budget) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yields (field number, wire type, value) of a message; the value is an int for a varint, bytes for other types.

    Args:
        budget: counts the fields of the whole file.
    """
    message, place = memoryview(message), 0
    while place < len(message):
        if next(budget) >= MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS:,} fields")
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = _varint(message, place)
        else:
            if kind == BYTES:
                size, place = _varint(message, place)
            elif kind in (FIXED64, FIXED32):
                size = 8 if kind == FIXED64 else 4
            else:
                raise ValueError(f"wire type {kind}")
            if place + size > len(message):
                raise ValueError(f"a field of {size} bytes at byte {place} of {len(message)}")
            value, place = message[place : place + size], place + size
        yield number, kind, value


def _varint(message, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        value |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return value, place
    raise ValueError("a number of more than 10 bytes")
