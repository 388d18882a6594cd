"""A class-conditional DiT on 1,797 real 8 x 8 digits; trains, samples and scores itself in minutes on two CPU cores."""

from dit_jax import recipes


def get_config():
    return recipes.digits()
