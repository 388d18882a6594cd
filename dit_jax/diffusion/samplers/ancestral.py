"""The samplers of discrete diffusion: ancestral (DDPM), DDIM, and the inversion of DDIM."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Denoise, Process, noise_like
from dit_jax.diffusion.samplers.frame import scan_steps
from dit_jax.diffusion.samplers.ode import euler_steps
from dit_jax.errors import UserError

SPACINGS = ("even", "stride")


def posterior_variance(alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ratio, beta, variance) of the steps of a grid, float64[N]: ratio = alpha_t / alpha_s, beta = sigma_t^2 - ratio^2
    sigma_s^2 the variance of q(x_t | x_s), variance = beta sigma_s^2 / sigma_t^2 that of q(x_s | x_t, x0).

    Source: Kingma et al. 2021 (VDM), equations 20 to 26; Ho et al. 2020, equation 7.
    """
    ratio = alpha[:-1] / alpha[1:]
    beta = sigma[:-1] ** 2 - ratio**2 * sigma[1:] ** 2
    return ratio, beta, beta * sigma[1:] ** 2 / sigma[:-1] ** 2


@dataclass(frozen=True)
class Ancestral:
    """DDPM's sampler over any subset of the timesteps. It draws x_s from q(x_s | x_t, predicted x0) with the predicted variance.

    Fields:
        num_steps: steps from noise to data.
        spacing: "even", or "stride" as in DDIM (`Gaussian.grid`).

    Source: Ho et al. 2020, algorithm 2; respaced and with learned variance as in Nichol & Dhariwal 2021, section 4.
    """

    num_steps: int = 100
    spacing: str = "even"

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps, self.spacing)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        alpha, sigma = process.alpha_sigma(times)
        ratio, beta, variance = posterior_variance(alpha, sigma)
        # The last step has variance 0. Its logarithm is not used: that step adds no noise.
        log_small = np.log(np.append(variance[:-1], variance[-2] if self.num_steps > 1 else beta[-1]))

        def step(carry, c):
            x, memory = carry
            prediction, memory = denoise(x, c["t"], memory)
            mean = c["from_x"] * x + c["from_x0"] * prediction.x0
            fraction = prediction.variance_fraction
            log_variance = fraction * c["log_large"] + (1 - fraction) * c["log_small"]
            z = noise_like(keys, x.shape[1:], c["step"])
            return mean + c["noisy"] * jnp.exp(0.5 * log_variance) * z, memory

        x0, _ = scan_steps(
            step,
            (noise, denoise.init(noise)),
            {
                "t": times[:-1],
                "from_x": ratio * sigma[1:] ** 2 / sigma[:-1] ** 2,
                "from_x0": alpha[1:] * beta / sigma[:-1] ** 2,
                "log_small": log_small,
                "log_large": np.log(beta),
                "noisy": times[1:] > 0,
            },
        )
        return x0


@dataclass(frozen=True)
class DDIM:
    """DDIM: x_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) noise + d z, with d = eta times the posterior's standard deviation.

    Fields:
        num_steps: steps from noise to data.
        eta: 0 is deterministic; 1 is the ancestral sampler with the small variance.
        spacing: "even" steps, both ends included, or "stride", every k-th timestep from the first on, which exists only for some
            num_steps (the paper's code calls it "ddim50"); see `Gaussian.grid`.

    Source: Song et al. 2021, equations 12 and 16.
    """

    num_steps: int = 50
    eta: float = 0.0
    spacing: str = "even"

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"sampler.eta is {self.eta}; it must lie in [0, 1]")
        if self.spacing not in SPACINGS:
            raise UserError(f"sampler.spacing is {self.spacing!r}; it must be one of {', '.join(SPACINGS)}")

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps, self.spacing)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        alpha, sigma = process.alpha_sigma(times)
        deviation = self.eta * np.sqrt(posterior_variance(alpha, sigma)[2])

        def step(carry, c):
            x, memory = carry
            prediction, memory = denoise(x, c["t"], memory)
            x = c["alpha_next"] * prediction.x0 + c["direction"] * prediction.noise
            if self.eta:
                x = x + c["deviation"] * noise_like(keys, x.shape[1:], c["step"])
            return x, memory

        x0, _ = scan_steps(
            step,
            (noise, denoise.init(noise)),
            {
                "t": times[:-1],
                "alpha_next": alpha[1:],
                "direction": np.sqrt(sigma[1:] ** 2 - deviation**2),
                "deviation": deviation,
            },
        )
        return x0


def ddim_invert(process: Process, denoise: Denoise, x0: jax.Array, num_steps: int, spacing: str = "even") -> jax.Array:
    """The noise [B, ...] from which DDIM with eta 0 (or `Euler`) on the same grid returns to about x0 [B, ...].

    Euler's method from t = 0 to t = 1: each step uses the slope at its start. A process with discrete timesteps is not defined
    at t = 0, so its first step uses the slope for x0 at the first timestep.

    Source: Song et al. 2021, section 5.4 and equation 14.
    """
    times = process.grid(num_steps, spacing)[::-1]
    evaluated = np.append(times[1] if process.min_time > 0 else times[0], times[1:-1])
    return euler_steps(process, denoise, x0, times, evaluated)
