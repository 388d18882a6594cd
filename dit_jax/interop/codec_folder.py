"""Stores a copy of the codec in a run's folder, so that sampling needs nothing else.

<workdir>/codec/   config.json and diffusion_pytorch_model.safetensors, in the format of diffusers' AutoencoderKL or VQModel
"""

from pathlib import Path
from typing import Any

from dit_jax.codecs.kl_vae import Autoencoder
from dit_jax.interop import vae
from dit_jax.storage.atomic import replacing_folder

FOLDER = "codec"


def keep(workdir: Path, codec: Autoencoder, params: Any) -> None:
    """Writes <workdir>/codec/ atomically, unless it exists."""
    folder = workdir / FOLDER
    if params and not folder.exists():
        replace(folder, codec, params)


def replace(folder: Path, codec: Autoencoder, params: Any) -> None:
    """Replaces the codec's folder atomically."""
    with replacing_folder(folder) as partial:
        vae.save_diffusers(partial, codec, params)
