import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.metrics import precision_recall as module
from dit_jax.metrics.precision_recall import precision_recall


def random_features(seed, count, scale=1.0, center=0.0):
    return (center + scale * np.random.default_rng(seed).standard_normal((count, 6))).astype(np.float32)


def plain(samples, reference, k):
    """From the whole matrix of distances, in float64."""

    def distances(a, b):
        return np.sqrt(np.square(a[:, None].astype(float) - b[None]).sum(-1))

    def share(x, manifold):
        radii = np.sort(distances(manifold, manifold), 1)[:, k]
        return np.mean((distances(x, manifold) <= radii).any(1))

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("block", [32, 2_048])
@pytest.mark.parametrize("k", [1, 3])
def test_definition(monkeypatch, block, k):
    """Precision and recall exchanged, a neighbour counted wrong, padding taken for images; far from the origin, where
    differences of squares lose their digits."""
    monkeypatch.setattr(module, "BLOCK", block)
    samples, reference = random_features(0, 101, 0.7, 100), random_features(1, 150, 1.0, 100)
    expected = plain(samples, reference, k)
    assert expected[0] > expected[1] + 0.1
    assert precision_recall(samples, reference, k) == pytest.approx(expected, abs=1e-9)


def test_torch_fidelity():
    """Another share than the library that papers quote."""
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    import torch

    samples, reference = random_features(0, 203, 0.8), random_features(1, 150)
    theirs = fidelity.prc_features_to_metric(
        torch.tensor(samples), torch.tensor(reference), prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    assert precision_recall(samples, reference) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


@pytest.mark.parametrize("count, k, text", [(3, 3, "more than 3 images"), (50, 0, "k = 0")])
def test_too_few(count, k, text):
    """A radius of infinity, in which every image lies."""
    with pytest.raises(UserError, match=text):
        precision_recall(random_features(0, count), random_features(1, 50), k)
