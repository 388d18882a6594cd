"""The copy of its codec that a run keeps in its own folder, so that sampling needs nothing else.

<workdir>/codec/   config.json and diffusion_pytorch_model.safetensors, as diffusers writes an AutoencoderKL
"""

import os
import shutil
from pathlib import Path

from dit_jax.interop import vae

FOLDER = "codec"


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
