"""An autoencoder of the digits with a latent of 2 numbers, and a picture of its plane (Kingma & Welling 2014, figure 4)."""

from dit_jax import recipes


def get_config():
    return recipes.vae_digits("plane")
