"""The copy of its codec that a run keeps in its own folder, so that sampling needs nothing else.

<workdir>/codec/   config.json and diffusion_pytorch_model.safetensors, as diffusers writes an AutoencoderKL
"""

from pathlib import Path

from dit_jax.interop import vae
from dit_jax.storage.atomic import replacing_folder

FOLDER = "codec"


def keep(workdir: Path, codec, params):
    """Writes <workdir>/codec/, at once or not at all; one that is there is left."""
    folder = workdir / FOLDER
    if params and not folder.exists():
        replace(folder, codec, params)


def replace(folder: Path, codec, params):
    """Writes the codec's folder anew: never half of one."""
    with replacing_folder(folder) as partial:
        vae.save_diffusers(partial, codec, params)
