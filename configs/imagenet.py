"""Any DiT of the paper on ImageNet: `configs/imagenet.py:B/4,256` is size B, patch 4, resolution 256."""

from dit_jax import recipes
from dit_jax.errors import UserError


def get_config(arg="XL/2,256"):
    size, _, resolution = arg.partition(",")
    if resolution not in ("256", "512"):
        raise UserError(f"configs/imagenet.py:{arg}: give size and resolution (256 or 512), as in B/4,256")
    return recipes.dit(size, int(resolution))
