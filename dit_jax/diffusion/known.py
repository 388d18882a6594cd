"""Holds a part of the data to known values while a sampler draws the rest (inpainting)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dit_jax.diffusion.process import Denoise, Memory, Prediction, Process


@dataclass(frozen=True)
class KnownRegion:
    """A `Denoise` whose prediction is exact where x0 is known, so that every sampler carries the known part along.

    There the predicted x0 is the known one, the noise is that which x_t then holds, and the variance is that of the posterior.
    A deterministic sampler keeps x_t = alpha x0 + sigma noise with the first noise at all times of its grid; an ancestral one
    draws x_t from q(x_s | x_t, x0), whose marginals are q(x_s | x0). Both are RePaint's replacement of the known part
    (Lugmayr et al. 2022, equation 8, without resampling), of one trajectory in place of new noise at each step, and without a
    change in the samplers.

    Fields:
        x0: [B, ..., C], the known values; elsewhere they are ignored.
        noise: [B, ..., C] that sampling starts from; used where sigma is 0.
        drawn: bool, broadcasts to x0: True where the sampler draws, False where x0 is known.
    """

    denoise: Denoise
    process: Process
    x0: jax.Array
    noise: jax.Array
    drawn: jax.Array

    def init(self, x: jax.Array) -> Memory:
        return self.denoise.init(x)

    def __call__(self, x_t: jax.Array, t: jax.Array, memory: Memory) -> tuple[Prediction, Memory]:
        prediction, memory = self.denoise(x_t, t, memory)
        alpha, sigma = _alpha_sigma(self.process, x_t, t)
        noise = jnp.where(sigma > 0, (x_t - alpha * self.x0) / jnp.where(sigma > 0, sigma, 1), self.noise)
        return (
            Prediction(
                jnp.where(self.drawn, prediction.x0, self.x0),
                jnp.where(self.drawn, prediction.noise, noise),
                jnp.where(self.drawn, prediction.variance_fraction, 0.0),
            ),
            memory,
        )


def _alpha_sigma(process: Process, x: jax.Array, t: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """(alpha, sigma) at t, which broadcast to x: x_t is linear in x0 and noise."""
    one, zero = (jnp.full((len(x), *[1] * (x.ndim - 1)), value, x.dtype) for value in (1, 0))
    return process.perturb(one, zero, t), process.perturb(zero, one, t)
