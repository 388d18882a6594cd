"""A small autoencoder on the digits, 8 x 8 pixels to 4 x 4 x 2 numbers: the first stage of `digits_latent`."""

from dit_jax import recipes


def get_config():
    return recipes.vae_digits("grid")
