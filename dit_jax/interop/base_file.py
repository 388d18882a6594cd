"""The frozen parameters of a run that trains a part of a network, kept once in its folder.

<workdir>/base.safetensors   the parameters under their paths; the metadata has their SHA-256
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensor, check, open_safetensors, write_safetensors
from dit_jax.parallel.rules import path_name

FILE = "base.safetensors"


def keep(workdir: Path, base: Any) -> None:
    """Writes the parameters, NumPy arrays, unless the file exists."""
    if (workdir / FILE).exists():
        return
    flat = {name: np.asarray(x) for name, x in flatten_dict(base, sep="/").items()}
    tensors = {name: Tensor(x.shape, x.dtype, partial(np.asarray, x)) for name, x in flat.items()}
    write_safetensors(workdir / FILE, tensors, {"dit_jax_base": "1", "sha256": sha256(base)})


def read(workdir: Path, like: Any) -> Any:
    """The parameters as NumPy arrays, in the structure of ShapeDtypeStructs.

    Raises:
        UserError: the file does not exist, does not fit the network, or is damaged.
    """
    path = workdir / FILE
    remedy = "restore it, or begin again with --restart"
    if not path.exists():
        raise UserError(f"{path} does not exist: it holds the frozen parameters of the run; {remedy}")
    tensors, metadata = open_safetensors(path)
    leaves = jax.tree_util.tree_leaves_with_path(like)
    check(tensors, {path_name(keys): x.shape for keys, x in leaves}, str(path))
    base = unflatten_dict({name: np.asarray(tensor.load()) for name, tensor in tensors.items()}, sep="/")
    if metadata.get("sha256") != sha256(base):
        raise UserError(f"{path} is damaged (its SHA-256 is not the stored one); {remedy}")
    return base


def sha256(tree: Any) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes of a tree of arrays."""
    digest = hashlib.sha256()
    for name, x in sorted(flatten_dict(tree, sep="/").items()):
        x = np.ascontiguousarray(x)
        digest.update(f"{name} {x.shape} {x.dtype}\n".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
