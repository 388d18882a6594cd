"""Reads the weights of pretrained text encoders, in Hugging Face's layout, for the conditioner `text`."""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.encoders.text import CLIPS, NULL, Text
from dit_jax.errors import UserError, failures, raise_all
from dit_jax.interop import clip_text, t5
from dit_jax.interop.tensors import Tensor, Tensors, check, finite, open_safetensors, open_sharded, write_safetensors
from dit_jax.storage.paths import local_path
from dit_jax.storage.sealed import sha256_of

NULL_FILE = "null_condition.safetensors"  # in the folder of a run
FILES = ("model.safetensors", "model.safetensors.index.json", "model.fp16.safetensors")  # in order of precedence


def find(path: str) -> Path:
    """The file of weights that a path names: a .safetensors file, its index, or a folder with one of FILES.

    Raises:
        UserError: there is none.
    """
    place = local_path(path)
    if place.is_dir():
        found = [place / name for name in FILES if (place / name).is_file()]
        if not found:
            raise UserError(f"{place} has none of {', '.join(FILES)}; give the folder of a text encoder in Hugging Face's layout")
        return found[0]
    if not place.is_file() or not place.name.endswith((".safetensors", ".safetensors.index.json")):
        what = "does not exist" if not place.exists() else "is not a .safetensors file"
        raise UserError(
            f"the text encoder's weights {place} {what}; give a folder or a .safetensors file in Hugging Face's layout"
        )
    return place


def read(conditioner: Text, name: str) -> Any:
    """The weights of one encoder as NumPy arrays in the conditioner's dtype.

    Raises:
        UserError: they do not exist, are damaged, hold NaN or infinity, or are those of another network or size.
    """
    file = find(conditioner.weights_of(name))
    tensors: Tensors = open_sharded(file)[0] if file.name.endswith(".json") else open_safetensors(file)[0]
    layout, wanted = (clip_text if name in CLIPS else t5), conditioner.network(name)
    found, ours = layout.to_ours(tensors, str(file))
    if (own := found.clone(dtype=wanted.dtype, param_dtype=wanted.param_dtype)) != wanted:
        fields = ("depth", "width", "heads", "vocabulary", "projection_width", "hidden_width")
        differ = [f for f in fields if getattr(own, f, None) != getattr(wanted, f, None)]
        sizes = ", ".join(f"{f} {getattr(own, f)} for {getattr(wanted, f)}" for f in differ)
        raise UserError(f"{file} is not {name}: it has {sizes}; name the encoder of this size, or give the weights of {name}")
    ours = finite(ours, str(file))
    return unflatten_dict({path: np.asarray(x.load()).astype(wanted.param_dtype) for path, x in ours.items()}, sep="/")


def check_files(conditioner: Text, name: str) -> None:
    """Opens the files of an encoder. Raises a UserError for each that is missing."""
    raise_all(failures(lambda: find(conditioner.weights_of(name)), lambda: conditioner.tokenizer_of(name)([""])))


def read_all(conditioner: Text) -> dict[str, Any]:
    """The weights of all pretrained encoders, by name.

    Raises:
        UserError: see `read`; for an encoder without a tokenizer too.
    """
    for name in conditioner.pretrained:
        conditioner.tokenizer_of(name)([""])  # opens the tokenizers first, which is quick
    return {name: read(conditioner, name) for name in conditioner.pretrained}


def weights_sha256(path: str) -> str:
    """SHA-256 of the file of weights that a path names; of weights in several files, that of their sums.

    Raises:
        UserError: see `find`; a file of several does not exist.
    """
    file = find(path)
    if not file.name.endswith(".json"):
        return sha256_of(file)
    open_sharded(file)  # checks that the files are there
    shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    return hashlib.sha256("\n".join(sha256_of(file.parent / name) for name in shards).encode()).hexdigest()


def checked_sha256(conditioner: Text, name: str) -> str:
    """`weights_sha256` of an encoder.

    Raises:
        UserError: as there; it is not what `conditioner.sha256` says.
    """
    path = conditioner.weights_of(name)
    found, wanted = weights_sha256(path), conditioner.by_encoder("sha256").get(name)
    if wanted and found != wanted:
        raise UserError(
            f"the weights of {name} in {path} have the SHA-256 {found}, and conditioner.sha256 is {wanted}; give those weights, "
            "or leave conditioner.sha256 empty"
        )
    return found


def are_there(conditioner: Text) -> bool:
    """Whether every frozen encoder has a path of weights that exists."""
    paths = [conditioner.by_encoder("weights").get(name) for name in conditioner.frozen]
    return all(path and local_path(path).exists() for path in paths)


def keep_null(workdir: Path, null: Any) -> None:
    """Writes <workdir>/null_condition.safetensors, what the frozen encoders make of "", unless it exists."""
    if not (workdir / NULL_FILE).exists():
        arrays = {name: np.asarray(x) for name, x in flatten_dict(null, sep="/").items()}
        tensors = {name: Tensor(x.shape, x.dtype, partial(np.asarray, x)) for name, x in arrays.items()}
        write_safetensors(workdir / NULL_FILE, tensors, {"dit_jax_null_condition": "1"})


def stored_null(workdir: Path) -> dict[str, Tensor]:
    """What `keep_null` wrote, read lazily; {} without it.

    Raises:
        UserError: the file is damaged.
    """
    file = workdir / NULL_FILE
    return dict(open_safetensors(file)[0]) if file.exists() else {}


def null_of(conditioner: Text, tensors: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """The entry NULL of the constants as NumPy arrays, of stored tensors.

    Raises:
        UserError: they are those of other encoders.
    """
    wanted = flatten_dict(conditioner.constants()[NULL], sep="/")
    check(tensors, {name: x.shape for name, x in wanted.items()}, f"the null condition of {what}")
    return unflatten_dict({name: np.asarray(tensors[name].load()).astype(x.dtype) for name, x in wanted.items()}, sep="/")


def with_null(conditioner: Text, placed: dict[str, Any], sharding: Any) -> dict[str, Any]:
    """The constants of the conditioner: the weights on the mesh, and what they make of "", with this sharding."""
    ids = {name: jnp.asarray(x) for name, x in conditioner.empty_tokens().items()}
    return placed | {NULL: jax.jit(conditioner.encode_empty, out_shardings=sharding)(placed, ids)}
