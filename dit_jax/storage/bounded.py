"""Reads JSON and NumPy files that anybody may have written, within bounds of time and memory.

A file of a few kilobytes can describe gigabytes, nest too deeply for a parser, or hold a list where an object belongs. All that
becomes one line.
"""

import json
import math
import reprlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.errors import UserError

MAX_JSON_BYTES = 32 << 20  # parsed, it takes up to 25 times as much
# The arrays that are read from an npz may unpack to this, or to 4 times the file; floats hardly pack at all.
MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO = 256 << 20, 4
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def parsed(text: str | bytes, what: str, remedy: str = "") -> Any:
    """Parses JSON of any kind.

    Args:
        what: the file, for the error message.
        remedy: the end of the error message.

    Raises:
        UserError: it is longer than `MAX_JSON_BYTES`, nested too deeply, or not JSON.
    """
    try:
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"{len(text):,} bytes, more than {MAX_JSON_BYTES:,}")
        return json.loads(text)
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:
        why = str(error)
    raise UserError(f"{what} cannot be read as JSON ({why})" + (f"; {remedy}" if remedy else ""))


def json_object(text: str | bytes, what: str, remedy: str = "", form: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        form: what it must hold, see `check_form`.

    Raises:
        UserError: as `parsed`; or it is no object, or has another form.
    """
    value = parsed(text, what, remedy)
    check_form(value, form or {}, what, remedy)
    return value


def read_records(path: Path, form: list[Any], remedy: str) -> list[Any]:
    """Reads a JSON list; [] if the file does not exist.

    Args:
        form: what the entries must hold, see `check_form`.
        remedy: the end of the error message.

    Raises:
        UserError: it is no JSON, or not of this form.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    records = parsed(content, str(path), remedy)
    check_form(records, form, str(path), remedy)
    return records


def read_json(path: Path, remedy: str = "", form: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it cannot be read; or as `json_object`.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})" + (f"; {remedy}" if remedy else "")) from None
    return json_object(text, str(path), remedy, form)


def check_form(value: Any, form: Any, what: str, remedy: str = "", place: str = "") -> None:
    """Raises unless a JSON value has this form.

    Args:
        form: a type; [form] is a list of any length; {key: form} an object with these and any other keys. A float may be whole.
        what: the file, for the error message.
        place: of the value in the file.

    Raises:
        UserError: names the place.
    """
    kind = form if isinstance(form, type) else type(form)
    end = f"; {remedy}" if remedy else ""
    if type(value) is not kind and not (kind is float and type(value) is int) and kind is not object:
        raise UserError(f"{what}: {place or 'the content'} is {reprlib.repr(value)}, not {NAMES[kind]}{end}")
    if isinstance(form, Mapping):
        for key, inner in form.items():
            if key not in value:
                raise UserError(f"{what} has no {f'{place}.{key}'.lstrip('.')}{end}")
            check_form(value[key], inner, what, remedy, f"{place}.{key}".lstrip("."))
    elif isinstance(form, list):
        for i, item in enumerate(value):
            check_form(item, form[0], what, remedy, f"{place}[{i}]")


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads those of the named arrays that an npz has; other members are ignored, and pickles are not opened.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it is no npz, is damaged, or its arrays would unpack to much more than the file has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            wanted = {name: members[f"{name}.npy"] for name in names if f"{name}.npy" in members}
            size, most = sum(member.file_size for member in wanted.values()), unpacked_limit(path)
            if size > most:
                raise ValueError(f"its arrays claim {size:,} bytes, more than the {most:,} that a file of this size may have")
            return {name: _array(archive, member) for name, member in wanted.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy and zipfile can raise any exception for a damaged or hostile file
        why = str(error) or type(error).__name__
        raise UserError(f"{path} is not a readable npz ({why:.300}): write or download it again") from None


def unpacked_limit(path: Path) -> int:
    """The most bytes that the arrays of an npz may unpack to."""
    return max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size)


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is packed in another way than NumPy's")
    with archive.open(member) as file:
        shape, _, dtype = array_header(file)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} is a pickle, which is not opened")
        if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"{member.filename} declares {dtype} {list(shape)} but has {member.file_size - file.tell():,} bytes")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def array_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the start of an .npy; returns (shape, whether in Fortran order, dtype). Raises: ValueError."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"the .npy version is {version}")
    shape, fortran, dtype = HEADERS[version](file)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"its array has the shape {reprlib.repr(shape)}")
    return shape, fortran, dtype
