"""Reads PyTorch's .pt files without PyTorch and without executing code in them.

A .pt is a pickle, and a pickle is a program that may call any function by name. This reader allows seven names (functions that
rebuild tensors and parameters, OrderedDict, argparse.Namespace, the name of a Lightning class, storage types) and refuses all
others. Values are read lazily. It reads both of PyTorch's formats: the zip archive (since 1.6) and the older stream.

Of a TorchScript archive, the tensors of the module are read by name, as of its state_dict. Its code is not opened: a module is a plain
container here, whatever its class is called.
"""

import mmap
import os
import pickle
import pickletools
import reprlib
import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensor
from dit_jax.storage.paths import local_path

STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\n\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # LEGACY_MAGIC, pickled
LEGACY_PROTOCOL = 1001
LARGEST_RANK = 8
# Of one pickle. The checkpoint of DiT-XL/2, with its moving average and optimizer, has some 60,000 operations.
MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 1_000_000
MAX_PARTS = 10_000_000  # with every reference counted as a copy: what printing, hashing or comparing a value may visit
MAX_DEPTH = 500  # hashing a tuple recurses without a limit of its own


class Storage(NamedTuple):
    """A flat array in the file."""

    dtype: np.dtype
    size: int
    load: Callable[[], bytes | memoryview]


# Objects that a pickle can reference must not accept attributes: it could otherwise modify this module through BUILD.


class StorageType(NamedTuple):
    """Stands in for torch.FloatStorage and similar classes."""

    dtype: np.dtype


class Rebuild(NamedTuple):
    """Stands in for a function of torch._utils."""

    function: Callable

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class Plain(dict):
    """Stands in for OrderedDict."""

    def __setstate__(self, state):
        pass  # drops the `_metadata` of a state_dict


class Namespace:
    """Stands in for argparse.Namespace, the options in a training checkpoint; its content is dropped."""

    def __setstate__(self, state):
        pass


class Script(dict):
    """Stands in for a module of TorchScript: its attributes."""

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of the module and of those inside, by name."""
        found = {}
        for name, value in self.items():
            if isinstance(value, Script):
                found |= value.tensors(f"{prefix}{name}.")
            elif isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
        return found


def is_pt(path: str | os.PathLike) -> bool:
    """Whether the file starts like one of the two formats; the rest is not checked."""
    path = local_path(path)
    with open(path, "rb") as file:
        start = file.read(len(LEGACY_START))
    return start.startswith(ZIP_MAGIC) or start == LEGACY_START


def read(path: str | os.PathLike) -> Any:
    """Reads the saved object: dicts, lists, tuples, numbers and strings, with a `Tensor` for each tensor.

    Of a module of TorchScript, {name: Tensor}.

    Raises:
        UserError: the file is damaged or truncated, or references anything but tensors and plain containers.
    """
    path = local_path(path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == ZIP_MAGIC
        content = _read_zip(path) if is_zip else _read_legacy(path)
        return content.tensors() if isinstance(content, Script) else content
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle or archive raises almost anything
        raise UserError(
            f"{path} is not a complete PyTorch file ({type(error).__name__}: {error!s:.300}); download or write it again"
        ) from error


def _read_zip(path: Path):
    archive = zipfile.ZipFile(path)
    members = {member.filename: member for member in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise UserError(f"the zip archive has {len(roots)} members */data.pkl; PyTorch writes exactly one")
    root = roots[0]

    def member(name) -> zipfile.ZipInfo:
        if name not in members:
            raise UserError(f"{name} is missing from the archive")
        if members[name].compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{name} is compressed, which PyTorch never does")
        if members[name].file_size > path.stat().st_size:
            raise UserError(f"{name} claims {members[name].file_size} bytes, more than the size of the file")
        return members[name]

    if (size := member(f"{root}data.pkl").file_size) > MAX_PICKLE_BYTES:
        raise UserError(f"{root}data.pkl claims {size:,} bytes; the description of tensors needs less than {MAX_PICKLE_BYTES:,}")
    if f"{root}byteorder" in members and archive.read(member(f"{root}byteorder")) != b"little":
        raise UserError("was written on a big-endian machine; save it again on a little-endian one")
    read_member = lru_cache(maxsize=1)(archive.read)  # tensors that share a storage are adjacent; checks the CRC

    def storage(dtype, key, size):
        info = member(f"{root}data/{key}")
        if info.file_size != size * dtype.itemsize:
            raise UserError(f"{info.filename} has {info.file_size} bytes, but {size} x {dtype} need {size * dtype.itemsize}")
        return Storage(dtype, size, partial(_read_stored, path, read_member, info))

    return _unpickle(BytesIO(archive.read(member(f"{root}data.pkl"))), storage)


def _read_stored(path, read_member, info):
    try:
        return read_member(info)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:  # RuntimeError: it claims to be encrypted
        raise UserError(f"{path}: {info.filename} is damaged ({error}); download or write the file again") from None


def _read_legacy(path: Path):
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if _unpickle(content) != LEGACY_MAGIC or _unpickle(content) != LEGACY_PROTOCOL:
        raise UserError("is in neither of PyTorch's formats (a zip archive, or the stream written before 1.6)")
    if not _unpickle(content)["little_endian"]:
        raise UserError("was written on a big-endian machine; save it again on a little-endian one")

    storages: dict[str, Storage] = {}
    places: dict[str, slice] = {}

    def storage(dtype, key, size):
        entry = storages.setdefault(key, Storage(dtype, size, lambda: memoryview(content)[places[key]]))
        if entry[:2] != (dtype, size):
            raise UserError(f"storage {key} is described twice, as {entry[:2]} and as {(dtype, size)}")
        return entry

    result = _unpickle(content, storage)
    for key in _unpickle(content):
        dtype, size, _ = storages[key]
        stored = int.from_bytes(content.read(8), "little")
        start, end = content.tell(), content.tell() + size * dtype.itemsize
        if stored != size or end > len(content):
            raise UserError(
                f"storage {key} has {stored} values in a file of {len(content)} bytes, but {size} x {dtype} from "
                f"byte {start} on are needed"
            )
        places[key] = slice(start, end)
        content.seek(end)
    if places.keys() != storages.keys():
        raise UserError(f"the values of {len(storages.keys() - places.keys())} storages are missing")
    return result


def _unpickle(file, storage=None):
    """Reads the next pickle of a file and leaves the file position after it.

    storage: (dtype, key, size) -> Storage.
    """
    start = file.tell()
    part = BytesIO(file.read(MAX_PICKLE_BYTES))
    _scan(part)
    file.seek(start + part.tell())
    part.seek(0)
    return _Unpickler(part, storage).load()


class _Part(NamedTuple):
    """What one entry of the unpickler's stack would be: its number of parts and its depth."""

    parts: int
    depth: int


MARK = _Part(0, 0)


def _scan(file) -> None:
    """Runs a pickle with sizes in place of values, and refuses one that would need much time or memory.

    A tuple may hold another one twice, and that one another one twice: 40 such lines describe 2^40 parts.
    """
    stack: list[_Part] = []
    memo: dict[int, _Part] = {}
    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if number >= MAX_OPCODES:
            raise UserError(f"has a pickle of more than {MAX_OPCODES:,} operations, which is refused")
        if name.startswith("EXT"):
            raise UserError("references a registered extension, which is refused")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else int(argument)
            if place > MAX_PARTS:
                raise UserError(f"needs memory for {place} references, which is refused")
            memo[place] = stack[-1]
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
            continue
        taken: list[_Part] = []
        wanted = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            wanted = opcode.stack_before.index(pickletools.markobject)
            while (part := stack.pop()) is not MARK:
                taken.append(part)
        taken += [stack.pop() for _ in range(wanted)]
        if pickletools.markobject in opcode.stack_after:
            stack.append(MARK)
            continue
        made = _Part(1 + sum(part.parts for part in taken), 1 + max((part.depth for part in taken), default=0))
        if made.parts > MAX_PARTS or made.depth > MAX_DEPTH:
            raise UserError(
                f"describes a value of more than {MAX_PARTS:,} parts or {MAX_DEPTH} levels, which is refused: a state_dict needs "
                "a few thousand parts"
            )
        stack += [made] * len(opcode.stack_after)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storage):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module, name):
        if module in ("torch", "torch.storage") and name in STORAGES:
            return StorageType(np.dtype(STORAGES[name]))
        if module == "__torch__" or module.startswith("__torch__."):
            return Script
        if (module, name) not in GLOBALS:
            raise UserError(
                f"references {f'{module}.{name}':.200}, which is refused: a weights file needs only tensors, plain containers "
                "and argparse.Namespace. If you trust its origin, load it in PyTorch and save its state_dict"
            )
        return GLOBALS[module, name]

    def persistent_load(self, reference):
        kind, storage_type, key, _, size, *view = reference
        if kind != "storage" or not isinstance(storage_type, StorageType) or not isinstance(key, str) or any(view):
            raise UserError(f"has an unknown kind of reference, {reprlib.repr(reference)}")
        return self._storage(storage_type.dtype, key, _whole("storage size", size))


def _whole(what, value) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise UserError(f"has {what} {reprlib.repr(value)}, not an integer in [0, 2^63)")
    return value


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> Tensor:
    """A view of a storage; views that exceed the storage are refused before anything is allocated.

    Args:
        metadata: {"neg": True} of a tensor whose values PyTorch negates lazily (`torch._utils._rebuild_tensor_v2`).
    """
    if not isinstance(storage, Storage):
        raise UserError(f"has a tensor over {type(storage).__name__}, not over a storage")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or metadata.keys() - {"neg"} or (storage.dtype == np.bool_ and metadata):
        raise UserError(
            f"has a tensor of {storage.dtype} with the metadata {reprlib.repr(metadata)}, which is not understood: load the file "
            "in PyTorch, resolve_conj() and resolve_neg() its tensors, and save them again"
        )
    negative = bool(metadata.get("neg"))
    offset = _whole("offset", offset)
    if max(len(shape), len(strides)) > LARGEST_RANK:
        raise UserError(f"has a tensor of {len(shape)} dimensions; at most {LARGEST_RANK} are read")
    shape, strides = (tuple(_whole("tensor size", n) for n in sizes) for sizes in (shape, strides))
    numbers = 1
    for n in shape:
        numbers *= n
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if numbers else 0
    # A view may repeat values (stride 0). A tensor larger than its storage is not a weight and could have any size.
    if numbers > storage.size or last >= max(storage.size, 1):
        raise UserError(
            f"has a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset} over a storage of "
            f"{storage.size} values"
        )
    dtype, size = storage.dtype, storage.dtype.itemsize
    strides = tuple(
        stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)
    )  # of an axis of size 1 the stride is unused and arbitrary

    def load():
        view = np.ndarray(shape, dtype, storage.load(), offset * size, tuple(stride * size for stride in strides))
        return np.negative(view) if negative else view

    return Tensor(shape, dtype, load)


def _rebuild_parameter(tensor, *_):
    return tensor


def _list(values):
    return list(values)


GLOBALS = {
    # Typed lists among the attributes of TorchScript's modules.
    **{("torch.jit._pickle", f"build_{kind}list"): Rebuild(_list) for kind in ("int", "double", "bool", "tensor")},
    ("torch._utils", "_rebuild_tensor"): Rebuild(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Rebuild(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Rebuild(_rebuild_parameter),
    ("collections", "OrderedDict"): Plain,
    ("argparse", "Namespace"): Namespace,
    # A key in checkpoints of PyTorch Lightning, as the LDM code writes them. A string can be neither called nor changed.
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): "ModelCheckpoint",
}
