"""A causal autoencoder on a folder of clips: `vae_clips:small,64,9` is 9 frames of 64 x 64 pixels to 3 x 16 x 16 x 8 numbers.

Sizes: small (for a CPU), walt, wan. Pass --config.data.path=<folder of clips, or of one sub-folder per class>.
"""

from dit_jax import recipes
from dit_jax.errors import UserError


def get_config(arg="small,64,9"):
    parts = arg.split(",")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts[1:]):
        raise UserError(f"configs/vae_clips.py:{arg}: give size, resolution and frames, as in vae_clips.py:small,64,9")
    return recipes.vae_clips(parts[0], int(parts[1]), int(parts[2]))
