"""DiT on the latents of `configs/vae_digits.py`: pass --config.codec.path=<its workdir>."""

from dit_jax import recipes


def get_config():
    return recipes.digits_latent()
