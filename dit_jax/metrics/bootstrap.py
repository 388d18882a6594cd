"""How far a Frechet distance may be off because the samples are a draw: influence of each image, bootstrap of their mean.

N images, F features.

The ordinary bootstrap is wrong for this distance. It is biased upwards by about C / N, resampled images bring that bias in a
second time, and the whole interval then lies above the value; where N is not many times F, the spread of the resampled
distances is too large as well (N = 50, F = 64: 2.6 times). So the distance is replaced by its linear part in the empirical
distribution, the mean of each image's influence, and that mean is bootstrapped: no eigenvalues per replicate, and the interval
is about the value. What it covers is the expected distance *at this number of images*, the reference held fixed, which is what
two results at 50,000 images compare; not the distance at infinitely many images, which is lower. Images are resampled as if they
were independent; with balanced labels the true interval is a little narrower.
"""

from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError
from dit_jax.metrics.frechet import Gradient

ROWS_AT_ONCE = 4_096


class Interval(NamedTuple):
    """low and high, the level that lies between them, the standard error, and from how many replicates."""

    low: float
    high: float
    level: float
    standard_error: float
    replicates: int


def influences(features: np.ndarray, mean: np.ndarray, gradient: Gradient) -> np.ndarray:
    """float64 [N]: N times the first-order change of the distance when image i counts twice, up to a constant.

    Args:
        features: [N, F] of the samples, or of a part of them.
        mean: float64 [F] of all samples.
        gradient: of the distance at the moments of all samples.
    Source: Hampel 1974, the influence function, applied to the mean and the covariance.
    """
    found = np.empty(len(features))
    for start in range(0, len(features), ROWS_AT_ONCE):
        centered = features[start : start + ROWS_AT_ONCE].astype(np.float64) - mean
        curved = np.einsum("nf,nf->n", centered @ gradient.by_covariance, centered)
        found[start : start + ROWS_AT_ONCE] = centered @ gradient.by_mean + curved
    return found


def check(replicates: int, level: float):
    """Raises a UserError if no interval has so many replicates or that level."""
    if replicates < 100:
        raise UserError(f"{replicates} bootstrap replicates; at least 100 are needed")
    if not 0 < level < 1:
        raise UserError(f"a bootstrap interval of level {level}; it must lie between 0 and 1, as 0.95")


def bootstrap_interval(
    value: float, influence: np.ndarray, replicates: int = 1_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The interval value + quantiles of the mean influence over images drawn with replacement.

    Args:
        influence: [N] of all samples, see `influences`; the same numbers in the same order give the same interval.
        replicates: at least 100.
        level: in (0, 1).
    Raises:
        UserError: fewer than 2 images; see `check`.
    Source: Davison & Hinkley 1997, section 2.7.4 (bootstrap of the linear approximation).
    """
    if len(influence) < 2:
        raise UserError(f"{len(influence)} images: an interval needs at least 2")
    check(replicates, level)
    count, centered = len(influence), influence - influence.mean()
    rng = np.random.default_rng(seed)
    means = np.array([centered[rng.integers(0, count, count)].mean() for _ in range(replicates)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value + low), float(value + high), level, float(centered.std() / np.sqrt(count)), replicates)
