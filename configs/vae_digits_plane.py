"""The classic illustration: an autoencoder of the digits down to 2 numbers, and a picture of the plane that they span."""

from dit_jax import recipes


def get_config():
    return recipes.vae_digits("plane")
