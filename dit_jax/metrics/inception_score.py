"""The Inception Score, from sums of class probabilities, so that no image's probabilities need to be kept.

N images, K classes, S splits. The score is the mean over splits of exp(mean KL divergence of p(class | image) from its mean over
the split). The literature splits the images in three ways. At 50,000 images they differ only in the order of the images:

    tenths        10 consecutive splits, as equal as possible: torch-fidelity without shuffling
    fives         consecutive splits of 5,000, the last one shorter: OpenAI's evaluator (ADM)
    shuffled      10 splits after NumPy's RandomState(2020).permutation: torch-fidelity's default
"""

from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError

PARTITIONS = ("tenths", "fives", "shuffled")
TENTHS = 10
FIVE_THOUSAND = 5_000


class ClassSums(NamedTuple):
    """Sums over each split: count float64 [S], probabilities [S, K], and sum_k p log p [S]."""

    counts: np.ndarray
    probabilities: np.ndarray
    negative_entropies: np.ndarray


def partition(name: str, count: int) -> np.ndarray:
    """The split of each image, int32 [count], under one of PARTITIONS.

    Raises:
        UserError: fewer images than splits.
    """
    if name == "fives":
        return np.arange(count, dtype=np.int32) // FIVE_THOUSAND
    if count < TENTHS:
        raise UserError(
            f"{count} images are too few: the Inception Score uses {TENTHS} splits and needs at least {TENTHS} images"
        )
    bounds = np.arange(1, TENTHS) * count // TENTHS
    parts = np.searchsorted(bounds, np.arange(count), side="right").astype(np.int32)
    if name == "tenths":
        return parts
    shuffled = np.empty_like(parts)
    shuffled[np.random.RandomState(2020).permutation(count)] = parts
    return shuffled


def class_sums(probabilities: np.ndarray, parts: np.ndarray) -> ClassSums:
    """`ClassSums` of probabilities [N, K], with the split of each image in `parts`, int [N]; 0 log 0 is 0.

    Raises:
        ValueError: `probabilities` and `parts` differ in length.
    """
    if len(probabilities) != len(parts):
        raise ValueError(f"{len(probabilities)} rows of probabilities do not match {len(parts)} entries of `parts`")
    p = np.asarray(probabilities, np.float64)
    member = np.eye(int(parts.max()) + 1)[parts]  # [N, S]
    entropies = np.sum(p * np.log(np.where(p > 0, p, 1)), 1)
    return ClassSums(member.sum(0), member.T @ p, member.T @ entropies)


def inception_score(sums: ClassSums) -> tuple[float, float]:
    """Mean and standard deviation of the score over the splits.

    Raises:
        UserError: probabilities are not finite, or do not sum to 1 within 1e-3.
    Source: Salimans et al. 2016, section 4.
    """
    mean = sums.probabilities / sums.counts[:, None]
    if not (np.abs(mean.sum(1) - 1) < 1e-3).all():
        raise UserError("class probabilities do not sum to 1; the images or the extractor's weights are broken")
    divergence = sums.negative_entropies / sums.counts - np.sum(mean * np.log(np.where(mean > 0, mean, 1)), 1)
    scores = np.exp(divergence)
    return float(scores.mean()), float(scores.std())
