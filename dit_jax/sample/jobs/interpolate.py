"""Draws images between two seeds, two classes, or both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.samplers.late import start_time
from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.sample.jobs.job import Inputs, Job, Labels, Scene


@dataclass(frozen=True, eq=False)
class Interpolate(Job):
    """Draws images between the first image of one seed and the first of another, and between one class and another.

    The initial noise moves along the great circle through both, in equal angles; of two labels, the embeddings are mixed
    linearly; both ends are included. A sampler that adds noise (ddpm, sde, ddim with eta > 0) adds that of the first seed to all
    images; the last image is then not the second seed's.

    Fields:
        seeds: of the first and of the last image; the same twice changes the class only.

    Source: Shoemake 1985 (slerp); Song et al. 2021 (DDIM), section 5.3 and appendix D.5.
    """

    seeds: Sequence[int] = (0, 1)

    name: ClassVar[str] = "interpolate"

    def __post_init__(self):
        seeds = tuple(self.seeds)
        if len(seeds) != 2 or not all(isinstance(s, (int, np.integer)) and not isinstance(s, bool) for s in seeds):
            raise UserError(f"seeds is {self.seeds!r}; two whole numbers are needed, as in --seeds=1,2")

    def seed(self, seed: int) -> int:
        return int(self.seeds[0])

    def requests(self, labels: Labels, num_samples: int | None, num_classes: int, seed: int) -> tuple[Requests, str]:
        count = 8 if num_samples is None else num_samples
        if count < 2:
            raise UserError(f"num_samples is {count}; an interpolation has at least 2 images")
        given = labels if isinstance(labels, str) else list(() if labels is None else labels)
        if num_classes and given != "none" and (isinstance(given, str) or len(given) not in (1, 2)):
            raise UserError("an interpolation is of one class or between two: --labels=3, --labels=3,5, or --labels=none")
        if isinstance(given, str) or len(given) < 2:
            return super().requests(given or None, count, num_classes, seed)
        (first, mode), (second, _) = (super(Interpolate, self).requests([label], count, num_classes, seed) for label in given)
        share = np.linspace(0, 1, count, dtype=np.float32)
        return {**first, "second_label": second["label"], "second_share": share}, mode

    def inputs(self, scene: Scene, requests: Requests, num_images: int) -> Inputs:
        if "second_label" in requests and not getattr(scene.network, "mixes_labels", False):
            raise UserError(f"{type(scene.network).__name__} cannot mix the embeddings of two labels; give one label")
        first, last = (scene.noise(int(seed)) for seed in self.seeds)
        noise = spherical(first, last, np.linspace(0, 1, num_images))
        return Inputs({"noise": noise}, {"name": self.name, "seeds": [int(seed) for seed in self.seeds]})

    def key_indices(self, indices: jax.Array) -> jax.Array:
        return jnp.zeros_like(indices)

    def begin(self, sampler, process, noise, given):
        return process.start(given["noise"], start_time(sampler, process))


def spherical(first: np.ndarray, last: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """f32[N, ...]: points at N fractions of the angle from `first` [1, ...] to `last` [1, ...]."""
    a, b = first.astype(np.float64), last.astype(np.float64)
    angle = np.arccos(np.clip((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()), -1, 1))
    if np.sin(angle) < 1e-9:  # the same noise
        return np.repeat(first, len(fractions), axis=0)
    share = fractions.reshape(-1, *[1] * (a.ndim - 1))
    return ((np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)).astype(np.float32)
