"""The process of EDM: x_t = x0 + sigma(t) noise, with a network whose input and output are scaled to unit variance."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dit_jax.diffusion.flow import Coefficients
from dit_jax.diffusion.process import Prediction, expand, mean_over_example
from dit_jax.errors import UserError

TIME_DISTRIBUTIONS = ("log_normal", "interpolated_cosine")
LOSS_WEIGHTS = ("edm", "soft_min_snr", "snr")
LEAST_SIGMA, LARGEST_SIGMA = 1e-3, 1e3  # of the interpolated cosine, which also covers the sampling grid


@dataclass(frozen=True)
class EDM:
    """Data plus noise of growing deviation, x_t = x0 + sigma noise, with a preconditioned network (Karras et al. 2022, EDM).

    The time is t = (sigma / sigma_max) ** (1 / rho): 1 is the start of sampling, 0 is data, and Karras's sampling grid is even
    in t. Training also draws sigma above sigma_max, and so t above 1: 2 of a million times by default. The network's input is
    x_t / sqrt(sigma^2 + sigma_data^2), its time input ln(sigma) / 4, and its output F gives x0 = c_skip x_t + c_out F (table 1).

    Fields:
        sigma_data: standard deviation of the data: 0.5 for images in [-1, 1], 1 for latents that the codec scales.
        sigma_min, sigma_max: the last and the first noise level of sampling.
        rho: spacing of the sampling grid: sigma ** (1 / rho) is even.
        time_distribution: of the training sigma, one of TIME_DISTRIBUTIONS: "log_normal" (section 5), or
            "interpolated_cosine", a cosine schedule shifted for small images at noise and for large ones at data, from one
            stratified u per example (Hoogeboom et al. 2023, simple diffusion, section 3.1; HDiT).
        log_sigma_mean, log_sigma_std: of ln(sigma), for "log_normal"; P_mean and P_std in the paper.
        image_side: side of the data in pixels, for "interpolated_cosine", which needs it.
        low_side, high_side: sides to which the two schedules of "interpolated_cosine" are shifted; None is image_side.
        loss_weight: of the squared error of F, one of LOSS_WEIGHTS: "edm" is 1, "soft_min_snr" is (sigma sigma_data)^2 /
            (sigma^2 + sigma_data^2)^2 (Crowson et al. 2024, HDiT), "snr" is sigma_data^2 / (sigma^2 + sigma_data^2). On the
            squared error of x0 they are (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, 1 / (sigma^2 + sigma_data^2) and
            1 / sigma^2.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    time_distribution: str = "log_normal"
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    image_side: int | None = None
    low_side: int = 32
    high_side: int | None = None
    loss_weight: str = "edm"

    continuous = True

    def __post_init__(self):
        for name, allowed in (("time_distribution", TIME_DISTRIBUTIONS), ("loss_weight", LOSS_WEIGHTS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"process.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("sigma_data", "sigma_min", "sigma_max", "rho", "log_sigma_std", "image_side", "low_side", "high_side"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"process.{name} is {value}; it must be positive and finite")
        if self.sigma_min >= self.sigma_max:
            raise UserError(f"process.sigma_min is {self.sigma_min}; it must be below process.sigma_max, {self.sigma_max}")
        if self.time_distribution == "log_normal":
            if (self.image_side, self.low_side, self.high_side) != (None, 32, None):
                raise UserError(
                    f"process.image_side = {self.image_side}, low_side = {self.low_side} and high_side = {self.high_side} have "
                    "no effect on log-normal times; set process.time_distribution to interpolated_cosine, or leave them out"
                )
        elif (self.log_sigma_mean, self.log_sigma_std) != (-1.2, 1.2):
            raise UserError(
                f"process.log_sigma_mean = {self.log_sigma_mean} and log_sigma_std = {self.log_sigma_std} have no effect on "
                "interpolated_cosine times; set process.time_distribution to log_normal, or leave them at -1.2 and 1.2"
            )
        elif self.image_side is None:
            raise UserError(
                "process.time_distribution is interpolated_cosine, which needs the side of the data in pixels; give it, as in "
                "--config.process.image_side=256"
            )

    @property
    def min_time(self) -> float:
        """The time of sigma_min, the last at which sampling runs the network."""
        return (self.sigma_min / self.sigma_max) ** (1 / self.rho)

    def output_channels(self, channels: int) -> int:
        return channels

    def sigma(self, t: Any) -> Any:
        return self.sigma_max * t**self.rho

    def coefficients(self, t: Any, xp: Any = jnp) -> Coefficients:
        """alpha, sigma and their rates at t, in the shape of t; xp=np for float64."""
        t = xp.asarray(t)
        one, sigma_rate = xp.ones_like(t), self.rho * self.sigma_max * t ** (self.rho - 1)
        return Coefficients(one, self.sigma(t), 0 * one, sigma_rate)

    def sample_time(self, key: jax.Array, batch: int) -> jax.Array:
        if self.time_distribution == "log_normal":
            log_sigma = self.log_sigma_mean + self.log_sigma_std * jax.random.normal(key, (batch,))
        else:
            u = (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
            low, high = self._log_sigma_cosine(u, self.low_side), self._log_sigma_cosine(u, self.high_side or self.image_side)
            log_sigma = low + u * (high - low)
        return jnp.exp((log_sigma - math.log(self.sigma_max)) / self.rho)

    def _log_sigma_cosine(self, u: jax.Array, side: int | None) -> jax.Array:
        """ln(sigma) of the cosine schedule shifted to images of `side`; u = 0 is noise, u = 1 is data."""
        assert side is not None and self.image_side is not None
        ratio = side / self.image_side / self.sigma_data
        last = math.atan(min(self.sigma_min, LEAST_SIGMA) * ratio)
        rest = math.atan(1 / (max(self.sigma_max, LARGEST_SIGMA) * ratio))  # pi / 2 less the first angle
        span = math.pi / 2 - rest - last
        angle, other = last + (1 - u) * span, rest + u * span  # they add up to pi / 2; each is precise where it is small
        log_tan = jnp.where(angle < other, jnp.log(jnp.tan(angle)), -jnp.log(jnp.tan(other)))
        return log_tan - math.log(ratio)

    def network_time(self, t: ArrayLike) -> jax.Array:
        """c_noise = ln(sigma) / 4."""
        return (math.log(self.sigma_max) + self.rho * jnp.log(jnp.asarray(t))) / 4

    def network_input(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        """c_in x_t."""
        return x_t / expand(self._norm(t), x_t)

    def _norm(self, t: ArrayLike) -> jax.Array:
        """The standard deviation of x_t."""
        return jnp.hypot(self.sigma(jnp.asarray(t)), self.sigma_data)

    def perturb(self, x0: jax.Array, noise: jax.Array, t: ArrayLike) -> jax.Array:
        return x0 + expand(self.sigma(jnp.asarray(t)), x0) * noise

    def start(self, noise: jax.Array, t: ArrayLike) -> jax.Array:
        return self.sigma(t) * noise

    def predict(self, output: jax.Array, x_t: jax.Array, t: ArrayLike) -> Prediction:
        sigma, norm = expand(self.sigma(jnp.asarray(t)), x_t), expand(self._norm(t), x_t)
        skip, out = jnp.square(self.sigma_data / norm), self.sigma_data / norm  # c_skip; c_out / sigma
        return Prediction(skip * x_t + sigma * out * output, sigma / jnp.square(norm) * x_t - out * output, 0.0)

    def loss(
        self, output: jax.Array, x0: jax.Array, noise: jax.Array, t: ArrayLike, weight: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Squared error of F, whose target is (x0 - c_skip x_t) / c_out, times the weight of `loss_weight`.

        Returns:
            (f32[B], {"mse": f32[B]}); "mse" has no weight of `loss_weight`.

        Source: Karras et al. 2022, equation 8.
        """
        t = jnp.asarray(t)
        sigma, norm = self.sigma(t), self._norm(t)
        target = (expand(sigma / self.sigma_data, x0) * x0 - self.sigma_data * noise) / expand(norm, x0)
        mse = mean_over_example(jnp.square(target - output), weight)
        weights: dict[str, jax.Array | float] = {
            "edm": 1.0,
            "soft_min_snr": jnp.square(sigma * self.sigma_data / jnp.square(norm)),
            "snr": jnp.square(self.sigma_data / norm),
        }
        return mse * weights[self.loss_weight], {"mse": mse}

    def grid(self, num_steps: int, spacing: str = "even") -> np.ndarray:
        """The times of Karras's grid: num_steps even times from sigma_max to sigma_min, then 0 (EDM, equation 5).

        Raises:
            UserError: fewer than one step, or a spacing of discrete timesteps.
        """
        if num_steps < 1:
            raise UserError(f"the number of sampling steps is {num_steps}; it must be at least 1")
        if spacing != "even":
            raise UserError(f"spacing {spacing!r} selects discrete timesteps, which process 'edm' does not have; use 'even'")
        return np.append(np.linspace(1, self.min_time, num_steps), 0.0)

    def alpha_sigma(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        times = np.asarray(times, np.float64)
        return np.ones_like(times), self.sigma(times)

    def time_of(self, ratio: np.ndarray) -> np.ndarray:
        return (np.asarray(ratio) / self.sigma_max) ** (1 / self.rho)

    def ode(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """d x / d sigma = noise (EDM, equation 1 with sigma(t) = t)."""
        return self.alpha_sigma(times)

    def slope(self, prediction: Prediction, t: ArrayLike) -> jax.Array:
        return prediction.noise
