"""DiT on the latents of `vae_digits`: pass --config.codec.path=<its workdir>."""

from dit_jax import recipes


def get_config():
    return recipes.digits_latent()
