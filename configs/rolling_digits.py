"""Text to video and image: a small MM-DiT on digits that roll over a torus, which also animates, extends and connects clips.

`rolling_digits:task=image` trains on images alone, in a few minutes. All else is set by fields.
"""

from dit_jax import recipes


def get_config(arg=""):
    return recipes.rolling_digits(**recipes.choices(arg, ("task",)))
