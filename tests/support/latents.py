"""A small data set with captions and unreadable records, and its latent cache."""

import jax
import numpy as np

from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.encode.writer import Job
from dit_jax.errors import UserError

CODEC = KLVAE((8, 16), layers_per_block=1, norm_groups=4, latent_channels=2)
SIZE = (8, 8)


class Photographs:
    """`count` random 8 x 8 images of 5 classes; every third has a caption, every sixth a long one; `bad` cannot be read."""

    num_classes, class_names = 5, ("ant", "bee", "cat", "dog", "eel")

    def __init__(self, count=70, bad=(11, 40), fingerprint="photographs"):
        self.count, self.bad, self.fingerprint = count, bad, fingerprint

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise UserError(f"photograph {index} is not readable: restore it <object at 0x{id(object()):x}>")
        image = np.random.default_rng(int(index)).integers(0, 256, (8, 8, 3), np.uint8)
        example = {"image": image, "label": int(index) * 3 % 5, "name": f"photograph-{index}.png"}
        long = {"caption_long": f"a long text about {index}"} if index % 6 == 0 else {}
        return example | ({"caption": f"number {index}, zażółć"} if index % 3 == 0 else {}) | long


def params(codec=CODEC, seed=3):
    """Parameters as `codec.init` draws them, with a log-variance that shows in the statistics.

    Drawn by NumPy: XLA compiles a random generator for each shape of a kernel, which takes seconds.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        if path[-1].key != "kernel":
            return np.full(x.shape, path[-1].key == "scale", x.dtype)
        bound = np.prod(x.shape[:-1]) ** -0.5
        return rng.uniform(-bound, bound, x.shape).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(codec.init, jax.random.key(0)))


def job(shared_params, **fields):
    fields = {"source": Photographs(), "size": SIZE, "device_batch_size": 2, "shard_records": 30} | fields
    return Job(codec=CODEC, params=shared_params, **fields)


def contents(folder):
    """All files, {name: bytes}."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_byte(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)
