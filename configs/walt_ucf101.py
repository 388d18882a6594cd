"""W.A.L.T on UCF-101, 17 frames at 128 px (Gupta et al. 2023). Expect FVD 46 (L) and 36 (XL) after 60,000 steps (paper, table 3).

`walt_ucf101:size=XL,cached=yes` takes the larger network and a latent cache.
"""

from dit_jax import recipes


def get_config(arg=""):
    chosen = recipes.choices(arg, ("size", "cached"))
    return recipes.walt(f"WALT-{chosen.get('size', 'L')}@UCF101", cached=chosen.get("cached") == "yes")
