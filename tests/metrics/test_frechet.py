import numpy as np
import pytest
import scipy.linalg

from dit_jax.errors import UserError
from dit_jax.metrics.bootstrap import bootstrap_interval, influences
from dit_jax.metrics.features import Pixels
from dit_jax.metrics.frechet import Moments, frechet_distance, frechet_gradient, moments


def random_features(seed, count=300, width=24):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + seed


def test_against_scipy():
    """A square root of the product taken in the wrong order, or a covariance divided by N."""
    a, b = random_features(0), random_features(1)
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-9)


def test_closed_form():
    """Diagonal Gaussians: |m|^2 + sum (s - r)^2."""
    s, r, m = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.5, 0.0]), np.array([1.0, 0.0, -2.0])
    a, b = Moments(10, np.zeros(3), np.diag(s**2)), Moments(10, m, np.diag(r**2))
    assert frechet_distance(a, b) == pytest.approx(5 + np.square(s - r).sum(), rel=1e-12)


def test_fewer_images_than_features():
    """NaN, jitter or a negative distance where the covariances are singular; zero for equal sets."""
    a, b = random_features(0, 10), random_features(1, 12)
    assert np.isfinite(frechet_distance(moments(a), moments(b)))
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6 * np.trace(np.cov(a.T)))


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("count", [10, 300])
def test_equal_sets_have_no_distance_and_an_interval_that_contains_it(count, scale):
    """-8.5e-9 for equal sets, with an interval that excludes 0; a small but real distance taken for rounding."""
    a = scale * random_features(0, count)
    ours, theirs = moments(a), moments(a[np.random.default_rng(0).permutation(count)])
    gradient = frechet_gradient(ours, theirs)
    assert frechet_distance(ours, theirs) == gradient.distance == 0
    interval = bootstrap_interval(gradient.distance, influences(a, ours.mean, gradient), 200)
    assert interval.low <= 0 <= interval.high
    assert interval.high - interval.low < 1e-5 * np.trace(ours.covariance)
    if count == 300:  # otherwise the covariance is singular, and its rounding larger
        assert frechet_distance(ours, moments(a + 1e-4 * scale)) == pytest.approx(24e-8 * scale**2, rel=0.1)


def test_gradient():
    """A derivative for the other set's moments, or a transport map the wrong way round, against central differences."""
    a, b = (found._replace(covariance=found.covariance + np.eye(24)) for found in map(moments, map(random_features, (0, 1))))
    found = frechet_gradient(a, b)
    rng = np.random.default_rng(2)
    step = rng.standard_normal((24, 24))
    by_mean, by_covariance = rng.standard_normal(24), step + step.T
    ends = [
        frechet_distance(a._replace(mean=a.mean + h * by_mean, covariance=a.covariance + h * by_covariance), b)
        for h in (-1e-5, 1e-5)
    ]
    expected = found.by_mean @ by_mean + np.sum(found.by_covariance * by_covariance)
    assert (ends[1] - ends[0]) / 2e-5 == pytest.approx(expected, rel=1e-5)
    assert found.distance == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_torch_fidelity():
    """Another divisor of the covariance than FID's own code has, or another trace where it is singular."""
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    import torch

    for count in (300, 11):
        a, b = random_features(0, count), random_features(1, count + 2)
        theirs = fidelity.fid_statistics_to_metric(*(fidelity.fid_features_to_statistics(torch.tensor(x)) for x in (a, b)), False)
        assert frechet_distance(moments(a), moments(b)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.array([[1.0, np.nan], [0.0, 1.0]])])
def test_bad_features(features):
    """NaN that turns into a plausible distance."""
    with pytest.raises(UserError):
        moments(features)


def test_pixel_range():
    """Pixels in [0, 255] or [0, 1]: distances that no other code would reproduce."""
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    assert Pixels()({}, images)["features"].tolist() == [[-1.0], [1.0]]
