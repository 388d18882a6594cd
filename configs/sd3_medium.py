"""Stable Diffusion 3 medium: MM-DiT of 2 B parameters at 1024 px, from a latent cache of captioned tars (Esser et al. 2024).

    python -m dit_jax.encode --data='shards/{0000..0999}.tar' --codec=sd3_vae --resolution=1024 --nomirror --out=latents
    python -m dit_jax.main --config=sd3_medium --config.data.path=latents --config.mesh.fsdp=64 --config.microbatches=2 ...

Set `codec.path`, and `conditioner.weights` and `conditioner.tokenizers` of the three text encoders. They run in the step, frozen,
in bfloat16, split over mesh.fsdp. They add 9 % to the arithmetic; their outputs would take 2.7 MB for each caption, three times
what its latents take, and captions that stay text are drawn anew in each epoch, short or long.
"""

from dit_jax import recipes


def get_config():
    return recipes.sd3("SD3-medium@1024", cached=True)
