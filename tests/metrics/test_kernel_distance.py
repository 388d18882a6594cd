import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.metrics.kernel_distance import kernel_distance, unbiased_mmd2


def random_features(seed, count, shift=0.0):
    return (np.random.default_rng(seed).standard_normal((count, 16)) + shift).astype(np.float32)


def test_definition():
    """A diagonal left in, another divisor or exponent: against the sum over pairs, for two sizes."""
    x, y = random_features(0, 7).astype(float), random_features(1, 9, 0.5).astype(float)

    def k(a, b):
        return (a @ b / 16 + 1) ** 3

    among_x = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    among_y = sum(k(y[i], y[j]) for i in range(9) for j in range(9) if i != j) / 72
    across = sum(k(a, b) for a in x for b in y) / 63
    assert unbiased_mmd2(x, y) == pytest.approx(among_x + among_y - 2 * across, rel=1e-9)


def test_torch_fidelity():
    """Other subsets than those that every published KID with its defaults was computed with."""
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    import torch

    x, y = random_features(0, 130), random_features(1, 151, 0.3)
    theirs = fidelity.kid_features_to_metric(torch.tensor(x), torch.tensor(y), kid_subsets=20, kid_subset_size=50, verbose=False)
    expected = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert kernel_distance(x, y, 20, 50) == pytest.approx(expected, rel=1e-4)


def test_unbiased():
    """A bias that grows as subsets shrink: between draws of one distribution the mean over many is 0."""
    values = [unbiased_mmd2(random_features(2 * i, 20), random_features(2 * i + 1, 20)) for i in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


@pytest.mark.parametrize("sizes, text", [((40, 60), "40 samples and 60 reference"), ((60, 40), "draw more")])
def test_too_few(sizes, text):
    """Subsets that are silently smaller than the published ones."""
    with pytest.raises(UserError, match=text):
        kernel_distance(random_features(0, sizes[0]), random_features(1, sizes[1]), 5, 50)


def test_not_finite():
    """NaN in a result file."""
    broken = random_features(0, 60)
    broken[3, 2] = np.nan
    with pytest.raises(UserError, match="NaN"):
        kernel_distance(broken, random_features(1, 60), 5, 50)
