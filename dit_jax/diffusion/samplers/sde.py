"""Euler-Maruyama on the reverse SDE of a continuous process."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Denoise, Process, noise_like
from dit_jax.diffusion.samplers.frame import require_continuous, scan_steps
from dit_jax.errors import UserError

# w(t) by name, from (t, coefficients, norm). SiT writes them in its time 1 - t (Ma et al. 2024, table 2; path.py).
DIFFUSIONS = {
    "constant": lambda t, c, norm: norm * np.ones_like(t),
    "sbdm": lambda t, c, norm: norm * (c.sigma * c.sigma_rate - c.sigma**2 * c.alpha_rate / c.alpha),
    "sigma": lambda t, c, norm: norm * c.sigma,
    "linear": lambda t, c, norm: norm * t,
    "decreasing": lambda t, c, norm: 0.25 * (1 - norm * np.cos(np.pi * t)) ** 2,
    "increasing_decreasing": lambda t, c, norm: norm * np.sin(np.pi * t) ** 2,
}
LAST_STEPS = ("mean", "tweedie", "euler", "none")
SBDM_MARGIN = 1e-3  # SiT's sample_eps


@dataclass(frozen=True)
class EulerMaruyama:
    """dx = (velocity + w score) ds + sqrt(2 w) dW over s = 1 - t, then one last step without noise.

    The marginals are the same for every w >= 0; w sets how much noise each step adds.

    Fields:
        num_steps: evaluations: num_steps - 1 equal steps (before the process's shift) from t = 1 to last_step_size and the last
            step; without a last step all are equal, down to t = 0.
        diffusion: w(t), one of DIFFUSIONS. "sbdm" is infinite at t = 1 and so starts at 1 - SBDM_MARGIN.
        norm: the scale of w.
        last_step: one of LAST_STEPS: "mean" is the drift without noise, "tweedie" the predicted x0, "euler" a step of the ODE.
        last_step_size: t at which the last step begins.

    Source: Ma et al. 2024 (SiT), equation 4 and table 2; grids and last steps as in its code.
    """

    num_steps: int = 250
    diffusion: str = "sigma"
    norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04

    def __post_init__(self):
        for name, allowed in (("diffusion", DIFFUSIONS), ("last_step", LAST_STEPS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"sampler.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.norm < 0:
            raise UserError(f"sampler.norm is {self.norm}; it must be at least 0")
        if self.last_step != "none" and not 0 < self.last_step_size < 1:
            raise UserError(
                f"sampler.last_step_size is {self.last_step_size}; it must lie between 0 and 1, or set sampler.last_step to none"
            )
        if self.num_steps < 1 + (self.last_step != "none"):
            raise UserError(f"sampler.num_steps is {self.num_steps}; it must be at least 2, or 1 if sampler.last_step is none")

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def times(self, process: Process) -> np.ndarray:
        """float64 times of the noisy steps, descending; the last step starts at the last of them."""
        margin = SBDM_MARGIN if self.diffusion == "sbdm" else 0.0
        end, steps = (margin, self.num_steps) if self.last_step == "none" else (self.last_step_size, self.num_steps - 1)
        return end + (1 - margin - end) * process.grid(steps)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        require_continuous(process, "sde")
        if process.alpha_sigma(np.ones(1)) != (0, 1):
            raise UserError(
                f"sampler 'sde' needs a process that interpolates between noise and data, such as 'flow', and process "
                f"{type(process).__name__.lower()!r} adds noise to the data; choose heun_sde, dpmpp_2m_sde or dpmpp_3m_sde"
            )
        times = self.times(process)
        noisy = times[:-1] if self.last_step == "none" else times
        c = process.coefficients(noisy, np)  # type: ignore[attr-defined]  # of a continuous process
        w = DIFFUSIONS[self.diffusion](times[: len(c.sigma)], c, self.norm)
        size = -np.diff(times)
        score_of_noise = -w / c.sigma  # w score = score_of_noise * noise

        def step(carry, c):
            x, memory = carry
            prediction, memory = denoise(x, c["t"], memory)
            drift = process.slope(prediction, c["t"]) + c["score_of_noise"] * prediction.noise
            return x + c["size"] * drift + c["deviation"] * noise_like(keys, x.shape[1:], c["step"]), memory

        x, memory = scan_steps(
            step,
            (noise, denoise.init(noise)),
            {
                "t": times[:-1],
                "size": size,
                "score_of_noise": score_of_noise[: len(size)],
                "deviation": np.sqrt(2 * w[: len(size)] * size),
            },
        )
        if self.last_step == "none":
            return x
        t = jnp.asarray(times[-1], x.dtype)
        prediction, _ = denoise(x, t, memory)
        if self.last_step == "tweedie":
            return prediction.x0
        drift = process.slope(prediction, t)
        if self.last_step == "mean":
            drift = drift + score_of_noise[-1] * prediction.noise
        return x + times[-1] * drift
