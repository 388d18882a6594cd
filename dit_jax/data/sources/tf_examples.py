"""Reads serialised tf.train.Example messages without TensorFlow.

Source: Protocol Buffers, "Encoding"; TensorFlow's example.proto and feature.proto for the numbers of the fields.
"""

from collections.abc import Iterator

VARINT, DELIMITED = 0, 2  # wire types that these messages use; floats are skipped


def features(data: bytes) -> dict[str, list[bytes] | list[int]]:
    """{name: values} of the features that are bytes or integers.

    Raises:
        ValueError: the message is damaged.
    """
    found: dict[str, list[bytes] | list[int]] = {}
    for message in _of(data, 1):
        for entry in _of(message, 1):
            name = b"".join(_of(entry, 1)).decode()
            for feature in _of(entry, 2):
                for values in _of(feature, 1):
                    found[name] = list(_of(values, 1))
                for values in _of(feature, 3):
                    found[name] = list(_integers(values))
    return found


def _of(data: bytes, wanted: int) -> Iterator[bytes]:
    """The values of a field that are delimited."""
    for number, kind, value in _fields(data):
        if number == wanted and kind == DELIMITED:
            yield bytes(value)


def _integers(data: bytes) -> Iterator[int]:
    """The integers of an Int64List, packed or one by one."""
    for number, kind, value in _fields(data):
        if number == 1 and kind == VARINT:
            yield _signed(value)  # type: ignore[arg-type]
        elif number == 1:
            place = 0
            while place < len(value):  # type: ignore[arg-type]
                one, place = _varint(value, place)  # type: ignore[arg-type]
                yield _signed(one)


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(number, wire type, value) of each field of a message."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == VARINT:
            value, place = _varint(data, place)
            yield tag >> 3, kind, value
            continue
        if kind == DELIMITED:
            size, place = _varint(data, place)
        elif kind in (1, 5):  # 64 and 32 bits
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if size > len(data) - place:
            raise ValueError("the message is truncated")
        yield tag >> 3, kind, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("the message is truncated")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, place
    raise ValueError("an integer is too long")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
