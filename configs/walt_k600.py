"""W.A.L.T-L on Kinetics-600: 12 frames after 5 given ones, at 128 px (Gupta et al. 2023). Expect FVD 3.3 (paper, table 3)."""

from dit_jax import recipes


def get_config(arg=""):
    return recipes.walt("WALT-L@K600", cached=recipes.choices(arg, ("cached",)).get("cached") == "yes")
