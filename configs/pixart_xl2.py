"""PixArt-alpha: a DiT-XL/2 with cross-attention to T5, 256 px, from a latent cache of captioned tars (Chen et al. 2023).

    python -m dit_jax.encode --data='shards/{0000..0999}.tar' --codec=sd-vae-ft-mse --resolution=256 --nomirror --out=latents
    python -m dit_jax.main --config=pixart_xl2 --config.data.path=latents --config.mesh.fsdp=64 --workdir=runs/pixart ...

Set `conditioner.weights` and `conditioner.tokenizers` of T5 v1.1 XXL. It runs in the step, frozen, in bfloat16, split over
mesh.fsdp. What it makes of one caption would take 1 MB, 60 times what the latents of its image take; the price is that at 256 px
T5 is more than half of a step's arithmetic. `pixart_xl2:512` and `:1024` are the other stages.
"""

from dit_jax import recipes
from dit_jax.errors import UserError


def get_config(arg="256"):
    if not arg.isdigit():
        raise UserError(f"configs/pixart_xl2.py:{arg}: give the resolution, 256, 512 or 1024")
    return recipes.pixart(int(arg), cached=True)
