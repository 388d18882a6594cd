"""Draws a higher resolution of given samples: a stage of a cascade after the first."""

import math
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.sample.jobs.edit import sha256
from dit_jax.sample.jobs.given import Given, for_each
from dit_jax.sample.jobs.job import Arrays, Inputs, Job, Labels, Scene
from dit_jax.storage.bounded import read_npz
from dit_jax.storage.paths import local_path
from dit_jax.tasks.low_resolution import LEVEL, LOW_RES


@dataclass(frozen=True, eq=False)
class Upsample(Job):
    """Draws images or clips whose lower resolution is given; the network is a super-resolution stage (`task.low_resolution`).

    Fields:
        given: an .npz of `sample` (`arr_0`), or an array: uint8 [N, H', W', C] or [N, F', H', W', C], one for all or one for
            each.
        noise_level: of the noise on it, a time from 0 to 1; None is the `noise` that the stage was configured with.
    """

    given: Given = None
    noise_level: float | None = None

    name: ClassVar[str] = "upsample"

    def __post_init__(self):
        level = self.noise_level
        if level is not None and (isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level <= 1):
            raise UserError(f"noise_level is {level}; it is a time, from 0 (no noise on the given samples) to 1")

    def requests(self, labels: Labels, num_samples: int | None, num_classes: int, seed: int) -> tuple[Requests, str]:
        count = num_samples or (len(_read(self.given)) if labels is None or isinstance(labels, str) else None)
        return super().requests(labels, count, num_classes, seed)

    def inputs(self, scene: Scene, requests: Requests, num_images: int) -> Inputs:
        if scene.low_resolution is None:
            raise UserError("job upsample needs a super-resolution stage, a network that was trained with task.low_resolution")
        samples, shape = _read(self.given), scene.low_resolution.shape(scene.image_shape)
        if math.prod(samples.shape[1:]) != math.prod(shape) or samples.shape[-3:] != shape[-3:]:
            raise UserError(
                f"the given samples are {_by(samples.shape[1:])}, and the stage draws {_by(scene.image_shape)} from "
                f"{_by(shape)}; give samples of that size"
            )
        samples = for_each(samples.reshape(-1, *shape), num_images, "given samples")
        level = scene.low_resolution.noise if self.noise_level is None else float(self.noise_level)
        arrays = {LOW_RES: scene.encode(samples), LEVEL: np.full(len(samples), level, np.float32)}
        return Inputs(arrays, {"name": self.name, "noise_level": level, "given_sha256": sha256(samples)})

    def conditions(self, given: Arrays) -> dict[str, Any]:
        return {name: given[name] for name in (LOW_RES, LEVEL)}


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _read(given: Given) -> np.ndarray:
    """uint8 [N, ..., H, W, C].

    Raises:
        UserError: nothing is given, it cannot be read, or it has another form.
    """
    if given is None:
        raise UserError("give the samples of the stage before: --given=<.npz of sample>")
    what, samples = ("given", given) if isinstance(given, np.ndarray) else (f"--given={given}", _read_npz(given))
    if samples is None or samples.dtype != np.uint8 or samples.ndim not in (4, 5) or 0 in samples.shape:
        form = "no array arr_0" if samples is None else f"{samples.dtype}{list(samples.shape)}"
        raise UserError(f"{what} is {form}; uint8 [N, H, W, C] or [N, F, H, W, C] is needed")
    return samples


def _read_npz(path: str | os.PathLike) -> np.ndarray | None:
    """The array `arr_0`; None if there is none."""
    try:
        return read_npz(local_path(path), ["arr_0"]).get("arr_0")
    except (OSError, ValueError) as error:
        raise UserError(f"--given={path} cannot be read ({error}); give an .npz of dit_jax.sample") from None
