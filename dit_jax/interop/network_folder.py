"""Folders of networks as diffusers writes them: config.json and the weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensors, write_safetensors
from dit_jax.storage.atomic import remove_leftovers, write_json
from dit_jax.storage.bounded import read_json
from dit_jax.storage.claim import LOCK, claim
from dit_jax.storage.paths import local_path

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHTS_NAMES = (WEIGHTS_NAME, WEIGHTS_NAME + ".index.json", "diffusion_pytorch_model.bin")
PARTS = ("transformer", "unet")  # folders of a pipeline that hold its network


def find_weights(path: str | os.PathLike) -> Path:
    """Returns the weights file of a folder; a file is returned unchanged.

    Raises:
        UserError: the folder has none.
    """
    path = local_path(path)
    if not path.is_dir():
        return path
    for name in WEIGHTS_NAMES:
        if (path / name).is_file():
            return path / name
    part = next((part for part in PARTS if (path / part).is_dir()), None)
    hint = f"; give {path / part}, the folder in it" if part else ": give the folder of the network"
    raise UserError(f"{path} has none of {', '.join(WEIGHTS_NAMES)}{hint}")


def read_config(weights: str | os.PathLike, classes: tuple[str, ...] = ()) -> dict:
    """Reads config.json in the weights' folder.

    classes: of diffusers, one of which it must describe; any if empty.

    Raises:
        UserError: it is missing, damaged, or of another class of network.
    """
    weights = local_path(weights)
    path = weights.parent / "config.json"
    try:
        config = read_json(path, "download it again", {"_class_name": str})
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; it records what the tensors do not determine, such as the number of heads. Copy it from "
            f"where {weights.name} came from"
        ) from None
    if classes and config["_class_name"] not in classes:
        raise UserError(f"{path} describes a {config['_class_name']:.100}, not a {' or '.join(classes)}")
    return config


def write(folder: str | os.PathLike, tensors: Tensors, config: Mapping[str, Any], name: str = WEIGHTS_NAME) -> Path:
    """Writes config.json and the weights to a folder that `from_pretrained` reads; returns the weights' path.

    name: of the weights' file; "model.safetensors" for transformers.

    Raises:
        UserError: the folder holds other files; another command is writing it.
    """
    folder = local_path(folder)
    if folder.suffix in (".safetensors", ".pt", ".json") or folder.is_file():
        raise UserError(f"--out={folder}: give the name of a folder")
    with claim(folder, "writing weights", "--out"):
        remove_leftovers(folder, name, "config.json")
        if strange := sorted({path.name for path in folder.iterdir()} - {LOCK, name, "config.json"}):
            raise UserError(f"--out={folder} holds {strange[0]}; give an empty folder, or one that does not exist")
        write_safetensors(folder / name, tensors, {"format": "pt"})
        write_json(folder / "config.json", dict(config), indent=2)
    return folder / name
