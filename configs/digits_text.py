"""Text to image: a small MM-DiT on 1,797 real 8 x 8 digits with captions such as "a handwritten three", in minutes on two cores.

`digits_text:task=pairs` draws two digits side by side, "three seven". All else is set by fields, such as
`--config.conditioner.encoders=bytes`.
"""

from dit_jax import recipes


def get_config(arg=""):
    return recipes.digits_text(**recipes.choices(arg, ("task",)))
