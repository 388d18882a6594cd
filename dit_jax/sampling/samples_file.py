"""The file that samples travel in: npz with arr_0 uint8 [N, H, W, C], labels int32 [N], and made_by, a JSON text."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dit_jax.errors import UserError
from dit_jax.sampling.grid import write_image_grid


def describe(config, step: int, seed: int) -> dict:
    """How samples were made, to travel with them."""
    return {"step": step, "seed": seed, "ema_decay": config.ema_decay, "sampler": config.sampler.to_dict(),
            "guidance": config.guidance.to_dict(), "model": config.model.to_dict(), "process": config.process.to_dict()}


def check_writable(path: Path):
    """Raises a UserError if `write` could not write there: before hours of sampling, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.partial")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another file") from None
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")


def write(path: Path, images: np.ndarray, labels: np.ndarray, made_by: dict):
    """Writes the npz, atomically, and a grid of the first 100 images beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        np.savez(file, arr_0=images, labels=labels, made_by=np.array(json.dumps(made_by)))
    os.replace(partial, path)
    write_image_grid(path.with_suffix(".png"), images[:100], columns=10 if len(images) >= 10 else None)


def write_picture(path: Path, picture: np.ndarray) -> Path:
    """Writes uint8 [H, W, 3] as PNG, atomically; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    Image.fromarray(picture).save(partial, format="PNG")
    os.replace(partial, path)
    return path


def read(path: Path) -> tuple[np.ndarray, dict | None]:
    """(uint8 [N, H, W, C], how they were made if the file says so) of an npz.

    Raises:
        UserError: not a readable npz, no arr_0, another dtype or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file:
                raise UserError(f"{path} has no array arr_0 (it has {', '.join(file.files) or 'nothing'}); write it with "
                                "dit_jax.sample or np.savez(path, images)")
            images = file["arr_0"]
            made_by = json.loads(str(file["made_by"])) if "made_by" in file else None
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:
        raise UserError(f"{path} is not a readable npz of images: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) < 2:
        raise UserError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}; uint8 [N, H, W, 1 or 3] with N >= 2 is needed")
    return images, made_by
