"""Handwritten digits, a data set that comes with scikit-learn."""

import hashlib

import numpy as np

from dit_jax.data.sources.source import Example, fingerprint
from dit_jax.errors import UserError


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
