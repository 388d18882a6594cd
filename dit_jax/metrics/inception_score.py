"""The Inception Score from class probabilities, summed image by image, so that none needs to be kept.

N images, K classes, S parts. The score is the mean over parts of exp(mean KL divergence of an image's classes from the part's).
The literature parts the images in three ways, which agree at 50,000 images up to the order of the images:

    tenths        10 consecutive parts as equal as can be: torch-fidelity without shuffling
    fives         consecutive parts of 5,000, the last shorter: OpenAI's evaluator (ADM)
    shuffled      10 parts after NumPy's RandomState(2020).permutation: torch-fidelity as it comes
"""

from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError

PARTITIONS = ("tenths", "fives", "shuffled")
TENTHS = 10
FIVE_THOUSAND = 5_000


class ClassSums(NamedTuple):
    """Of each part: count float64 [S], sum of probabilities [S, K], sum over images of sum_k p log p [S]."""

    counts: np.ndarray
    probabilities: np.ndarray
    negative_entropies: np.ndarray


def partition(name: str, count: int) -> np.ndarray:
    """int32 [count]: the part of each image under one of PARTITIONS.

    Raises:
        UserError: fewer images than parts.
    """
    if name == "fives":
        return np.arange(count, dtype=np.int32) // FIVE_THOUSAND
    if count < TENTHS:
        raise UserError(f"{count} images: the Inception Score takes {TENTHS} parts, so at least {TENTHS} images are needed")
    bounds = np.arange(1, TENTHS) * count // TENTHS
    parts = np.searchsorted(bounds, np.arange(count), side="right").astype(np.int32)
    if name == "tenths":
        return parts
    shuffled = np.empty_like(parts)
    shuffled[np.random.RandomState(2020).permutation(count)] = parts
    return shuffled


def class_sums(probabilities: np.ndarray, parts: np.ndarray) -> ClassSums:
    """ClassSums of probabilities [N, K] whose images lie in parts int [N]; 0 log 0 is 0.

    Raises:
        ValueError: a length that differs.
    """
    if len(probabilities) != len(parts):
        raise ValueError(f"{len(probabilities)} rows of probabilities and {len(parts)} parts")
    p = np.asarray(probabilities, np.float64)
    member = np.eye(int(parts.max()) + 1)[parts]  # [N, S]
    entropies = np.sum(p * np.log(np.where(p > 0, p, 1)), 1)
    return ClassSums(member.sum(0), member.T @ p, member.T @ entropies)


def inception_score(sums: ClassSums) -> tuple[float, float]:
    """(mean, standard deviation over the parts) of the score.

    Raises:
        UserError: probabilities that are not finite, or do not sum to 1 within 1e-3.
    Source: Salimans et al. 2016, section 4.
    """
    mean = sums.probabilities / sums.counts[:, None]
    if not (np.abs(mean.sum(1) - 1) < 1e-3).all():
        raise UserError("class probabilities do not sum to 1; the images or the extractor's weights are broken")
    divergence = sums.negative_entropies / sums.counts - np.sum(mean * np.log(np.where(mean > 0, mean, 1)), 1)
    scores = np.exp(divergence)
    return float(scores.mean()), float(scores.std())
