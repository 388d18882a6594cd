"""A small random extractor with all outputs of Inception."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.evaluate.extractors import Loaded
from dit_jax.pixels import to_float


@dataclass(frozen=True)
class Random:
    name: str = "random"

    def recipe(self):
        return {"resize": "none", "precision": "float32"}

    def __call__(self, params, images):
        hidden = jnp.tanh(to_float(images).reshape(len(images), -1) @ params["kernel"])
        return {"features": hidden, "spatial": jnp.square(hidden[:, :7]), "probabilities": jax.nn.softmax(4 * hidden[:, :11])}


def load(shape=(4, 4, 3), width=24, seed=0) -> Loaded:
    kernel = np.random.default_rng(seed).standard_normal((int(np.prod(shape)), width)).astype(np.float32)
    return Loaded(Random(), {"kernel": kernel / np.float32(4)}, f"{seed:064d}")


def images(count, seed=0, shape=(4, 4, 3)):
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 200, (count, *shape)) + rng.integers(0, 56, (count, 1, 1, 1))).astype(np.uint8)
