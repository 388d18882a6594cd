"""Stable Diffusion's autoencoder (f8, 4 channels, 84 M parameters) trained on ImageNet 256 with LPIPS and a discriminator."""

from dit_jax import recipes


def get_config():
    return recipes.vae_f8(resolution=256)
