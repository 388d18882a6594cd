"""Digits in two stages: `digits_cascade:stage=first` draws 4 x 4 pixels, `stage=second` 8 x 8 from them; `stage=adm` is a U-Net.

python -m dit_jax.sample --stages=runs/first,runs/second --num_samples=100 --out=digits.npz
"""

from dit_jax import recipes


def get_config(arg=""):
    return recipes.digits_cascade(**recipes.choices(arg, ("stage",)))
