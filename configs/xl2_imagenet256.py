"""DiT-XL/2, ImageNet 256 (Peebles & Xie 2023). Expect FID-50K 19.5 at 400k steps without guidance (paper, table 4)."""

from dit_jax import recipes


def get_config():
    return recipes.dit(size="XL/2", resolution=256)
