"""The base model of W.A.L.T's text to video, 17 frames of 128 x 224 pixels (Gupta et al. 2023, section 5.3).

`walt_sr1` and `walt_sr2` are the stages after it: python -m dit_jax.sample --stages=runs/t2v,runs/sr1,runs/sr2 --prompt=...
"""

from dit_jax import recipes


def get_config(arg=""):
    return recipes.walt_t2v("base", cached=recipes.choices(arg, ("cached",)).get("cached") == "yes")
