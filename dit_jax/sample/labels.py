"""The labels of samples."""

from collections.abc import Sequence

import numpy as np

from dit_jax.encoders.conditioner import Conditioner, Requests
from dit_jax.errors import UserError
from dit_jax.sample.prompts import Prompts


def spread_labels(num_images: int, num_classes: int, labels: Sequence[int] = ()) -> np.ndarray:
    """int32[num_images]: the given labels in turn, or all classes in turn, so that counts differ by at most one.

    Raises:
        UserError: a label that is out of range or no whole number, or labels for a network without classes.
    """
    if num_images < 1:
        raise UserError(f"the number of samples is {num_images}; it must be at least 1")
    if len(labels) and not num_classes:
        raise UserError("the network is unconditional (0 classes); ask for no labels")
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise UserError(f"label {label!r} is not a whole number; give classes from 0 to {num_classes - 1}")
        if not 0 <= label < num_classes:
            raise UserError(f"label {label} is out of range: 0 to {num_classes - 1}")
    cycle = np.asarray(labels if len(labels) else range(max(num_classes, 1)), np.int32)
    return np.resize(cycle, num_images)


CHOICES = ("balanced", "random", "none")


def null_labels(num_images: int, num_classes: int) -> np.ndarray:
    """int32[num_images] of the null label: images without condition."""
    return np.full_like(spread_labels(num_images, num_classes), num_classes)


def random_labels(num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """int32[num_images], uniform over all classes; label k depends only on the seed and k, not on num_images."""
    spread_labels(num_images, num_classes)  # for its checks
    return np.random.default_rng(seed).integers(0, max(num_classes, 1), num_images, np.int32)


def chosen_labels(
    labels: Sequence[int] | np.ndarray | str | None, num_images: int | None, num_classes: int, seed: int
) -> tuple[np.ndarray, str]:
    """(int32[num_images] labels, "given", "balanced", "random" or "none", as the description of samples calls their choice).

    Args:
        labels: classes in turn; None or "balanced" for all in turn; "random"; "none" for no label.
        num_images: None draws one image for each label, or for each class.

    Raises:
        UserError: see `spread_labels`; an unknown word; an empty sequence; a choice of labels for a network without classes.
    """
    if labels is None or isinstance(labels, str):
        mode = labels or "balanced"
        if mode not in CHOICES:
            raise UserError(f"labels={labels!r}: give class numbers, as in [3, 5], or one of {', '.join(CHOICES)}")
        if labels is not None and mode != "none" and not num_classes:
            raise UserError(f"labels={labels!r}: the network is unconditional (0 classes); ask for no labels")
        count = max(num_classes, 1) if num_images is None else num_images
        if mode == "random":
            return random_labels(count, num_classes, seed), mode
        return (null_labels if mode == "none" else spread_labels)(count, num_classes), mode
    given = list(labels)
    if not given:
        raise UserError("labels is empty; give class numbers, as in [3, 5]")
    return spread_labels(len(given) if num_images is None else num_images, num_classes, given), "given"


def spread_requests(conditioner: Conditioner, num_images: int, prompts: Sequence[str] = ()) -> Requests:
    """Requests for all classes in turn, or for the prompts in turn; {} for a network without condition.

    Raises:
        UserError: fewer than one image; prompts for a network that takes none.
    """
    if prompts:
        spread_labels(num_images, 0)  # for its checks
        return conditioner.from_requests(Prompts(tuple(prompts)).repeated(num_images).requests())
    return conditioner.from_requests(
        {"label": spread_labels(num_images, conditioner.num_classes)} if conditioner.num_classes else {}
    )
