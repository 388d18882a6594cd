"""Reads the weights of pretrained text encoders, in Hugging Face's layout, for the conditioner `text`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from dit_jax.encoders.text import CLIPS, NULL, Text
from dit_jax.errors import UserError, failures, raise_all
from dit_jax.interop import clip_text, t5
from dit_jax.interop.tensors import Tensors, finite, open_safetensors, open_sharded
from dit_jax.storage.paths import local_path

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


def check(conditioner: Text, name: str) -> None:
    """Opens the files of an encoder. Raises a UserError for each that is missing."""
    raise_all(failures(lambda: find(conditioner.weights_of(name)), lambda: conditioner.tokenizer_of(name)([""])))


def read_all(conditioner: Text) -> dict[str, Any]:
    """The weights of all frozen encoders, by name.

    Raises:
        UserError: see `read`; for an encoder without a tokenizer too.
    """
    conditioner.empty_tokens()  # opens the tokenizers first, which is quick
    return {name: read(conditioner, name) for name in conditioner.frozen}


def with_null(conditioner: Text, placed: dict[str, Any], sharding: Any) -> dict[str, Any]:
    """The constants of the conditioner: the weights on the mesh, and what they make of "", with this sharding."""
    ids = {name: jnp.asarray(x) for name, x in conditioner.empty_tokens().items()}
    return placed | {NULL: jax.jit(conditioner.encode_empty, out_shardings=sharding)(placed, ids)}
