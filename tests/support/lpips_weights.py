"""Random LPIPS weights with the tensor names of the `lpips` package, listed independently of the converter."""

from functools import lru_cache

import numpy as np
from dit_files import held

PLACES = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}  # of convolutions in vgg16().features
WIDTHS = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512}
SCALING = {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}


@lru_cache
def arrays():
    """{name: float32 array}, in the package's order, the second copy of the linear layers included."""
    rng = np.random.default_rng(0)
    found = {f"scaling_layer.{name}": np.float32(value).reshape(1, 3, 1, 1) for name, value in SCALING.items()}
    before = 3
    for stage, places in PLACES.items():
        for place in places:
            width = WIDTHS[stage]
            kernel = rng.standard_normal((width, before, 3, 3), np.float32) * np.float32(np.sqrt(2 / (9 * before)))
            found[f"net.slice{stage}.{place}.weight"] = kernel
            found[f"net.slice{stage}.{place}.bias"] = 0.1 * rng.standard_normal(width, np.float32)
            before = width
    for stage, width in WIDTHS.items():
        found[f"lin{stage - 1}.model.1.weight"] = rng.random((1, width, 1, 1), np.float32)
    return found | {f"lins.{n}.model.1.weight": found[f"lin{n}.model.1.weight"] for n in range(5)}


def tensors(**changes):
    """The weights as readable tensors, with changes by name (__ for a dot); None removes a tensor."""
    changed = arrays() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: held(array) for name, array in changed.items() if array is not None}
