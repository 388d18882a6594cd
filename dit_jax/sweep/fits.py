"""Fits FID as a linear function of log compute, with the correlation and its confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Fit:
    """y = intercept + slope log10(x), by least squares.

    Fields:
        correlation: Pearson's correlation of log10(x) and y.
        low, high: its confidence interval at `LEVEL`, by Fisher's z; None below 4 points, or if the points lie on a line.
    """

    slope: float
    intercept: float
    correlation: float
    low: float | None
    high: float | None
    num_points: int

    def __call__(self, x):
        return self.intercept + self.slope * np.log10(x)

    def text(self) -> str:
        """Formats the correlation: "r = -0.93 (95 % interval -0.98 to -0.76, 12 models)"."""
        low, high = self.low, self.high
        interval = "" if low is None or high is None else f"{LEVEL:.0%} interval {_r(low)} to {_r(high)}, ".replace("%", " %")
        return f"r = {_r(self.correlation)} ({interval}{self.num_points} models)"


def _r(value: float) -> str:
    """Rounds to two digits, or to as many as are needed so that it does not look like 1."""
    return next(text for digits in range(2, 17) if abs(float(text := f"{value:.{digits}f}")) < 1 or abs(value) == 1)


def log_linear(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> Fit | None:
    """Fits a line in log10(x); None if it would be meaningless: fewer than 3 different x, or all y equal.

    The interval treats the points as independent samples of a joint normal; for models on a grid it is only a rough guide.

    Args:
        x: [N] positive.  y: [N].

    Raises:
        ValueError: an x is not positive, or a number is not finite.

    Source: Fisher 1921, Metron 1: artanh r is approximately normal with standard deviation 1 / sqrt(N - 3).
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(np.unique(x)) < 3 or len(np.unique(y)) < 2:
        return None
    if not (x > 0).all() or not np.isfinite(x).all() or not np.isfinite(y).all():
        raise ValueError("x must be positive and all numbers finite")
    u = np.log10(x)
    du, dy = u - u.mean(), y - y.mean()
    slope = float(du @ dy / (du @ du))
    r = float(du @ dy / math.sqrt((du @ du) * (dy @ dy)))
    low = high = None
    if len(x) > 3 and abs(r) < 1:
        reach = NormalDist().inv_cdf((1 + LEVEL) / 2) / math.sqrt(len(x) - 3)
        low, high = math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)
    return Fit(slope, float(y.mean() - slope * u.mean()), r, low, high, len(x))
