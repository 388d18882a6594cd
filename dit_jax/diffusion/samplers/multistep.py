"""Few-step samplers that expand the predicted x0 in half the log signal-to-noise ratio, lambda = log(alpha / sigma).

With h the step in lambda, the exact solution is x_s = sigma_s / sigma_t x_t + alpha_s * integral of e^(lambda - lambda_s) x0;
the samplers differ in how they extrapolate x0.
lambda is -inf at a flow's t = 1 and +inf at t = 0, so coefficients are written in 1 / h, which may be 0.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Denoise, Process
from dit_jax.diffusion.samplers.frame import scan_steps


def log_snr_steps(process: Process, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(alpha, sigma [N + 1], h [N], ratio [N]) in float64; ratio = h over the h of the step before, 0 for the first step."""
    alpha, sigma = process.alpha_sigma(times)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))
    ratio = np.zeros_like(h)
    ratio[1:-1] = h[1:-1] / h[:-2]  # the last step, whose h is infinite, is of first order: 0 as well
    return alpha, sigma, h, ratio


@dataclass(frozen=True)
class DPMSolverPlusPlus2M:
    """DPM-Solver++(2M): a line through this x0 and the one before; one evaluation a step, order 2.

    The first and the last step are of first order (DDIM's).

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    num_steps: int = 20

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = process.grid(self.num_steps)
        alpha, sigma, h, ratio = log_snr_steps(process, times)

        def step(carry, c):
            x, x0_before, memory = carry
            prediction, memory = denoise(x, c["t"], memory)
            x0 = prediction.x0
            x = c["from_x"] * x + c["from_x0"] * (x0 + c["extrapolate"] * (x0 - x0_before))
            return x, x0, memory

        x, *_ = scan_steps(
            step,
            (noise, jnp.zeros_like(noise), denoise.init(noise)),
            {
                "t": times[:-1],
                "from_x": sigma[1:] / sigma[:-1],
                "from_x0": -alpha[1:] * np.expm1(-h),
                "extrapolate": ratio / 2,
            },
        )
        return x


@dataclass(frozen=True)
class UniPC:
    """UniPC of order 2 with B(h) = e^h - 1 ("bh2"): DPM-Solver++(2M)'s step, corrected at the next evaluation by its x0.

    One evaluation a step: the x0 of the predicted x serves to correct x and to predict on from it.

    Source: Zhao et al. 2023, section 3, with data prediction.
    """

    num_steps: int = 20

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = process.grid(self.num_steps)
        alpha, sigma, h, ratio = log_snr_steps(process, times)
        from_x, from_x0 = sigma[1:] / sigma[:-1], -alpha[1:] * np.expm1(-h)
        to_before, to_now = corrector_weights(h, ratio)

        def step(carry, c):
            predicted, corrected, x0_now, x0_before, memory = carry  # of the step before this one
            prediction, memory = denoise(predicted, c["t"], memory)
            x0 = prediction.x0
            target = x0_now + c["to_before"] * (x0_before - x0_now) + c["to_now"] * (x0 - x0_now)
            x = jnp.where(c["step"] > 0, c["last_from_x"] * corrected + c["last_from_x0"] * target, predicted)
            predicted = c["from_x"] * x + c["from_x0"] * (x0 + c["extrapolate"] * (x0 - x0_now))
            return predicted, x, x0, x0_now, memory

        nothing = jnp.zeros_like(noise)
        predicted, *_ = scan_steps(
            step,
            (noise, noise, nothing, nothing, denoise.init(noise)),
            {
                "t": times[:-1],
                "from_x": from_x,
                "from_x0": from_x0,
                "extrapolate": ratio / 2,
                "last_from_x": np.append(0.0, from_x[:-1]),
                "last_from_x0": np.append(0.0, from_x0[:-1]),
                "to_before": np.append(0.0, to_before[:-1]),
                "to_now": np.append(0.0, to_now[:-1]),
            },
        )
        return predicted


def corrector_weights(h: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights on (x0 before - x0 now) and (x0 next - x0 now), float64[N], of the corrector of each step.

    The first step is corrected to order 1 with weight 1/2 on the second. Elsewhere the two weights solve UniC's linear system
    for the nodes r = -1 / ratio and 1; the first is divided by r, as the differences are.

    Source: Zhao et al. 2023, section 3.
    """
    b_1 = -1 / h - 1 / np.expm1(-h)
    b_2 = -2 * b_1 / h - 1 / np.expm1(-h)
    first = ratio * (b_2 - b_1) / (1 + ratio)  # of the difference divided by r, with the sign turned
    to_before, to_now = ratio * first, b_1 + first
    to_now[0] = 0.5
    return to_before, to_now
