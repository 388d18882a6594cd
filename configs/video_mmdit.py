"""Text to video and image with one MM-DiT of 2.0 billion parameters, which also animates, extends and connects clips."""

from dit_jax import recipes


def get_config(arg=""):
    return recipes.video_mmdit(cached=recipes.choices(arg, ("cached",)).get("cached") == "yes")
