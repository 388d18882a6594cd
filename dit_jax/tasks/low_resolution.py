"""The lower resolution that a super-resolution stage starts from: how it is made in training, and the noise on it.

B batch, F x H x W x C clips (or H x W x C images), f x h x w x c latents of the lower resolution.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.diffusion.process import Process, noise_like
from dit_jax.errors import UserError
from dit_jax.tasks.task import named_key

LOW_RES, LEVEL = "low_res", "low_res_level"  # entries of a condition


@dataclass(frozen=True)
class LowResolution:
    """What a stage of a cascade is given: frames and sides that are fewer by whole factors, with noise.

    In training, the lower resolution of an example is made from the example itself. The noise covers what the stage before does
    wrong; its level, a time of the process, is told to the network if it takes one.

    Fields:
        sides: factor of height and width. A low pixel is the mean of sides x sides pixels.
        frames: factor of the frames, of which every such is kept, from the first on. Frame i of the lower resolution then stands
            at frame i * frames, whether the clip has k * frames or 1 + k * frames of them.
        most_noise: in training the level is uniform from 0 to this time.
        noise: the level in sampling.

    Source: Ho et al. 2022 (Cascaded diffusion models), section 4.2; Gupta et al. 2023 (W.A.L.T), section 4.5.
    """

    sides: int = 1
    frames: int = 1
    most_noise: float = 0.3
    noise: float = 0.1

    def __post_init__(self):
        for name in ("sides", "frames"):
            if getattr(self, name) < 1:
                raise UserError(f"task.low_resolution.{name} is {getattr(self, name)}; it must be at least 1")
        if self.sides == self.frames == 1:
            raise UserError(
                "task.low_resolution has sides 1 and frames 1, which is the same resolution; set one of them to 2 or more"
            )
        if not 0 <= self.most_noise <= 1 or not 0 <= self.noise <= self.most_noise:
            raise UserError(
                f"task.low_resolution has noise {self.noise} and most_noise {self.most_noise}; 0 <= noise <= most_noise <= 1 is "
                "required"
            )

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(F', H', W', C) or (H', W', C) of the lower resolution.

        Raises:
            UserError: a factor does not divide the shape, or an image has no frames to leave out.
        """
        *frames, height, width, channels = image_shape
        if height % self.sides or width % self.sides:
            raise UserError(f"task.low_resolution.sides is {self.sides}, which does not divide {height} x {width} pixels")
        if self.frames > 1 and (not frames or frames[0] % self.frames not in (0, 1)):
            have = f"{frames[0]} frames" if frames else "images"
            raise UserError(
                f"task.low_resolution.frames is {self.frames}, and the examples are {have}; k times that many frames, or one "
                "more, are needed"
            )
        kept = [-(-count // self.frames) for count in frames]
        return (*kept, height // self.sides, width // self.sides, channels)

    def of(self, images: jax.Array) -> jax.Array:
        """The lower resolution of float images [B, (F,) H, W, C]."""
        if images.ndim == 5:
            images = images[:, :: self.frames]
        *lead, height, width, channels = images.shape
        s = self.sides
        return images.reshape(*lead, height // s, s, width // s, s, channels).mean((-4, -2))

    def draw(self, key: jax.Array, process: Process, low: jax.Array) -> dict[str, jax.Array]:
        """The entries of the condition in training: latents low [B, ..., c] with noise of a random level, and the level."""
        level = self.most_noise * jax.random.uniform(named_key(key, "low_res_level"), low.shape[:1])
        noise = jax.random.normal(named_key(key, "low_res_noise"), low.shape, jnp.float32)
        return {LOW_RES: process.perturb(low, noise, level), LEVEL: level}

    def for_samples(self, process: Process, requests: Mapping[str, Any], keys: jax.Array) -> dict[str, Any]:
        """The requests with noise on "low_res", whose level is "low_res_level", or else `noise`; keys [B], one for an example.

        Raises:
            UserError: there is no lower resolution.
        """
        if LOW_RES not in requests:
            raise UserError(
                "the network is a super-resolution stage and draws from a lower resolution; give --job=upsample --given=<samples "
                "of the stage before>, or all stages as --stages=first,second"
            )
        low = requests[LOW_RES]
        level = requests.get(LEVEL, jnp.full(len(low), self.noise))
        noise = noise_like(jax.vmap(named_key, (0, None))(keys, "low_res"), low.shape[1:])
        return {**requests, LOW_RES: process.perturb(low, noise, level), LEVEL: level}
