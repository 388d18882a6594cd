"""From two sets of images to a score that says what was compared."""

import hashlib
import math
from pathlib import Path

import numpy as np

from dit_jax.data.loader import read_in_order
from dit_jax.data.sources import Digits, ImageFolder
from dit_jax.data.transforms import ImageTransform
from dit_jax.errors import UserError
from dit_jax.metrics.features import EXTRACTORS
from dit_jax.metrics.frechet import frechet_distance, moments
from dit_jax.sampling import samples_file

MAX_PIXEL_FEATURES = 4_096


def read_reference(reference: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Reference images uint8 [M, *shape].

    Raises:
        UserError: the reference cannot be read, or its images have another shape than the samples.
    """
    if reference.endswith(".npz"):
        images, _ = samples_file.read(Path(reference))
    else:
        source = Digits() if reference == "digits" else ImageFolder(reference)
        resolution = 8 if reference == "digits" else shape[0]
        transform = ImageTransform(resolution, shape[2], flip=False)
        images = np.concatenate([batch["image"] for batch in read_in_order(source, transform, 256)])
    if images.shape[1:] != shape:
        raise UserError(f"the samples are {' x '.join(map(str, shape))} and the reference {reference} is "
                        f"{' x '.join(map(str, images.shape[1:]))}; they must be equal")
    return images


def check_features(features: str, shape: tuple[int, int, int]):
    """Raises a UserError if there are no such features, or their covariance would be too large for images of this shape."""
    if features not in EXTRACTORS:
        raise UserError(f"features {features!r}; they must be one of {', '.join(EXTRACTORS)}")
    if features == "pixels" and math.prod(shape) > MAX_PIXEL_FEATURES:
        raise UserError(f"features 'pixels' of {' x '.join(map(str, shape))} images are {math.prod(shape)} numbers, whose "
                        f"covariance takes too long; they are for tiny images of at most {MAX_PIXEL_FEATURES} numbers, such as "
                        "32 x 32 x 3")


def check(reference: str, features: str, shape: tuple[int, int, int]):
    """Raises a UserError if samples of `shape` could not be scored: before they are made. A folder is listed, not read."""
    check_features(features, shape)
    if reference == "digits" or reference.endswith(".npz"):
        read_reference(reference, shape)
    else:
        ImageFolder(reference)


def evaluate(samples, reference: str, features: str) -> dict:
    """Frechet distance of the images in an npz to a reference, with what was compared.

    Raises:
        UserError: see `samples_file.read`, `read_reference`; unknown features.
    """
    images, made_by = samples_file.read(Path(samples))
    check_features(features, images.shape[1:])
    others = read_reference(reference, images.shape[1:])
    extract = EXTRACTORS[features]
    distance = frechet_distance(moments(extract(images)), moments(extract(others)))
    return {"fid": distance, "features": features, "samples": str(samples), "num_samples": len(images),
            "samples_sha256": hashlib.sha256(images.tobytes()).hexdigest(), "reference": reference,
            "num_reference": len(others), "reference_sha256": hashlib.sha256(others.tobytes()).hexdigest(), "made_by": made_by}
