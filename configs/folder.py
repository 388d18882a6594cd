"""DiT on the pixels of your own images: `folder:S/8,32,10` is size S, patch 8, 32 x 32 pixels, 10 class folders.

Pass --config.data.path=<folder with one sub-folder per class>.
"""

from dit_jax import recipes
from dit_jax.errors import UserError


def get_config(arg="S/8,32,1000"):
    try:
        size, resolution, num_classes = arg.split(",")
        return recipes.folder(size, int(resolution), int(num_classes))
    except UserError:
        raise
    except ValueError:
        raise UserError(f"configs/folder.py:{arg}: give size, resolution and number of classes, as in S/8,32,10") from None
