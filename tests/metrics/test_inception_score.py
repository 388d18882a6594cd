import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.metrics.inception_score import PARTITIONS, class_sums, inception_score, partition


def random_logits(count, classes=12):
    return 3 * np.random.default_rng(count).standard_normal((count, classes))


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def published_formula(p, parts):
    """Image by image, part by part, as OpenAI's evaluator writes it."""
    scores = [np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0)[None])), 1))) for part in parts]
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("count", [10, 97, 5_003])
def test_parts_of_both_conventions(count):
    """Parts that drop the remainder, or begin elsewhere than OpenAI's (5,000 images each) and torch-fidelity's (tenths)."""
    p = softmax(random_logits(count))
    for name, parts in (
        ("fives", [p[i : i + 5_000] for i in range(0, count, 5_000)]),
        ("tenths", [p[i * count // 10 : (i + 1) * count // 10] for i in range(10)]),
    ):
        assert inception_score(class_sums(p, partition(name, count))) == pytest.approx(published_formula(p, parts), rel=1e-10)


def test_torch_fidelity():
    """Its shuffled order or its unshuffled one not reproduced."""
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    import torch

    logits = torch.tensor(random_logits(123))
    for name, shuffle in (("tenths", False), ("shuffled", True)):
        theirs = fidelity.isc_features_to_metric(logits, 10, shuffle)
        ours = inception_score(class_sums(softmax(logits.numpy()), partition(name, 123)))
        assert ours == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-9)


def test_extremes():
    """NaN where a probability is 0; certain and even classes give K, no information gives 1."""
    certain = np.eye(4)[np.arange(40) % 4]
    for name in PARTITIONS[:2]:
        assert inception_score(class_sums(certain, partition(name, 40)))[0] == pytest.approx(4)
    assert inception_score(class_sums(np.full((40, 4), 0.25), partition("tenths", 40)))[0] == pytest.approx(1)


def test_mistakes():
    """Logits taken for probabilities; a part without images."""
    with pytest.raises(UserError, match="do not sum to 1"):
        inception_score(class_sums(random_logits(20), partition("tenths", 20)))
    with pytest.raises(UserError, match="at least 10"):
        partition("tenths", 9)
