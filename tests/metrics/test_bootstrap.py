import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.metrics.bootstrap import bootstrap_interval, influences
from dit_jax.metrics.frechet import Moments, frechet_gradient, moments

SPREAD = 1 / np.arange(1, 9)
REFERENCE = Moments(None, np.zeros(8), np.diag(1.3 * SPREAD))


def draw(rng, count):
    """Samples of a Gaussian near the reference: (distance, influences)."""
    features = 0.1 + rng.standard_normal((count, 8)) * np.sqrt(SPREAD)
    found = moments(features)
    gradient = frechet_gradient(found, REFERENCE)
    return gradient.distance, influences(features.astype(np.float32), found.mean, gradient)


@pytest.mark.parametrize("count", [60, 500])
def test_coverage(count):
    """An interval too narrow or too wide, or one about another value, as the ordinary bootstrap's: of 200 sets of samples, 95 %
    of the intervals must hold the distance expected at so many images (the binomial's 4 sigma: 89 to 100 %)."""
    rng = np.random.default_rng(0)
    draws = [draw(rng, count) for _ in range(200)]
    expected = np.mean([distance for distance, _ in draws])
    intervals = [bootstrap_interval(distance, influence, 100, seed=seed) for seed, (distance, influence) in enumerate(draws)]
    assert 0.89 <= np.mean([found.low <= expected <= found.high for found in intervals]) <= 0.995
    spread = np.std([distance for distance, _ in draws])
    assert np.mean([found.standard_error for found in intervals]) == pytest.approx(spread, rel=0.2)
    for end in ("low", "high"):
        widths = [abs(getattr(found, end) - distance) for found, (distance, _) in zip(intervals, draws, strict=True)]
        assert np.mean(widths) == pytest.approx(1.96 * spread, rel=0.25)


def test_influence_is_the_derivative():
    """Influences scaled or ordered wrongly: an image that counts a little more must move the distance by its own influence."""
    rng = np.random.default_rng(1)
    features = rng.standard_normal((300, 8)) * np.sqrt(SPREAD)
    weights = np.full(300, 1.0)
    gradient = frechet_gradient(moments(features), REFERENCE)
    influence = influences(features, features.mean(0), gradient)

    def distance(weights):
        mean = np.average(features, axis=0, weights=weights)
        centered = features - mean
        covariance = (centered * weights[:, None]).T @ centered / weights.sum() * 300 / 299
        return frechet_gradient(Moments(None, mean, covariance), REFERENCE).distance

    ends = [distance(weights + h * (np.arange(300) == 7)) for h in (-1e-4, 1e-4)]
    assert (ends[1] - ends[0]) / 2e-4 * 300 == pytest.approx((influence - influence.mean())[7], rel=0.02)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((1.0, np.zeros(1)), "at least 2"),
        ((1.0, np.zeros(9), 10), "at least 100"),
        ((1.0, np.zeros(9), 100, 95), "between 0 and 1"),
    ],
)
def test_bad_arguments(arguments, text):
    """A level in per cent, or an interval from a handful of replicates."""
    with pytest.raises(UserError, match=text):
        bootstrap_interval(*arguments)
