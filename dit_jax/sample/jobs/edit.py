"""Edits a given image: noise is added up to a time, and the sampler goes from there (SDEdit)."""

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Process
from dit_jax.diffusion.samplers.late import start_time, started
from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.sample.jobs.given import Given, for_each, read_samples
from dit_jax.sample.jobs.job import Arrays, Inputs, Job, Labels, Scene


@dataclass(frozen=True, eq=False)
class Edit(Job):
    """Adds noise to a given image up to the time `strength`, and draws from there with the rest of the sampler's steps.

    The start is the first time t of the sampler's own grid that is at most the strength: x_t = alpha(t) x0 + sigma(t) noise. At
    strength 1 all steps run, and x_t holds alpha of the data: exactly 0 for the flow process, whose images are then those of
    "generate"; 0.0064 for the paper's gaussian process; 1 for the edm process, below noise of sigma_max. Small strengths keep the
    image, great ones follow the label.

    Fields:
        given: an image or clip, a file, .npy, .npz or array: one for all, or one for each.
        strength: in (0, 1].
        resize: scales a given image of another size and crops its centre, as training does; False refuses it.

    Source: Meng et al. 2022 (SDEdit), algorithm 1.
    """

    given: Given = None
    strength: float = 0.6
    resize: bool = False

    name: ClassVar[str] = "edit"

    def __post_init__(self):
        if isinstance(self.strength, bool) or not isinstance(self.strength, (int, float)) or not 0 < self.strength <= 1:
            raise UserError(f"strength is {self.strength}; it must lie in (0, 1]: 1 is noise, small values keep the image")

    def requests(self, labels: Labels, num_samples: int | None, num_classes: int, seed: int) -> tuple[Requests, str]:
        if labels is None and num_classes:
            raise UserError(f"job {self.name} needs the class that the image is to have: --labels=3, or --labels=none")
        return super().requests(
            labels, num_samples or (1 if isinstance(labels, str) or labels is None else None), num_classes, seed
        )

    def inputs(self, scene: Scene, requests: Requests, num_images: int) -> Inputs:
        images = for_each(read_samples(self.given, scene.image_shape, self.resize), num_images, "given images")
        arrays = {"x0": scene.encode(images)}
        return Inputs(arrays, {"name": self.name, "strength": float(self.strength), "given_sha256": sha256(images)})

    def sampler(self, sampler: Any, process: Process) -> Any:
        return sampler if self.strength == 1 else started(sampler, process, self.strength)

    def begin(self, sampler: Any, process: Process, noise: jax.Array, given: Arrays) -> jax.Array:
        return process.perturb(given["x0"], noise, jnp.float32(start_time(sampler, process)))


def sha256(images: np.ndarray) -> str:
    """The hash of images' bytes and shape."""
    return hashlib.sha256(str(images.shape).encode() + np.ascontiguousarray(images).tobytes()).hexdigest()
