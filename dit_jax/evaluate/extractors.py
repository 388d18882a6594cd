"""Loads feature extractors by name, with their weights and the hash of the weights."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dit_jax.errors import UserError
from dit_jax.metrics.features import Extractor, Pixels

NAMES = ("pixels", "inception", "dinov2")
MAX_PIXEL_FEATURES = 4_096


class Loaded(NamedTuple):
    """An extractor, its parameters, and their SHA-256 (None if there are no parameters)."""

    extractor: Extractor
    params: Any
    weights_sha256: str | None

    def describe(self) -> dict:
        """Everything that determines the features; results with different descriptions are not compared."""
        return {"name": self.extractor.name, "weights_sha256": self.weights_sha256, **self.extractor.recipe()}


def check_name(name: str, weights: str | None):
    """Raises UserError if the features are unknown, or if weights are missing or superfluous."""
    if name not in NAMES:
        raise UserError(f"unknown features {name!r}; choose one of {', '.join(NAMES)}")
    if name == "pixels" and weights:
        raise UserError(f"features 'pixels' have no weights: omit --weights={weights}")
    if name != "pixels" and not weights:
        raise UserError(f"features {name!r} need --weights=<.safetensors written by python -m dit_jax.convert --from={name}>")
    if weights and not Path(weights).expanduser().is_file():
        raise UserError(f"--weights={weights} is not a file; write one with python -m dit_jax.convert --from={name}")


def check_shape(name: str, shape: tuple[int, int, int]):
    """Raises UserError if the covariance of pixel features of this image shape would be too large."""
    if name == "pixels" and np.prod(shape) > MAX_PIXEL_FEATURES:
        raise UserError(
            f"features 'pixels' of {' x '.join(map(str, shape))} images have {np.prod(shape)} dimensions, which is too "
            f"slow; use them for tiny images of at most {MAX_PIXEL_FEATURES} dimensions, such as 32 x 32 x 3"
        )


def load(name: str, weights: str | None = None) -> Loaded:
    """Loads the extractor of that name with its weights.

    Raises:
        UserError: see `check_name`; or the file does not contain weights of that extractor.
    """
    check_name(name, weights)
    if name == "pixels":
        return Loaded(Pixels(), {}, None)
    from dit_jax.interop.vae import weights_sha256

    if name == "inception":
        from dit_jax.interop.inception import load as load_weights
        from dit_jax.metrics.inception import Inception as Network
    else:
        from dit_jax.interop.dinov2 import load as load_weights
        from dit_jax.metrics.dinov2 import DINOv2 as Network
    params = load_weights(Path(weights).expanduser())
    return Loaded(Network(), params, weights_sha256(jax.tree.map(np.asarray, params)))
