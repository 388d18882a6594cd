"""Writes a state_dict as PyTorch's .pt (the zip archive of 1.6 and later) without PyTorch."""

import os
import pickle
import zipfile

import numpy as np

from dit_jax.interop.pt_reader import STORAGES
from dit_jax.interop.tensors import Tensor, Tensors, raw_bytes
from dit_jax.storage.atomic import remove_leftovers, replacing
from dit_jax.storage.paths import local_path

STORAGE_NAMES = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
ROOT = "archive"
ALIGNMENT = 64  # PyTorch's alignment of storages, so that it can memory-map the file
LOCAL_HEADER = 30  # bytes of a zip member's header before its name


def write(path: str | os.PathLike, tensors: Tensors) -> None:
    """Writes a dict of tensors that torch.load(weights_only=True) reads. An existing file is replaced atomically."""
    path = local_path(path)
    remove_leftovers(path.parent, path.name)
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", _pickle(tensors))
        _add(archive, "byteorder", b"little")
        for number, tensor in enumerate(tensors.values()):
            _add(archive, f"data/{number}", raw_bytes(tensor))
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content):
    member = zipfile.ZipInfo(f"{ROOT}/{name}")  # has a fixed date, so that equal weights give equal files
    assert archive.fp is not None  # it is open
    start = archive.fp.tell() + LOCAL_HEADER + len(member.filename) + 4
    padding = -start % ALIGNMENT
    member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    archive.writestr(member, content)


def _pickle(tensors: Tensors) -> bytes:
    """Pickles {name: tensor} as torch.save does, with protocol 2; storages are referenced, not contained."""
    items = b"".join(_atom(name) + _tensor(number, tensor) for number, (name, tensor) in enumerate(tensors.items()))
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _atom(value) -> bytes:
    """Opcodes that push a string, a number, a bool or a tuple of them."""
    return pickle.dumps(value, 2)[2:-1]


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tensor(number: int, tensor: Tensor) -> bytes:
    """Opcodes that call _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    strides, size = [], 1
    for n in reversed(tensor.shape):
        strides.insert(0, size)
        size *= n
    storage = (
        pickle.MARK
        + _atom("storage")
        + _global("torch", STORAGE_NAMES[tensor.dtype])
        + _atom(str(number))
        + _atom("cpu")
        + _atom(size)
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + pickle.MARK
        + storage
        + _atom(0)
        + _atom(tensor.shape)
        + _atom(tuple(strides))
        + _atom(False)
        + hooks
        + pickle.TUPLE
        + pickle.REDUCE
    )
