"""Loads feature extractors by name, with their weights and the hash of the weights."""

import functools
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dit_jax import registry
from dit_jax.errors import UserError
from dit_jax.interop.download import PUBLISHED
from dit_jax.metrics.features import Extractor, Pixels, SmallPixels
from dit_jax.metrics.i3d import I3D, PROTOCOLS
from dit_jax.storage.paths import local_path

MAX_PIXEL_FEATURES = 4_096


class Loaded(NamedTuple):
    """An extractor, its parameters, and their SHA-256 (None if there are no parameters)."""

    extractor: Extractor
    params: Any
    weights_sha256: str | None

    def describe(self) -> dict:
        """Everything that determines the features; results with different descriptions are not compared."""
        return {"name": self.extractor.name, "weights_sha256": self.weights_sha256, **self.extractor.recipe()}


def check_name(name: str, weights: str | None, protocol: str | None = None) -> None:
    """Raises UserError if the extractor or its protocol is unknown, or weights are missing or unused."""
    parameters = inspect.signature(registry.get("metric", name)).parameters
    if protocol is not None and "protocol" not in parameters:
        raise UserError(f"features {name!r} have no protocols: omit --protocol={protocol}")
    if protocol is not None and protocol not in PROTOCOLS:
        raise UserError(f"--protocol={protocol}: one of {', '.join(PROTOCOLS)} is needed")
    parameter = parameters.get("weights")
    if parameter is None and weights:
        raise UserError(f"features {name!r} have no weights: omit --weights={weights}")
    download = next((key for key, file in PUBLISHED.items() if file.layout == name), None)
    made_by = (
        f"python -m dit_jax.convert --download={download} --out={name}.safetensors" if download else f"the owner of {name!r}"
    )
    if name == "i3d":
        made_by = "python -m dit_jax.convert --from=i3d --weights=<the published .pt> --out=i3d.safetensors"
    if name == "clip" and not (weights and local_path(weights).is_file()):
        raise UserError(
            f"--weights={weights or ''} is not a file, and features 'clip' need weights; give model.safetensors in a folder of "
            "Hugging Face's CLIPModel, such as openai/clip-vit-base-patch32"
        )
    if parameter is not None and parameter.default is parameter.empty and not weights:
        raise UserError(f"features {name!r} need weights (--weights, or --config.evaluation.weights); {made_by} writes them")
    if weights and not local_path(weights).is_file():
        raise UserError(f"--weights={weights} is not a file; {made_by} writes one")


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raises UserError if the extractor does not take examples of this shape, or pixel features would be too many.

    Args:
        shape: (H, W, C), or (F, H, W, C) of clips, of which an extractor of images takes the frames.
    """
    if name == "i3d":
        I3D().check_shape(shape)
    if name == "pixels8" and min(shape[-3:-1]) < SmallPixels.side:
        raise UserError(
            f"features 'pixels8' are means over 8 x 8 cells, and the images are {' x '.join(map(str, shape))}; use 'pixels'"
        )
    if name == "pixels" and np.prod(shape) > MAX_PIXEL_FEATURES:
        raise UserError(
            f"features 'pixels' of {' x '.join(map(str, shape))} images have {np.prod(shape)} dimensions, which is too "
            f"slow; use them for tiny images of at most {MAX_PIXEL_FEATURES} dimensions, such as 32 x 32 x 3, or 'pixels8'"
        )


def load(name: str, weights: str | None = None, protocol: str | None = None) -> Loaded:
    """The extractor of that name with its weights.

    What is registered in the section "metric" is called as `constructor()` and returns an `Extractor` without parameters, or, if
    it takes `weights`, as `constructor(weights: Path)` and returns (extractor, params), params as NumPy or jax arrays.
    `protocol` is given to one that takes it.

    Raises:
        UserError: see `check_name`; a file that is not the weights of that extractor.
    """
    check_name(name, weights, protocol)
    constructor = registry.get("metric", name)
    if protocol is not None:
        constructor = functools.partial(constructor, protocol=protocol)
    if "weights" not in inspect.signature(constructor).parameters:
        return Loaded(constructor(), {}, None)
    from dit_jax.interop.vae import weights_sha256

    extractor, params = constructor(local_path(weights)) if weights else constructor()
    return Loaded(extractor, params, weights_sha256(jax.tree.map(np.asarray, params)))


def inception(weights: Path) -> tuple[Extractor, Any]:
    from dit_jax.interop.inception import load as load_weights
    from dit_jax.metrics.inception import Inception

    return Inception(), load_weights(weights)


def dinov2(weights: Path) -> tuple[Extractor, Any]:
    from dit_jax.interop.dinov2 import load as load_weights
    from dit_jax.metrics.dinov2 import DINOv2

    return DINOv2(), load_weights(weights)


def clip(weights: Path) -> tuple[Extractor, Any]:
    from dit_jax.interop.clip_vision import load as load_weights

    return load_weights(weights)


def i3d(weights: Path, protocol: str = "styleganv") -> tuple[Extractor, Any]:
    """The extractor of the Frechet video distance.

    Args:
        weights: a .safetensors written by `python -m dit_jax.convert --from=i3d`.
        protocol: how clips become the network's input: styleganv, videogpt, tf or cd_fvd.
    """
    from dit_jax.interop.i3d import load as load_weights

    return I3D(protocol), load_weights(weights)


registry.register("metric", "pixels", Pixels)
registry.register("metric", "pixels8", SmallPixels)
registry.register("metric", "inception", inception)
registry.register("metric", "dinov2", dinov2)
registry.register("metric", "clip", clip)
registry.register("metric", "i3d", i3d)
