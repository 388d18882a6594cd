"""The weights file of dit_jax: one .safetensors with the parameters and everything that sampling needs to know of the model.

The tensors are the network's parameters under their paths ("blocks/attention/qkv/kernel", blocks stacked); of a network with
frozen text encoders also what they make of the empty text ("null_condition/clip_l/context"), without which it could not be
sampled where the encoders are not. The header's
metadata has three strings: `dit_jax`, the version of the format; `config`, JSON of the config sections below; `origin`, JSON of
where the weights came from. Sampling from the file needs no workdir and nothing of the machine that wrote it.
"""

import json
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop import vae
from dit_jax.interop.tensors import Tensor, Tensors, check, common_dtype, finite, open_safetensors, write_safetensors
from dit_jax.parallel.rules import path_name
from dit_jax.runtime import user_code
from dit_jax.storage.bounded import json_object
from dit_jax.storage.paths import local_path
from dit_jax.storage.upgrade import upgrade_stored

VERSION = "1"
NULL = "null_condition/"  # begins the names of the tensors of `Weights.null`
SECTIONS = ("task", "model", "conditioner", "process", "codec", "transform", "sampler", "guidance", "ema_decay", "imports")


class Weights(NamedTuple):
    """Parameters by path, the config sections that describe their model, and their origin.

    null: what frozen text encoders make of "", by encoder and entry ("clip_l/context"); {} if it is not known.
    """

    tensors: Mapping[str, Tensor]
    sections: dict[str, Any]
    origin: dict[str, Any]
    null: Mapping[str, Tensor] = MappingProxyType({})


def sections_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a resolved config that a weights file stores, with lists for tuples; paths of a machine are emptied.

    They are those of the codec and of text encoders. The name of a published codec stays, and so do their SHA-256.
    """
    sections = {name: config[name] for name in SECTIONS if name in config}
    if "path" in sections["codec"] and sections["codec"]["path"] not in vae.PUBLISHED:
        sections["codec"] = {**sections["codec"], "path": ""}
    if sections.get("conditioner", {}).get("name") == "text":
        sections["conditioner"] = {**sections["conditioner"], "weights": (), "tokenizers": ()}
    return {name: _with_lists(section) for name, section in sections.items()}


def _with_lists(value: Any) -> Any:
    """The value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {name: _with_lists(x) for name, x in value.items()}
    return [_with_lists(x) for x in value] if isinstance(value, (tuple, list)) else value


def write(path: str | os.PathLike, weights: Weights) -> None:
    """Writes the file; an existing one is replaced atomically.

    Raises:
        UserError: the name does not end in .safetensors.
    """
    path = local_path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors")
    write_safetensors(
        path,
        {**weights.tensors, **{NULL + name: x for name, x in weights.null.items()}},
        {"dit_jax": VERSION, "config": json.dumps(weights.sections), "origin": json.dumps(weights.origin)},
    )


def read(path: str | os.PathLike) -> Weights:
    """Opens the file; parameters are read lazily.

    Raises:
        UserError: the file does not exist, is damaged, or is not in this format.
    """
    path = local_path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a .safetensors file written by dit_jax.convert")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; convert it with python -m dit_jax.convert")
    tensors, metadata = open_safetensors(path)
    if metadata.get("dit_jax") != VERSION:
        raise UserError(
            f"{path} has no header of dit_jax, version {VERSION} (it has {sorted(metadata) or 'none'}); convert it "
            "with python -m dit_jax.convert --from=official, sit or diffusers"
        )
    what, remedy = f"the header of {path}", "convert the weights again"
    if missing := [name for name in ("config", "origin") if name not in metadata]:
        raise UserError(f"{what} has no {' and no '.join(missing)}; {remedy}")
    stored = json_object(metadata["config"], what, remedy)
    sections = upgrade_stored({"task": {"name": "diffusion"}, **stored}, what, remedy)
    sections = {name: section for name, section in sections.items() if name in SECTIONS or name in stored}
    if "task" not in stored:  # files of dit_jax 0.1.0
        del sections["task"]
    origin = json_object(metadata["origin"], what, remedy)
    user_code.expect(sections.get("imports", ()))
    null = {name.removeprefix(NULL): x for name, x in tensors.items() if name.startswith(NULL)}
    return Weights({name: x for name, x in tensors.items() if not name.startswith(NULL)}, sections, origin, null)


def load(path: str | os.PathLike, tree: Any) -> Any:
    """Reads the parameters as NumPy arrays, in the tree's structure and the file's dtype.

    Args:
        tree: parameters of the network that the file's sections describe, as ShapeDtypeStructs.

    Raises:
        UserError: as `read`; or tensors are missing, extra or misshapen, their dtypes differ, or they hold NaN or infinity.
    """
    return load_tensors(read(path).tensors, tree, str(path))


def load_tensors(tensors: Tensors, tree: Any, what: str) -> Any:
    """Reads opened parameters as NumPy arrays, in the tree's structure and their own dtype.

    Raises:
        UserError: tensors are missing, extra or misshapen, their dtypes differ, or they hold NaN or infinity; `what` names their
            file in the message.
    """
    tensors = finite(tensors, what)
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    check(tensors, {path_name(keys): leaf.shape for keys, leaf in paths}, what)
    common_dtype(tensors, what)
    return jax.tree.unflatten(structure, [np.asarray(tensors[path_name(keys)].load()) for keys, _ in paths])
