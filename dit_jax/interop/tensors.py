"""Named tensors that are read when asked for: what every reader returns, every layout renames and every writer takes.

Nothing here holds a model's weights whole, so a conversion needs the memory of its largest tensor, not of the model.
"""

import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dit_jax.errors import UserError
from dit_jax.storage.atomic import remove_leftovers, replacing

DTYPES = {
    np.dtype(name): code
    for name, code in (
        (np.float64, "F64"),
        (np.float32, "F32"),
        (np.float16, "F16"),
        (jnp.bfloat16, "BF16"),
        (np.int64, "I64"),
        (np.int32, "I32"),
        (np.int16, "I16"),
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.bool_, "BOOL"),
    )
}
CODES = {code: dtype for dtype, code in DTYPES.items()}
WEIGHT_DTYPES = tuple(np.dtype(name) for name in (np.float32, np.float16, jnp.bfloat16))


class Tensor(NamedTuple):
    """A tensor's shape and dtype, and how to read it. `load` may be called more than once, and reads again each time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


Tensors = Mapping[str, Tensor]


def count(tensors: Tensors) -> int:
    """Numbers in all tensors together."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def check(found: Tensors, expected: Mapping[str, tuple[int, ...]], what: str):
    """Every expected tensor is there with its shape, and no other.

    Args:
        what: the file, for the message.

    Raises:
        UserError: lists all that is missing, extra or misshapen, tensors that differ by one number in a line.
    """
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            problems.append(f"extra {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name]:
            problems.append(f"misshapen {name}: {list(tensor.shape)} instead of {list(expected[name])}")
    if problems:
        raise UserError(
            f"{what} does not fit the model. Of {len(expected)} tensors, {len(problems)} differences:\n  "
            + "\n  ".join(_gather(problems))
        )


def _gather(lines: list[str]) -> list[str]:
    """Lines that differ only in the number between two dots become one: "blocks.[0,1,2].bias"."""
    groups = defaultdict(list)
    for line in lines:
        number = re.search(r"\.(\d+)\.", line)
        groups[re.sub(r"\.\d+\.", ".[].", line, count=1)].append(number[1] if number else "")
    return sorted(
        line.replace("[].", f"[{','.join(numbers)}]." if len(numbers) > 1 else f"{numbers[0]}.", 1)
        for line, numbers in groups.items()
    )


def common_dtype(tensors: Tensors, what: str) -> np.dtype:
    """The one floating dtype of all tensors.

    Raises:
        UserError: several, or one that no model is stored in.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(WEIGHT_DTYPES):
        raise UserError(
            f"{what} holds {', '.join(sorted(d.name for d in dtypes)) or 'no tensors'}; all tensors must have one "
            f"dtype, and it must be {', '.join(d.name for d in WEIGHT_DTYPES)}: cast them where they were made"
        )
    return dtypes.pop()


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of one .safetensors file.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    try:
        file = safe_open(path, framework="numpy")
        tensors = {}
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            part = file.get_slice(name)
            if part.get_dtype() not in CODES:
                raise UserError(f"{path}: {name} has dtype {part.get_dtype()}; one of {', '.join(CODES)} is needed")
            tensors[name] = Tensor(tuple(part.get_shape()), CODES[part.get_dtype()], functools.partial(file.get_tensor, name))
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download or write it again") from None
    return tensors, file.metadata() or {}


def open_converted(path, what: str, source: str, way: str) -> tuple[Path, dict[str, Tensor]]:
    """(path, tensors) of a frozen network's weights that `python -m dit_jax.convert` wrote.

    Args:
        what: the network, for the message.
        source: convert's --from for a file that lies here.
        way: the flags that make the file where there is none.

    Raises:
        UserError: there is no such file; it is no .safetensors, or no whole one.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: the weights of {what} are one .safetensors, made by python -m dit_jax.convert "
            f"{way} --out={path.name}; without a connection see its --help"
        )
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors; make one with python -m dit_jax.convert --from={source} --weights={path}")
    return path, open_safetensors(path)[0]


def open_sharded(index: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """(tensors, files) of the parts that a *.safetensors.index.json lists.

    Raises:
        UserError: the index is damaged, points outside its folder, or disagrees with the parts.
    """
    try:
        places = json.loads(index.read_text())["weight_map"]
        parts = sorted(set(places.values()))
        if not all(isinstance(part, str) and Path(part).name == part for part in parts):
            raise UserError(f"{index} names parts outside its folder: {', '.join(map(str, parts))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{index} is not an index of safetensors ({error!r}); download it again") from None
    tensors = {}
    for part in parts:
        if not (index.parent / part).is_file():
            raise UserError(f"{index.parent / part} does not exist, and {index.name} lists it; download it too")
        found = open_safetensors(index.parent / part)[0]
        promised = {name for name, place in places.items() if place == part}
        if found.keys() != promised:
            differ = ", ".join(sorted(found.keys() ^ promised))
            raise UserError(f"{index} and {part} disagree about {differ}; download both again")
        tensors |= found
    return tensors, [index.parent / part for part in parts]


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]):
    """Writes the tensors one after another, in their order; a file that exists is replaced once the new one is whole.

    The library's writer takes all arrays at once; this one holds a single tensor in memory.
    """
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    remove_leftovers(path.parent, path.name)
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(raw_bytes(tensor))


def write_foreign(path: Path, tensors: Tensors, origin: Mapping):
    """Writes a network that no config describes, under the names it was published with.

    Args:
        origin: where it came from, kept as JSON in the header.
    Raises:
        UserError: the name does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"--out={path} must end in .safetensors")
    write_safetensors(path, tensors, {"format": "pt", "origin": json.dumps(origin)})


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's numbers in row-major order, little-endian."""
    array = np.asarray(tensor.load())
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(f"a tensor promised {tensor.dtype} {tensor.shape} and gave {array.dtype} {array.shape}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
