"""From noise to data in one `lax.scan` over the time grid.

A sampler is a frozen dataclass, called with (process, denoise, noise f32[B, ...], keys [B]) -> x0 f32[B, ...].
`denoise(x_t, t)` has the network, its parameters, the condition and the guidance bound (`process.Denoise`).
Coefficients are derived in float64 before the scan. One key per example: example k is the same in any batch.

In the comments and names: now = t, next = the following, less noisy time s of the grid.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Denoise, Process, noise_like
from dit_jax.errors import UserError


def scan_steps(step, x, coefficients: dict[str, np.ndarray]):
    """Runs step(carry, c) over the rows of the coefficients, each float32, plus c["step"], the row's number."""
    rows = {name: jnp.asarray(values, jnp.float32) for name, values in coefficients.items()}
    rows["step"] = jnp.arange(len(rows["t"]))
    x, _ = jax.lax.scan(lambda carry, c: (step(carry, c), None), x, rows)
    return x


def posterior_variance(alpha, sigma):
    """(ratio, beta, variance) of the steps of a grid, float64[N]: ratio = alpha_t / alpha_s, beta = sigma_t^2 - ratio^2
    sigma_s^2 the variance of q(x_t | x_s), variance = beta sigma_s^2 / sigma_t^2 that of q(x_s | x_t, x0).

    Source: Kingma et al. 2021 (VDM), equations 20 to 26; Ho et al. 2020, equation 7.
    """
    ratio = alpha[:-1] / alpha[1:]
    beta = sigma[:-1] ** 2 - ratio**2 * sigma[1:] ** 2
    return ratio, beta, beta * sigma[1:] ** 2 / sigma[:-1] ** 2


@dataclass(frozen=True)
class Ancestral:
    """DDPM's sampler over any subset of the timesteps: draws x_s from q(x_s | x_t, predicted x0) with the predicted variance.

    Source: Ho et al. 2020, algorithm 2; respaced and with learned variance as in Nichol & Dhariwal 2021, section 4.
    """

    num_steps: int = 250

    def __call__(self, process: Process, denoise: Denoise, noise, keys):
        times = process.grid(self.num_steps)
        alpha, sigma = process.alpha_sigma(times)
        ratio, beta, variance = posterior_variance(alpha, sigma)
        # The last step has variance 0; it is never used, because that step adds no noise.
        log_small = np.log(np.append(variance[:-1], variance[-2] if self.num_steps > 1 else beta[-1]))

        def step(x, c):
            prediction = denoise(x, c["t"])
            mean = c["from_x"] * x + c["from_x0"] * prediction.x0
            fraction = prediction.variance_fraction
            log_variance = fraction * c["log_large"] + (1 - fraction) * c["log_small"]
            z = noise_like(keys, x.shape[1:], c["step"])
            return mean + c["noisy"] * jnp.exp(0.5 * log_variance) * z

        return scan_steps(step, noise, {
            "t": times[:-1],
            "from_x": ratio * sigma[1:] ** 2 / sigma[:-1] ** 2,
            "from_x0": alpha[1:] * beta / sigma[:-1] ** 2,
            "log_small": log_small,
            "log_large": np.log(beta),
            "noisy": times[1:] > 0,
        })


@dataclass(frozen=True)
class DDIM:
    """DDIM: x_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) noise + d z, with d = eta times the posterior's deviation.

    Fields:
        eta: 0 is deterministic; 1 is the ancestral sampler with the small variance.

    Source: Song et al. 2021, equations 12 and 16.
    """

    num_steps: int = 50
    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"DDIM eta is {self.eta}; it must lie in [0, 1]")

    def __call__(self, process: Process, denoise: Denoise, noise, keys):
        times = process.grid(self.num_steps)
        alpha, sigma = process.alpha_sigma(times)
        deviation = self.eta * np.sqrt(posterior_variance(alpha, sigma)[2])

        def step(x, c):
            prediction = denoise(x, c["t"])
            x = c["alpha_next"] * prediction.x0 + c["direction"] * prediction.noise
            if self.eta:
                x = x + c["deviation"] * noise_like(keys, x.shape[1:], c["step"])
            return x

        return scan_steps(step, noise, {
            "t": times[:-1],
            "alpha_next": alpha[1:],
            "direction": np.sqrt(sigma[1:] ** 2 - deviation**2),
            "deviation": deviation,
        })
