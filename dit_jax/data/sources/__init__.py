"""Data sets as random access: a number in, one undecoded example out."""

from dit_jax.data.sources.clip_folder import ClipFolder
from dit_jax.data.sources.digits import DigitPairs, Digits
from dit_jax.data.sources.folder import IMAGE_SUFFIXES, ImageFolder
from dit_jax.data.sources.rolling_digits import RollingDigits
from dit_jax.data.sources.source import Example, Source, fingerprint
from dit_jax.data.sources.tars import TarShards
from dit_jax.data.sources.tfds import TFDS

__all__ = [
    "IMAGE_SUFFIXES",
    "TFDS",
    "ClipFolder",
    "DigitPairs",
    "Digits",
    "Example",
    "ImageFolder",
    "RollingDigits",
    "Source",
    "TarShards",
    "fingerprint",
]
