"""Sources of images and clips of several sizes for tests of buckets. Here and not in a test, as worker processes import it."""

import numpy as np
import tiny

import dit_jax
from dit_jax import recipes

SHAPES = ((1, 8, 8, 16, 2), (1, 8, 12, 8, 1))  # of `config`


class Sized:
    """Example i is a clip of the i-th of `sizes` in turn: (frames, height, width, rate). Row 0 is i, the others say the frame.

    Args:
        count: number of examples.
        sizes: of the examples, in turn.
        knows: whether `sizes()` exists.
        bad: numbers of examples that cannot be read.
    """

    num_classes, class_names, fingerprint = 10, tuple("abcdefghij"), "sized"

    def __init__(self, count: int = 40, sizes=((1, 8, 8, 0),), knows: bool = True, bad: tuple = ()):
        self.count, self._sizes, self.bad = count, tuple(map(tuple, sizes)), tuple(bad)
        if knows:
            self.sizes = self._all_sizes

    def _all_sizes(self, upright=False):
        return np.array([self._sizes[i % len(self._sizes)] for i in range(self.count)], np.float64)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        frames, height, width, fps = self._sizes[index % len(self._sizes)]
        video = np.zeros((frames, height, width, 1), np.uint8)
        video += np.arange(frames, dtype=np.uint8)[:, None, None, None]
        video[:, 0] = index
        if index in self.bad:
            return {"image": b"broken", "label": 0, "name": f"bad-{index}"}
        stored = {"image": video[0]} if frames == 1 else {"video": video, "fps": fps}
        return {**stored, "label": index % 10, "name": f"sized-{index}"}


dit_jax.register("data", "sized", Sized)


def config(**overrides):
    """A tiny DiT on images of two sizes."""
    c = recipes.digits("flow")
    c.data = {"name": "sized", "count": 60, "sizes": ((1, 8, 8, 0), (1, 8, 12, 0))}
    c.buckets = {"classes": SHAPES}
    c.model.update({"depth": 1, "width": 32, "patch_size": 2})
    tiny.shorten(c, num_steps=6, batch_size=16, checkpoint__every_steps=2)
    return tiny.override(c.unlock(), overrides).lock()
