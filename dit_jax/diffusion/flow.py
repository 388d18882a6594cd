"""Flow matching between data and noise in continuous time, as in SiT and Stable Diffusion 3.

Velocity always means d x / d (1 - t): it points from noise to data, which is SiT's sign (SiT's time is 1 - t). The network of
Stable Diffusion 3 has the other sign and time; `Flow` converts them.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dit_jax.diffusion.process import Prediction, expand, mean_over_example
from dit_jax.errors import UserError


class Coefficients(NamedTuple):
    """x_t = alpha x0 + sigma noise, and the derivatives of alpha and sigma by t."""

    alpha: jax.Array
    sigma: jax.Array
    alpha_rate: jax.Array
    sigma_rate: jax.Array


def linear(t: Any, xp: Any = jnp) -> Coefficients:
    """alpha = 1 - t, sigma = t (Liu et al. 2023, rectified flow)."""
    return Coefficients(1 - t, t, -xp.ones_like(t), xp.ones_like(t))


def gvp(t: Any, xp: Any = jnp) -> Coefficients:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), so that alpha^2 + sigma^2 = 1 (Ma et al. 2024, SiT)."""
    a = math.pi / 2
    # cos(a t) written as sin(a (1 - t)): exactly 0 at t = 1.
    return Coefficients(xp.sin(a * (1 - t)), xp.sin(a * t), -a * xp.sin(a * t), a * xp.sin(a * (1 - t)))


INTERPOLANTS = {"linear": linear, "gvp": gvp}
TIMES_OF = {"linear": lambda ratio: 1 / (1 + 1 / ratio), "gvp": lambda ratio: 2 / np.pi * np.arctan(ratio)}  # of sigma / alpha
TIME_DISTRIBUTIONS = ("uniform", "logit_normal")
CONVENTIONS = ("sit", "sd3")
SAMPLING_GRIDS = ("uniform", "sd3")
TIMESTEPS = 1000  # of Stable Diffusion 3: the network's time input at t = 1; a grid of it ends at the first timestep


def velocity_of(x0: jax.Array, noise: jax.Array, c: Coefficients) -> jax.Array:
    """d x / d (1 - t); finite at both ends of time."""
    return -(c.alpha_rate * x0 + c.sigma_rate * noise)


def score_of(noise: jax.Array, c: Coefficients) -> jax.Array:
    """grad log p_t(x); needs sigma > 0."""
    return -noise / c.sigma


def from_velocity(velocity: jax.Array, x_t: jax.Array, c: Coefficients) -> tuple[jax.Array, jax.Array]:
    """velocity -> (x0, noise), at every t: solves x_t = alpha x0 + sigma noise together with `velocity_of`."""
    determinant = c.alpha * c.sigma_rate - c.sigma * c.alpha_rate
    return ((c.sigma_rate * x_t + c.sigma * velocity) / determinant, -(c.alpha * velocity + c.alpha_rate * x_t) / determinant)


def from_noise(noise: jax.Array, x_t: jax.Array, c: Coefficients) -> tuple[jax.Array, jax.Array]:
    """noise -> (x0, noise); needs alpha > 0."""
    return (x_t - c.sigma * noise) / c.alpha, noise


def from_x0(x0: jax.Array, x_t: jax.Array, c: Coefficients) -> tuple[jax.Array, jax.Array]:
    """x0 -> (x0, noise); needs sigma > 0."""
    return x0, (x_t - c.alpha * x0) / c.sigma


def from_score(score: jax.Array, x_t: jax.Array, c: Coefficients) -> tuple[jax.Array, jax.Array]:
    """score -> (x0, noise); needs alpha > 0."""
    return from_noise(-c.sigma * score, x_t, c)


def shifted(t: Any, shift: float) -> Any:
    """Resolution shift of a time. shift > 1 gives more noise; 0 and 1 are fixed points (Esser et al. 2024, SD3, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class Flow:
    """An interpolant x_t = alpha(t) x0 + sigma(t) noise whose velocity the network learns (Ma et al. 2024, SiT).

    Neither SiT's nor Stable Diffusion 3's weights need a change: `convention` says what the network is given and returns.

    Fields:
        interpolant: one of INTERPOLANTS.
        convention: of the network, one of CONVENTIONS. "sit": it is given 1 - t and returns d x / d (1 - t), linear: x0 - noise.
            "sd3": it is given 1000 t and returns d x / d t, linear: noise - x0, as Stable Diffusion 3.
        sampling_grid: one of SAMPLING_GRIDS, see `grid`.
        time_distribution: of training times: "uniform", or "logit_normal", where logit(t) is normal with mean logit_mean and
            deviation logit_std (SD3, section 3.1).
        logit_mean, logit_std: of "logit_normal".
        shift: of training times and of the sampling grid towards noise (`shifted`); 1 is off.
        spare_channels: the network returns 2C channels and the second half is ignored, as in SiT's released models.
    """

    interpolant: str = "linear"
    time_distribution: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    spare_channels: bool = False
    convention: str = "sit"
    sampling_grid: str = "uniform"

    min_time = 0.0
    continuous = True

    def __post_init__(self):
        choices = {"interpolant": INTERPOLANTS, "time_distribution": TIME_DISTRIBUTIONS}
        for name, allowed in (choices | {"convention": CONVENTIONS, "sampling_grid": SAMPLING_GRIDS}).items():
            if getattr(self, name) not in allowed:
                raise UserError(f"process.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("logit_std", "shift"):
            if getattr(self, name) <= 0:
                raise UserError(f"process.{name} is {getattr(self, name)}; it must be positive")
        if self.time_distribution == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise UserError(
                f"process.logit_mean = {self.logit_mean} and logit_std = {self.logit_std} have no effect on uniform "
                "times; set process.time_distribution to logit_normal, or leave them at 0 and 1"
            )

    def output_channels(self, channels: int) -> int:
        return 2 * channels if self.spare_channels else channels

    def coefficients(self, t: Any, xp: Any = jnp) -> Coefficients:
        """alpha, sigma and their rates at t, in the shape of t; xp=np for float64."""
        return INTERPOLANTS[self.interpolant](xp.asarray(t), xp)

    def expanded(self, t: ArrayLike, x: jax.Array) -> Coefficients:
        return Coefficients(*(expand(c, x) for c in self.coefficients(t)))

    def sample_time(self, key: jax.Array, batch: int) -> jax.Array:
        if self.time_distribution == "uniform":
            t = jax.random.uniform(key, (batch,))
        else:
            t = jax.nn.sigmoid(self.logit_mean + self.logit_std * jax.random.normal(key, (batch,)))
        return shifted(t, self.shift)

    def network_time(self, t: ArrayLike) -> jax.Array:
        """SiT's time, 0 for noise and 1 for data; or SD3's, 1000 for noise and 0 for data."""
        return 1 - jnp.asarray(t) if self.convention == "sit" else TIMESTEPS * jnp.asarray(t)

    def _velocity(self, output: jax.Array, channels: int) -> jax.Array:
        """d x / d (1 - t), of the network's output."""
        output = output[..., :channels]
        return output if self.convention == "sit" else -output

    def perturb(self, x0: jax.Array, noise: jax.Array, t: ArrayLike) -> jax.Array:
        c = self.expanded(t, x0)
        return c.alpha * x0 + c.sigma * noise

    def predict(self, output: jax.Array, x_t: jax.Array, t: ArrayLike) -> Prediction:
        x0, noise = from_velocity(self._velocity(output, x_t.shape[-1]), x_t, self.expanded(t, x_t))
        return Prediction(x0, noise, 0.0)

    def network_input(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        return x_t

    def loss(
        self, output: jax.Array, x0: jax.Array, noise: jax.Array, t: ArrayLike, weight: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean squared error of the velocity.

        Returns:
            (f32[B], {"mse": f32[B]}).

        Source: Ma et al. 2024 (SiT), section 2.
        """
        target = velocity_of(x0, noise, self.expanded(t, x0))
        mse = mean_over_example(jnp.square(target - self._velocity(output, x0.shape[-1])), weight)
        return mse, {"mse": mse}

    def grid(self, num_steps: int, spacing: str = "even") -> np.ndarray:
        """num_steps + 1 times from 1 to 0: even and then shifted; on the "sd3" grid num_steps even times from 1 to shifted(1 /
        1000), which are shifted (so the last of them twice), and then 0.

        The "sd3" grid is that of Stability's code and of diffusers; 28 steps of shift 3 end with 0.1998, 0.1109, 0.0089, 0.

        Raises:
            UserError: fewer than one step, or a spacing of discrete timesteps.
        """
        if num_steps < 1:
            raise UserError(f"the number of sampling steps is {num_steps}; it must be at least 1")
        if spacing != "even":
            raise UserError(f"spacing {spacing!r} selects discrete timesteps, which process 'flow' does not have; use 'even'")
        if self.sampling_grid == "sd3":
            last = shifted(1 / TIMESTEPS, self.shift)
            return np.append(shifted(np.linspace(1, last, num_steps), self.shift), 0.0)
        return shifted(np.linspace(1, 0, num_steps + 1), self.shift)

    def start(self, noise: jax.Array, t: ArrayLike) -> jax.Array:
        return noise

    def time_of(self, ratio: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return TIMES_OF[self.interpolant](np.asarray(ratio, np.float64))

    def alpha_sigma(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c: Any = self.coefficients(times, np)  # NumPy arrays
        return c.alpha, c.sigma

    def ode(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """d x / d (1 - t) = velocity."""
        return np.ones_like(times), 1 - np.asarray(times)

    def slope(self, prediction: Prediction, t: ArrayLike) -> jax.Array:
        return velocity_of(prediction.x0, prediction.noise, self.expanded(t, prediction.x0))
