"""Lazily read named tensors, which every reader returns, every layout renames and every writer takes.

Nothing here holds all of a model's weights, so that a conversion needs the memory of its largest tensor, not of the model.
"""

import functools
import json
import math
import os
import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dit_jax.errors import UserError
from dit_jax.storage.atomic import remove_leftovers, replacing
from dit_jax.storage.bounded import check_form, read_json
from dit_jax.storage.paths import local_path

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
    """A tensor's shape and dtype, and a function that reads it. `load` may be called repeatedly and reads each time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


Tensors = Mapping[str, Tensor]


def count(tensors: Tensors) -> int:
    """Total number of elements of all tensors."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def check(tensors: Tensors, expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises unless exactly the expected tensors exist, with the expected shapes.

    Args:
        what: the file, for the error message.

    Raises:
        UserError: lists all missing, extra and misshapen tensors; names that differ only in the block's number share a line.
    """
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"extra {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name]:
            problems.append(f"misshapen {name}: {list(tensor.shape)} instead of {list(expected[name])}")
    if problems:
        raise UserError(
            f"{what} does not fit the model: {len(problems)} differences in {len(expected)} tensors:\n  "
            + "\n  ".join(_gather(problems))
        )


def _gather(lines: list[str]) -> list[str]:
    """Merges lines that differ only in the number between two dots: "blocks.[0,1,2].bias"."""
    groups = defaultdict(list)
    for line in lines:
        number = re.search(r"\.(\d+)\.", line)
        groups[re.sub(r"\.\d+\.", ".[].", line, count=1)].append(number[1] if number else "")
    return sorted(
        line.replace("[].", f"[{','.join(numbers)}]." if len(numbers) > 1 else f"{numbers[0]}.", 1)
        for line, numbers in groups.items()
    )


def common_dtype(tensors: Tensors, what: str) -> np.dtype:
    """The floating-point dtype that all tensors share.

    Raises:
        UserError: there are several dtypes, or one that weights cannot have.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(WEIGHT_DTYPES):
        raise UserError(
            f"{what} holds {', '.join(sorted(d.name for d in dtypes)) or 'no tensors'}; all tensors must have the same "
            f"dtype, one of {', '.join(d.name for d in WEIGHT_DTYPES)}: cast them with the program that wrote them"
        )
    return dtypes.pop()


def finite(tensors: Tensors, what: str) -> dict[str, Tensor]:
    """The tensors, which raise a UserError with their name if they are read and hold NaN or infinity.

    Args:
        what: the file, for the error message.
    """

    def checked(name: str, tensor: Tensor) -> Tensor:
        def load():
            array = tensor.load()
            if not np.isfinite(array).all():
                bad = np.count_nonzero(~np.isfinite(array))
                raise UserError(
                    f"{what}: {name} holds NaN or infinity ({bad:,} of {array.size:,} values); download the file again, or give "
                    "an earlier checkpoint"
                )
            return array

        return tensor._replace(load=load) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor

    return {name: checked(name, tensor) for name, tensor in tensors.items()}


def without_wrappers(tensors: Tensors, what: str) -> tuple[dict[str, Tensor], str]:
    """Removes what wrappers of PyTorch add to names; returns (tensors, a text that says what was removed, or "").

    These are `module.` of DataParallel and AveragedModel, with the latter's counter `n_averaged`, and `_orig_mod.` of
    torch.compile, anywhere in a name.

    Raises:
        UserError: two names become one.
    """
    renamed = {name: name.replace("_orig_mod.", "") for name in tensors}
    if (counted := "n_averaged") in renamed and any(name.startswith("module.") for name in renamed.values()):
        del renamed[counted]
    while renamed and all(name.startswith("module.") for name in renamed.values()):
        renamed = {name: new.removeprefix("module.") for name, new in renamed.items()}
    kept = {new: tensors[name] for name, new in renamed.items()}
    if len(kept) != len(renamed):
        raise UserError(f"{what} holds tensors whose names differ only by _orig_mod.: remove one copy")
    changed = [name for name in tensors if name not in kept]
    return kept, " and ".join(part for part in ("module.", "_orig_mod.") if any(part in name for name in changed))


def open_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Opens a .safetensors file; returns (tensors, metadata).

    Raises:
        UserError: it is not a complete safetensors file.
    """
    path = local_path(path)
    try:
        file = safe_open(path, framework="numpy")
        tensors = {}
        for name in file.keys():  # noqa: SIM118 (it is not a dict)
            part = file.get_slice(name)
            if part.get_dtype() not in CODES:
                remedy = "; give the same weights in bfloat16 or float16" if part.get_dtype().startswith("F8") else ""
                raise UserError(f"{path}: {name} has dtype {part.get_dtype()}; one of {', '.join(CODES)} is needed{remedy}")
            tensors[name] = Tensor(tuple(part.get_shape()), CODES[part.get_dtype()], functools.partial(file.get_tensor, name))
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); download or write it again") from None
    return tensors, file.metadata() or {}


def open_converted(path: str | os.PathLike, what: str, source: str, way: str) -> tuple[Path, dict[str, Tensor]]:
    """Opens a frozen network's weights written by `python -m dit_jax.convert`; returns (path, tensors).

    Args:
        what: the network, for error messages.
        source: the --from of convert for a local file.
        way: the flags of convert that make the file.

    Raises:
        UserError: the file does not exist, or is not a complete .safetensors file.
    """
    path = local_path(path)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: the weights of {what} are one .safetensors file, written by python -m dit_jax.convert "
            f"{way} --out={path.name}; see its --help if there is no internet connection"
        )
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not a .safetensors file; write one with python -m dit_jax.convert --from={source} --weights={path}"
        )
    return path, open_safetensors(path)[0]


def open_sharded(index: str | os.PathLike) -> tuple[dict[str, Tensor], list[Path]]:
    """Opens the parts that a *.safetensors.index.json lists; returns (tensors, files).

    Raises:
        UserError: the index is damaged, points outside its folder, or disagrees with the parts.
    """
    index = local_path(index)
    places = read_json(index, "give the index of a safetensors file, or download it again", {"weight_map": {}})["weight_map"]
    check_form(list(places.values()), [str], f"the weight_map of {index}", "download it again")
    parts = sorted(set(places.values()))
    if not all(Path(part).name == part for part in parts):
        raise UserError(f"{index} names parts outside its folder: {reprlib.repr(parts)}")
    tensors = {}
    for part in parts:
        if not (index.parent / part).is_file():
            raise UserError(f"{index.parent / part} does not exist, but {index.name} lists it; download it too")
        stored = open_safetensors(index.parent / part)[0]
        promised = {name for name, place in places.items() if place == part}
        if stored.keys() != promised:
            differ = ", ".join(sorted(stored.keys() ^ promised))
            raise UserError(f"{index} and {part} disagree about {differ}; download both again")
        tensors |= stored
    return tensors, [index.parent / part for part in parts]


def write_safetensors(path: str | os.PathLike, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Writes the tensors in their order; an existing file is replaced atomically.

    The library's writer takes all arrays at once. This one holds a single tensor in memory.
    """
    path = local_path(path)
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


def write_foreign(path: str | os.PathLike, tensors: Tensors, origin: Mapping) -> None:
    """Writes a network that no config describes, with the names of its publication.

    Args:
        origin: where it came from, stored as JSON in the header.
    Raises:
        UserError: the name does not end in .safetensors.
    """
    path = local_path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"--out={path} must end in .safetensors")
    write_safetensors(path, tensors, {"format": "pt", "origin": json.dumps(origin)})


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values in row-major order, little-endian."""
    array = np.asarray(tensor.load())
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(f"a tensor declared as {tensor.dtype} {tensor.shape} was loaded as {array.dtype} {array.shape}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
