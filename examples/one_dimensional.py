"""Signals instead of images: a 1-D network and a data set, registered from outside of the package.

    python examples/one_dimensional.py --workdir=runs/waves        # trains, draws 12 signals, plots them

The file is also a config, and every verb takes it with --import:

    python -m dit_jax.main   --config=examples/one_dimensional.py --workdir=runs/waves
    python -m dit_jax.sample --import=examples/one_dimensional.py --workdir=runs/waves --num_samples=12 --out=waves.npz

A signal of L samples is an "image" of height L and width 1. Process, samplers, guidance, training and checkpoints do not ask
how many axes the data has; a network for signals and a data set are all that is needed.
"""

import argparse
import hashlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import dit_jax
from dit_jax import recipes
from dit_jax.models.layers import MLP, Attention, TimeEmbedding, normalize

LENGTH = 64
SHAPES = ("sine", "square", "triangle")


class Waves:
    """Periodic signals of random frequency and phase, uint8 [64, 1, 1]; the label is the shape: sine, square or triangle."""

    num_classes, class_names = len(SHAPES), SHAPES

    def __init__(self, count: int = 3000, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, len(SHAPES), count)
        turns = rng.uniform(1, 4, (count, 1)) * np.linspace(0, 1, LENGTH) + rng.uniform(0, 1, (count, 1))
        sine = np.sin(2 * np.pi * turns)
        waves = np.choose(self.labels[:, None], [sine, np.sign(sine), 2 / np.pi * np.arcsin(sine)])  # in [-1, 1]
        self.images = np.round(127.5 + 100 * waves).astype(np.uint8)[:, :, None, None]
        # Identifies the examples and their order: a run resumes only on the data that it was started with.
        self.fingerprint = hashlib.sha256(self.images.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index]), "name": f"wave {index}"}


class SignalTransformer(nn.Module):
    """A transformer over pieces of a signal. B batch, L samples, N = L / piece tokens, D width, C channels."""

    piece: int
    depth: int
    width: int
    num_classes: int
    out_channels: int  # follows from the data and the process; a config does not set it

    # How parameters are split over the mesh, by their paths. A small network is copied to every device.
    rules = ((r".*", ()),)

    @nn.compact
    def __call__(self, x_t, t, cond, control=None):  # x_t [B, L, 1, C]; t f32[B]; cond {"label": int32[B]}
        batch, length, _, _ = x_t.shape
        x = nn.Dense(self.width, name="embed")(x_t.reshape(batch, length // self.piece, -1))  # [B, N, D]
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        c = TimeEmbedding(self.width, name="time")(t) + nn.Embed(self.num_classes + 1, self.width, name="label")(cond["label"])
        for i in range(self.depth):
            shift, scale = jnp.split(nn.Dense(2 * self.width, name=f"modulation_{i}")(nn.silu(c))[:, None], 2, axis=-1)
            x = x + Attention(4, name=f"attention_{i}")(normalize(x) * (1 + scale) + shift)
            x = x + MLP(4 * self.width, name=f"mlp_{i}")(normalize(x))
        x = nn.Dense(self.piece * self.out_channels, name="out")(normalize(x))
        return x.reshape(batch, length, 1, self.out_channels)

    def check(self, latent_shape):
        if latent_shape[0] % self.piece or latent_shape[1] != 1:
            raise dit_jax.UserError(f"the input is {latent_shape}; [a multiple of model.piece = {self.piece}, 1, C] is needed")

    def num_tokens(self, latent_shape):
        return latent_shape[0] // self.piece

    def macs(self, latent_shape, cond_shapes):  # multiply-adds of one example; the embeddings of time and label are left out
        n, d = self.num_tokens(latent_shape), self.width
        block = 12 * n * d * d + 2 * n * n * d + 2 * d * d
        return self.depth * block + n * d * self.piece * (latent_shape[-1] + self.out_channels)

    def describe(self):
        return f"transformer over pieces of {self.piece} samples, depth {self.depth}, width {self.width}"


dit_jax.register("data", "waves", Waves)
dit_jax.register("model", "signal_transformer", SignalTransformer)


def get_config():
    c = recipes.digits(process="flow")
    c.data = {"name": "waves", "count": 3000, "seed": 0}
    c.model = {"name": "signal_transformer", "piece": 4, "depth": 4, "width": 96, "num_classes": len(SHAPES)}
    c.transform.size = (LENGTH, 1)
    c.codec.update({"mean": 0.0, "std": 0.6})  # of the data
    c.num_steps = c.optimizer.decay_steps = 800
    c.optimizer.warmup_steps = 50
    c.preview.every_steps = 0
    c.evaluation.num_images = 0
    return c


def plot(samples, path):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, 3, figsize=(9, 6), sharex=True, sharey=True)
    for axis, signal, label in zip(axes.flat, samples.images, samples.labels, strict=True):
        axis.plot(signal[:, 0, 0])
        axis.set_title(SHAPES[label], fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", default="runs/waves")
    parser.add_argument("--num_steps", type=int, default=800)
    arguments = parser.parse_args()
    config = get_config()
    config.num_steps = config.optimizer.decay_steps = arguments.num_steps
    dit_jax.train(config, arguments.workdir)
    pipe = dit_jax.load(arguments.workdir)
    plot(pipe(num_samples=12, guidance_scale=1.5), f"{arguments.workdir}/waves.png")
    print(f"plotted 12 signals in {arguments.workdir}/waves.png")
