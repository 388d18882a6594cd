"""LDM-4, ImageNet 256 (Rombach et al. 2022). Expect FID-50K 10.56 without guidance after 178k steps (paper, table 10).

With --config.guidance.scale=1.5 it is 3.60. Set --config.codec.path to VQ-f4's weights.
"""

from dit_jax import recipes


def get_config():
    return recipes.ldm4()
