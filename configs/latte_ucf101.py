"""Latte-XL/2 on UCF-101: 16 frames at 256 px (Ma et al. 2024)."""

from dit_jax import recipes


def get_config(arg=""):
    return recipes.latte(cached=recipes.choices(arg, ("cached",)).get("cached") == "yes")
