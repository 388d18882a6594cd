"""Reads the constants of a frozen TensorFlow graph (a GraphDef, .pb) without TensorFlow.

It reads only these fields of the protocol buffer, by their numbers in TensorFlow's graph.proto, node_def.proto,
attr_value.proto, tensor.proto and tensor_shape.proto:
    GraphDef.node 1; NodeDef.name 1, op 2, attr 5 (a map: key 1, value 2); AttrValue.tensor 8;
    TensorProto.dtype 1, tensor_shape 2, tensor_content 4, half_val 13, float_val 5, double_val 6;
    TensorShapeProto.dim 2; Dim.size 1.
"""

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


def read_constants(path: Path) -> dict[str, Tensor]:
    """Reads all floating-point constants of the graph, {node name: tensor}; other types and other nodes are skipped.

    Raises:
        UserError: the file is not a GraphDef, is truncated, or has a constant whose values do not fill its shape.
    """
    content = memoryview(path.read_bytes())
    try:
        constants, nodes = {}, [_fields(value) for number, kind, value in _walk(content) if (number, kind) == (1, BYTES)]
        for node in nodes:
            if bytes(_last(node, 2, b"")) == b"Const":
                name = bytes(_last(node, 1, b"")).decode()
                tensor = _tensor(name, node)
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


def _tensor(name: str, node) -> Tensor | None:
    for entry in node.get(5, ()):
        pair = _fields(entry)
        if bytes(_last(pair, 1, b"")) == b"value":
            proto = _fields(_last(_fields(_last(pair, 2, b"")), 8, b""))
            break
    else:
        raise ValueError(f"the constant {name} has no value")
    kind = _last(proto, 1, 0)
    if kind not in FLOATS:
        return None
    dimensions = _fields(_last(proto, 2, b"")).get(2, [])
    if len(dimensions) > LARGEST_RANK:
        raise ValueError(f"the constant {name} has {len(dimensions)} dimensions")
    shape = tuple(_last(_fields(dimension), 1, 0) for dimension in dimensions)
    dtype = FLOATS[kind]
    data = b"".join(proto.get(4, ())) or _values(proto, kind, dtype)
    size = math.prod(shape)
    if len(data) == dtype.itemsize < size * dtype.itemsize:  # one value for all elements
        data = bytes(data) * size if size <= 1 << 24 else data
    if len(data) != size * dtype.itemsize:
        raise ValueError(f"the constant {name} of shape {list(shape)} has {len(data)} bytes")
    return Tensor(shape, dtype.newbyteorder("="), lambda: np.frombuffer(data, dtype).reshape(shape))


def _values(proto, kind: int, dtype) -> bytes:
    """float_val or double_val, packed or repeated."""
    if kind not in VALUES:
        return b""
    return b"".join(bytes(value) for value in proto.get(VALUES[kind], ()))


def _fields(message) -> dict[int, list]:
    """{field number: its values in order}."""
    fields = {}
    for number, _, value in _walk(message):
        fields.setdefault(number, []).append(value)
    return fields


def _last(fields, number: int, default):
    return fields.get(number, [default])[-1]


def _walk(message) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yields (field number, wire type, value) of a message; the value is an int for a varint, bytes for other types."""
    message, place = memoryview(message), 0
    while place < len(message):
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
