"""Images -> features, before a distance is taken."""

import numpy as np

from dit_jax.pixels import to_float


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] -> float32 [N, H W C] in [-1, 1]: for tiny images, where no pretrained network is needed."""
    return np.asarray(to_float(images)).reshape(len(images), -1)


EXTRACTORS = {"pixels": pixels}
