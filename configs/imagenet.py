"""Any DiT or SiT of the papers on ImageNet: `configs/imagenet.py:XL/2,256` is size XL, patch 2, 256 x 256 pixels.

Sizes are S, B, L, XL with patch 2, 4, 8; resolutions 256 and 512. `XL/2,256,latents` trains from a latent cache: pass
--config.data.path=<folder of dit_jax.encode>. `XL/2,256,sit` is SiT. The parts may have any order.
"""

from dit_jax import recipes
from dit_jax.errors import UserError


def get_config(arg="XL/2,256"):
    parts = arg.split(",")
    flags = {name: parts.count(name) for name in ("latents", "sit")}
    resolutions = [part for part in parts if part in ("256", "512")]
    sizes = [part for part in parts if part not in (*flags, *resolutions)]
    if len(resolutions) != 1 or len(sizes) != 1 or max(flags.values()) > 1:
        raise UserError(
            f"configs/imagenet.py:{arg}: give one size and one resolution (256 or 512), as in B/4,256; latents and sit may follow"
        )
    recipe = recipes.sit if flags["sit"] else recipes.dit
    return recipe(sizes[0], int(resolutions[0]), cached=bool(flags["latents"]))
