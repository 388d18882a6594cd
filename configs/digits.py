"""A class-conditional DiT on 1,797 real 8 x 8 digits; trains, samples and scores itself in minutes on two CPU cores.

`digits:process=flow,conditioning=in_context,sampler=heun` chooses another process (gaussian, flow, edm), conditioning
(adaln_zero, adaln, cross_attention, in_context) or sampler (ddpm, ddim, heun, ...); all are optional.
"""

from dit_jax import recipes


def get_config(arg=""):
    return recipes.digits(**recipes.choices(arg, ("process", "conditioning", "sampler")))
