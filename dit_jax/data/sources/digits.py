"""Handwritten digits, a data set that comes with scikit-learn; alone, and two side by side."""

import hashlib

import numpy as np

from dit_jax.data.sources.source import Example, fingerprint
from dit_jax.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits:
    """1,797 handwritten digits, uint8 [8, 8, 1], ten classes: a very small real image data set without download.

    Args:
        path: must be empty: the digits come with scikit-learn.
        split: "train" is the first 1,500, "test" the last 297 (other writers), "all" both.

    Raises:
        UserError: the split is unknown.
    Source: scikit-learn `load_digits`, intensities 0..16 mapped to round(255 v / 16).
    """

    num_classes = 10
    has_captions = False
    class_names = tuple("0123456789")

    def __init__(self, path: str = "", split: str = "all"):
        if path:
            raise UserError(f"data.path is {path!r}, but the digits come with scikit-learn: leave it empty")
        splits = {"all": slice(None), "train": slice(1500), "test": slice(1500, None)}
        if split not in splits:
            raise UserError(f"the digits have no split {split!r}: choose one of {', '.join(splits)}")
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._images = np.round(digits.images * 255 / 16).astype(np.uint8)[splits[split], :, :, None]
        self.labels = digits.target[splits[split]]
        self.fingerprint = fingerprint(
            name="digits",
            version=hashlib.sha256(self._images.tobytes() + self.labels.astype("<i4").tobytes()).hexdigest(),
            split=split,
            count=len(self._images),
            class_names=self.class_names,
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": int(self.labels[index]), "name": f"digit {index}"}


def pair_captions(first: str, second: str) -> tuple[str, str]:
    """(short, long) caption of two digits."""
    return f"{first} {second}", f"a handwritten {first} left of a handwritten {second}"


class DigitPairs:
    """Two digits side by side on 8 x 16 pixels with the caption "three seven", uint8 [8, 16, 1], without labels.

    The long caption is "a handwritten three left of a handwritten seven". Example i is a function of i: the order of
    the pairs of digits, and which writers' digits are taken, are drawn for it.

    Args:
        path: must be empty.
        split: as of `Digits`.
        count: number of examples.

    Raises:
        UserError: the split is unknown, or there is no example.
    """

    num_classes = 0
    class_names = ()
    has_captions = True

    def __init__(self, path: str = "", split: str = "all", count: int = 20_000):
        if count < 1:
            raise UserError(f"data.count is {count}; it must be at least 1")
        self._digits, self._count = Digits(path, split), count
        self.fingerprint = fingerprint(name="digit_pairs", digits=self._digits.fingerprint, count=count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._count:
            raise IndexError(index)
        pair = [self._digits[int(i)] for i in np.random.default_rng(index).integers(0, len(self._digits), 2)]
        short, long = pair_captions(*(WORDS[digit["label"]] for digit in pair))
        return {
            "image": np.concatenate([digit["image"] for digit in pair], axis=1),
            "label": 0,
            "name": f"pair {index}",
            "caption": short,
            "caption_long": long,
        }
