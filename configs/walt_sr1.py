"""The first super-resolution stage of W.A.L.T's text to video, to 17 frames of 256 x 448 pixels (Gupta et al. 2023)."""

from dit_jax import recipes


def get_config():
    return recipes.walt_t2v("sr1")
