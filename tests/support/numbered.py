"""A source of images that say which example they are. Here and not in a test, as worker processes import it."""

import math
import os

import numpy as np


class Numbers:
    """Example i is a 4x4 image whose left half says i, so that order and mirroring can be read off a batch."""

    num_classes, class_names, fingerprint = 1000, (), "numbers"

    def __init__(self, count: int, bad: tuple[int, ...] = (), captions: tuple[int, ...] = ()):
        self.count, self.bad, self.captions = count, bad, captions

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.zeros((4, 4, 1), np.uint8)
        image[:, :2] = index % 256
        if index in self.bad:
            image = b"broken"
        caption = {"caption": f"the number {index}"} if index in self.captions else {}
        return {"image": image, "label": index, "name": f"number-{index}.png"} | caption


class Letters:
    """A tokenizer of the first letters, which can be pickled."""

    def __call__(self, texts):
        return {"tokens_letters": np.array([[ord(text[0]), len(text)] for text in texts], np.int32)}


class Away(Numbers):
    """Numbers on storage that is away: reads raise OSError with this errno, so many times or for good.

    only: the records that are away; empty for all. after: so many reads succeed first. errno None is the error of a decoder.
    """

    def __init__(self, count, errno, only=(), after=0, fails=math.inf):
        super().__init__(count)
        self.errno, self.only, self.after, self.until, self.reads = errno, only, after, after + fails, 0

    def __getitem__(self, index):
        self.reads += 1
        if self.after < self.reads <= self.until and (not self.only or index in self.only):
            if self.errno is None:
                raise OSError("cannot identify image file")
            raise OSError(self.errno, os.strerror(self.errno))
        return super().__getitem__(index)
