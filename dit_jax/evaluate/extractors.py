"""Extractors by name, with their weights and the hash of these."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dit_jax.errors import UserError
from dit_jax.metrics.features import Extractor, Pixels

NAMES = ("pixels", "inception", "dinov2")
MAX_PIXEL_FEATURES = 4_096


class Loaded(NamedTuple):
    """An extractor, its parameters, and the SHA-256 of these, None where there are none."""

    extractor: Extractor
    params: Any
    weights_sha256: str | None

    def describe(self) -> dict:
        """What decides the features: results whose descriptions differ are not compared."""
        return {"name": self.extractor.name, "weights_sha256": self.weights_sha256, **self.extractor.recipe()}


def check_name(name: str, weights: str | None):
    """Raises a UserError if there are no such features, or weights are missing or mean nothing."""
    if name not in NAMES:
        raise UserError(f"features {name!r}; they must be one of {', '.join(NAMES)}")
    if name == "pixels" and weights:
        raise UserError(f"features 'pixels' have no weights: leave out --weights={weights}")
    if name != "pixels" and not weights:
        raise UserError(f"features {name!r} need --weights=<.safetensors written by python -m dit_jax.convert --from={name}>")
    if weights and not Path(weights).expanduser().is_file():
        raise UserError(f"--weights={weights} is not a file; python -m dit_jax.convert --from={name} writes one")


def check_shape(name: str, shape: tuple[int, ...]):
    """Raises a UserError if the covariance of the pixels of such images would be too large."""
    if name == "pixels" and np.prod(shape) > MAX_PIXEL_FEATURES:
        raise UserError(
            f"features 'pixels' of {' x '.join(map(str, shape))} images are {np.prod(shape)} numbers, whose "
            f"covariance takes too long; they are for tiny images of at most {MAX_PIXEL_FEATURES} numbers, such as "
            "32 x 32 x 3"
        )


def load(name: str, weights: str | None = None) -> Loaded:
    """The extractor of that name with its weights.

    Raises:
        UserError: see `check_name`; a file that is not the weights of that extractor.
    """
    check_name(name, weights)
    if not weights:
        return Loaded(Pixels(), {}, None)
    from dit_jax.interop import dinov2, inception
    from dit_jax.interop.vae import weights_sha256
    from dit_jax.metrics.dinov2 import DINOv2
    from dit_jax.metrics.inception import Inception

    file = Path(weights).expanduser()
    network, params = (Inception(), inception.load(file)) if name == "inception" else (DINOv2(), dinov2.load(file))
    return Loaded(network, params, weights_sha256(jax.tree.map(np.asarray, params)))
