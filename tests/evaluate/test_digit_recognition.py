"""Recognition of digits by their nearest neighbours, and the digits that prompts ask for."""

import numpy as np

from dit_jax.data.sources.digits import DigitPairs, Digits
from dit_jax.evaluate.digit_recognition import asked, recognised, recognised_all


def test_real_digits_are_recognised():
    """Catches labels that are shifted against their digits, contrast that matters, and noise or blanks taken for a digit."""
    digits = Digits()
    images = np.stack([digits[i]["image"] for i in range(len(digits))])
    found = recognised(images, without_itself=True)
    assert (found == digits.labels).mean() > 0.98
    assert (recognised(images[:50] // 2 + 60) == recognised(images[:50])).mean() > 0.95
    assert recognised(np.full((1, 8, 8, 1), 7, np.uint8)).tolist() == [-1]


def test_pairs_are_read_from_left_to_right():
    """Catches halves that change places, and a word of a prompt that is not found."""
    pairs = DigitPairs(count=20)
    images, prompts = zip(*((pairs[i]["image"], pairs[i]["caption_long"]) for i in range(20)), strict=True)
    assert [tuple(row) for row in recognised_all(np.stack(images))] == asked(prompts)
    assert asked(["an eight", "a handwritten three left of a handwritten seven"]) == [(8,), (3, 7)]
