"""ADM, ImageNet 256 (Dhariwal & Nichol 2021). Expect FID-50K 10.94 without guidance after 1.98 M steps (paper, table 5)."""

from dit_jax import recipes


def get_config():
    return recipes.adm(resolution=256)
