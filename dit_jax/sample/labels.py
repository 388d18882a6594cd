"""The labels of samples."""

import numpy as np

from dit_jax.encoders.conditioner import Conditioner, Requests
from dit_jax.errors import UserError


def spread_labels(num_images: int, num_classes: int, labels: tuple[int, ...] = ()) -> np.ndarray:
    """int32[num_images]: the given labels in turn, or all classes in turn, so that counts differ by at most one.

    Raises:
        UserError: a label out of range, or labels for a network without classes.
    """
    if num_images < 1:
        raise UserError(f"the number of samples is {num_images}; it must be at least 1")
    if labels and not num_classes:
        raise UserError("the network is unconditional (0 classes); ask for no labels")
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"label {label} is out of range: 0 to {num_classes - 1}")
    cycle = np.asarray(labels or range(max(num_classes, 1)), np.int32)
    return np.resize(cycle, num_images)


def null_labels(num_images: int, num_classes: int) -> np.ndarray:
    """int32[num_images] of the null label: images without condition."""
    return np.full_like(spread_labels(num_images, num_classes), num_classes)


def random_labels(num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """int32[num_images], uniform over all classes; label k depends only on the seed and k, not on num_images."""
    spread_labels(num_images, num_classes)  # for its checks
    return np.random.default_rng(seed).integers(0, max(num_classes, 1), num_images, np.int32)


def spread_requests(conditioner: Conditioner, num_images: int) -> Requests:
    """Requests for all classes in turn; {} for a network without classes.

    Raises:
        UserError: fewer than one image.
    """
    return conditioner.from_requests(
        {"label": spread_labels(num_images, conditioner.num_classes)} if conditioner.num_classes else {}
    )
