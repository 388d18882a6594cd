"""Resolves a run's frozen codec and stores a copy of it in the run's folder, so that sampling needs nothing else.

<workdir>/codec/   config.json and diffusion_pytorch_model.safetensors, in the format of diffusers' AutoencoderKL
"""

import os
import shutil
from pathlib import Path
from typing import Any

import ml_collections

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.interop import vae
from dit_jax.runtime.console import say

FOLDER = "codec"


def settle(config: ml_collections.ConfigDict, workdir: Path | None) -> tuple[ml_collections.ConfigDict, Any]:
    """Completes the config's codec section from the codec's weights; returns (config, weights as NumPy arrays).

    The weights are {} if the codec has none. If the run's folder already holds a codec, that copy is read, and `codec.path` need
    not exist any more. A `codec.scale` or `codec.shift` of None is set to the value in the weights' folder. `codec.sha256` is set
    to the hash of the weights.

    Raises:
        UserError: the codec needs weights and has none; they do not fit the config; their hash is not `codec.sha256`.
    """
    if config.task.name != "diffusion" or config.codec.name == "pixels":
        return config, {}
    own = workdir / FOLDER if workdir else None
    if own and own.exists():
        path = own
        if config.codec.path and not Path(config.codec.path).expanduser().exists():
            say(f"codec.path {config.codec.path} no longer exists; using the copy in {own}")
    elif config.codec.path:
        path = vae.find(config.codec.path)
    else:
        raise UserError(
            "codec.path is empty; give the folder or .safetensors file of the VAE's weights, or the --workdir of a "
            "run that trained one (--config.codec.path=... or, to sample, --codec_path=...)"
        )
    config = ml_collections.ConfigDict(config.to_dict())
    if path.is_dir():
        stored = vae.read_codec(path)
        for field in ("scale", "shift"):
            chosen, of_weights = config.codec.get(field), getattr(stored, field)
            if chosen is None:
                config.codec[field] = of_weights
            elif getattr(build.codec(config), field) != of_weights and path != own:
                say(f"using codec.{field} {chosen} from the config instead of {of_weights} from {path}")
    elif config.codec.get("scale") is None:
        raise UserError(
            f"codec.path {path} is a single file, which does not record the scale of its latents; set codec.scale, or "
            "give the folder with config.json"
        )
    params = vae.load_diffusers(path, build.codec(config))
    digest, wanted = vae.weights_sha256(params), config.codec.get("sha256")
    if wanted and digest != wanted:
        raise UserError(
            f"the weights in {path} have the SHA-256 {digest}, but codec.sha256 is {wanted}; give the weights with that "
            "hash, or leave codec.sha256 empty"
        )
    config.codec.sha256 = digest
    return config.lock(), params


def keep(workdir: Path, codec, params):
    """Writes <workdir>/codec/ atomically, unless it exists."""
    folder = workdir / FOLDER
    if params and not folder.exists():
        replace(folder, codec, params)


def replace(folder: Path, codec, params):
    """Replaces the codec's folder atomically."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    vae.save_diffusers(partial, codec, params)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
