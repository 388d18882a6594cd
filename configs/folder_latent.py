"""DiT on a latent cache: `folder_latent:S/2,64,10` is size S, patch 2, 64 x 64 pixels, 10 classes (0: no labels).

Pass --config.data.path=<folder of dit_jax.encode> and --config.codec.path=<workdir of vae_folder>.
"""

from dit_jax import recipes
from dit_jax.errors import UserError


def get_config(arg="S/2,64,0"):
    try:
        size, resolution, num_classes = arg.split(",")
        return recipes.folder_latent(size, int(resolution), int(num_classes))
    except UserError:
        raise
    except ValueError:
        raise UserError(f"configs/folder_latent.py:{arg}: give size, resolution and number of classes, as in S/2,64,10") from None
