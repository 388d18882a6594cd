"""A small autoencoder on a folder of photographs: `vae_folder:64` is 64 x 64 pixels to 16 x 16 x 4 numbers.

Pass --config.data.path=<folder of images, or of one sub-folder per class>.
"""

from dit_jax import recipes
from dit_jax.errors import UserError


def get_config(arg="64"):
    if not arg.isdecimal():
        raise UserError(f"configs/vae_folder.py:{arg}: give the resolution in pixels, as in vae_folder.py:64")
    return recipes.vae_folder(int(arg))
