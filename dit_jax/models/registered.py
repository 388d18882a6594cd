"""Registers the networks of the package: a new network is a file and one line here."""

from dit_jax.models.diffit import DiffiT
from dit_jax.models.dit import DiT
from dit_jax.models.hourglass import HourglassDiT
from dit_jax.models.unet import UNet
from dit_jax.registry import register

register("model", "dit", DiT)
register("model", "diffit", DiffiT)
register("model", "hourglass", HourglassDiT)
register("model", "unet", UNet)
