"""The measures of rolling digits, on real clips and on clips with one known fault."""

import numpy as np
import pytest

from dit_jax.data.sources import RollingDigits
from dit_jax.evaluate.rolling_digits import asked, digits_of, moves_of, psnr, score


@pytest.fixture(scope="module")
def real():
    source = RollingDigits()
    examples = [source[int(i)] for i in np.random.default_rng(0).integers(0, len(source), 40)]
    return np.stack([example["video"] for example in examples]), examples


def test_real_clips_score_one(real):
    """All measures but the digit are exact; 5 neighbours read 98.5 % of real digits."""
    clips, examples = real
    for key in ("caption", "caption_long"):
        found = score(clips, asked([example[key] for example in examples]))
        assert found.digit >= 0.95 and (found.steps, found.motion, found.seam) == (1.0, 1.0, 1.0)
    assert psnr(clips, clips) == float("inf")


def test_a_fault_lowers_the_measure_that_it_belongs_to(real):
    """Catches a sign, an axis or a wrapped shift that is counted as right, and a seam that is never looked at."""
    clips, examples = real
    wanted = asked([example["caption"] for example in examples])
    moving = wanted.moves.any(1)
    assert score(clips[:, ::-1][moving], _of(wanted, moving)).steps == 0  # backwards
    assert score(clips.swapaxes(2, 3)[moving], _of(wanted, moving)).steps == 0  # rows for columns
    broken = clips.copy()
    broken[:, -1] = np.roll(broken[:, -1], 2, axis=2)
    found = score(broken, wanted)
    assert found.steps == pytest.approx(2 / 3) and found.motion == found.seam == 0
    other = score(clips, wanted._replace(digits=(wanted.digits + 1) % 10))
    assert other.digit <= 0.05 and other.motion == 1


def _of(wanted, chosen):
    return wanted._replace(digits=wanted.digits[chosen], moves=wanted.moves[chosen])


def test_digits_are_read_at_every_place_on_the_torus(real):
    clips, _ = real
    shifted = np.roll(clips, (3, 5), (2, 3))
    np.testing.assert_array_equal(digits_of(clips), digits_of(shifted))
    assert (digits_of(np.zeros((1, 2, 8, 8, 1), np.uint8)) == -1).all()
    np.testing.assert_array_equal(moves_of(clips), moves_of(shifted))


def test_psnr_counts_unknown_pixels_only():
    truth, clips = np.zeros((2, 3, 8, 8, 1), np.uint8), np.zeros((2, 3, 8, 8, 1), np.uint8)
    clips[:, 2] = 51
    unknown = np.arange(3).reshape(1, 3, 1, 1, 1) == 2
    assert psnr(clips, truth, unknown) == pytest.approx(20 * np.log10(5))
    assert psnr(clips, truth) == pytest.approx(20 * np.log10(5) + 10 * np.log10(3))
