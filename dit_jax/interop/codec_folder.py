"""Where a run finds its frozen codec: given by the config, kept in the run's own folder, so that sampling needs nothing else.

<workdir>/codec/   config.json and diffusion_pytorch_model.safetensors, as diffusers writes an AutoencoderKL
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
    """(the config with what only the codec's weights can tell, the weights as NumPy arrays); ({} where there are none).

    The folder of a run that already holds its codec is where it is read from: the path in the config need not exist any more.
    `codec.scale` and `codec.shift` that are None become those of the weights' folder; `codec.sha256` becomes the weights' hash.

    Raises:
        UserError: the codec needs weights and there are none; they do not fit the config; the hash is not the one asked for.
    """
    if config.task.name != "diffusion" or "path" not in config.codec:
        return config, {}
    own = workdir / FOLDER if workdir else None
    if own and own.exists():
        path = own
        if config.codec.path and not Path(config.codec.path).expanduser().exists():
            say(f"codec.path {config.codec.path} is gone; the copy in {own} is used")
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
            chosen, found = config.codec.get(field), getattr(stored, field)
            if chosen is None:
                config.codec[field] = found
            elif getattr(build.codec(config), field) != found and path != own:
                say(f"codec.{field} {chosen} of the config is used, not {found} of {path}")
    elif config.codec.get("scale") is None:
        raise UserError(
            f"codec.path {path} is a lone file, which does not tell the scale of its latents; give codec.scale, or "
            "the folder with config.json"
        )
    params = vae.load_diffusers(path, build.codec(config))
    found, wanted = vae.weights_sha256(params), config.codec.get("sha256")
    if wanted and found != wanted:
        raise UserError(
            f"the weights in {path} have the SHA-256 {found} and codec.sha256 asks for {wanted}; give those weights, "
            "or leave codec.sha256 empty"
        )
    config.codec.sha256 = found
    return config.lock(), params


def keep(workdir: Path, codec, params):
    """Writes <workdir>/codec/, at once or not at all; one that is there is left."""
    folder = workdir / FOLDER
    if params and not folder.exists():
        replace(folder, codec, params)


def replace(folder: Path, codec, params):
    """Writes the codec's folder anew: never half of one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    vae.save_diffusers(partial, codec, params)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
