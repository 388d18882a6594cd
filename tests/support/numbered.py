"""A source of images that say which example they are. Here and not in a test, as worker processes import it."""

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
