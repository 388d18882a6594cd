"""Diffusion of signals in one dimension: a network and a data set from outside of the package, and the config that uses them.

    python -m dit_jax.main   --config=examples/one_dimensional.py --workdir=runs/waves
    python -m dit_jax.sample --import=examples/one_dimensional.py --workdir=runs/waves --num_samples=9 --out=waves.npz

A signal of L numbers is an image of height 1, so files, grids and samplers need no change: `arr_0` of waves.npz is
uint8 [9, 1, L, 1]. The network's blocks see [B, L, D] only.
"""

import flax.linen as nn
import numpy as np

import dit_jax
from dit_jax import recipes
from dit_jax.data.sources.source import fingerprint
from dit_jax.errors import UserError
from dit_jax.models.layers import TimeEmbedding, normalize

KINDS = {  # class: one period of a wave, over x in [0, 1)
    "sine": lambda x: np.sin(2 * np.pi * x),
    "square": lambda x: np.where(x < 0.5, 1.0, -1.0),
    "sawtooth": lambda x: 2 * x - 1,
}


class Waves:
    """Signals of three kinds, with one to three periods, a random phase and a little noise; example i is a function of i."""

    num_classes, class_names = len(KINDS), tuple(KINDS)

    def __init__(self, length: int = 64, count: int = 3_000):
        self.length, self.count = length, count
        self.fingerprint = fingerprint(name="waves", length=length, count=count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        rng, label = np.random.default_rng(index), index % self.num_classes
        phase = rng.integers(1, 4) * np.arange(self.length) / self.length + rng.uniform()
        signal = 0.8 * KINDS[self.class_names[label]](phase % 1) + 0.02 * rng.normal(size=self.length)
        return {"image": np.uint8(np.clip(127.5 * (1 + signal), 0, 255))[None, :, None], "label": label}


class DilatedNet(nn.Module):
    """Residual blocks of convolutions along the signal, each with twice the dilation of the last (van den Oord et al. 2016)."""

    depth: int
    width: int
    num_classes: int
    out_channels: int  # follows from the data and the process; a config does not set it

    rules = ((r"label/embedding", (None, "fsdp")), (r"kernel|bias", ()))  # small enough for every device to hold all of it

    @nn.compact
    def __call__(self, x_t, t, cond, control=None):  # x_t [B, 1, L, C]; t f32[B]; cond {"label": int32[B]}
        x = nn.Dense(self.width, name="embed")(x_t[:, 0])  # [B, L, D]
        c = TimeEmbedding(self.width, name="time")(t) + nn.Embed(self.num_classes + 1, self.width, name="label")(cond["label"])
        for i in range(self.depth):
            y = normalize(x) + nn.Dense(self.width, name=f"condition_{i}")(nn.silu(c))[:, None]
            y = nn.gelu(nn.Conv(2 * self.width, (3,), kernel_dilation=2**i, padding="CIRCULAR", name=f"in_{i}")(y))
            x = x + nn.Conv(self.width, (1,), name=f"out_{i}")(y)
        return nn.Dense(self.out_channels, name="head")(normalize(x))[:, None]  # [B, 1, L, out_channels]

    def check(self, latent_shape):
        if len(latent_shape) != 3 or latent_shape[0] != 1:
            raise UserError(f"the network takes signals [1, L, C], not {list(latent_shape)}; set transform.size=1,<length>")

    def num_tokens(self, latent_shape):
        return latent_shape[1]

    def macs(self, latent_shape, cond_shapes):  # multiply-adds of one example; the embeddings of time and label are left out
        _, length, channels = latent_shape
        d = self.width
        return length * d * (channels + self.out_channels + self.depth * 8 * d) + self.depth * d * d

    def describe(self):
        return f"DilatedNet, depth {self.depth}, width {self.width}"


dit_jax.register("data", "waves", Waves)
dit_jax.register("model", "dilated", DilatedNet)


def get_config():
    c = recipes.digits(process="flow")
    c.data = {"name": "waves", "length": 64, "count": 3_000}
    c.transform.size = (1, 64)
    c.model = {"name": "dilated", "depth": 6, "width": 64, "num_classes": len(KINDS)}
    c.codec.update({"mean": 0.0, "std": 0.6})
    c.num_steps = c.optimizer.decay_steps = 500
    c.preview.num_images = 9
    c.evaluation.update({"num_images": 90, "batch_size": 90, "reference": ""})
    return c
