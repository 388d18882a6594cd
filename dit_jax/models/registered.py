"""Registers the networks of the package: a new network is a file and one line here."""

from collections.abc import Iterator
from typing import Any

from dit_jax.models.diffit import DiffiT
from dit_jax.models.dit import DiT
from dit_jax.models.hourglass import HourglassDiT
from dit_jax.models.mmdit import MMDiT
from dit_jax.models.pixart import PixArt
from dit_jax.models.published import Published
from dit_jax.models.unet import UNet
from dit_jax.models.video_dit import VideoDiT
from dit_jax.registry import get, names, register

register("model", "dit", DiT)
register("model", "diffit", DiffiT)
register("model", "hourglass", HourglassDiT)
register("model", "mmdit", MMDiT)
register("model", "pixart", PixArt)
register("model", "unet", UNet)
register("model", "video_dit", VideoDiT)


def networks() -> Iterator[tuple[str, Any, Published]]:
    """(name, class, what is published) of every published network of the registered classes."""
    for name in names("model"):
        constructor = get("model", name)
        for key, published in getattr(constructor, "published", {}).items():
            yield key, constructor, published
