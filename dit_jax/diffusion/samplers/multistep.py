"""Samplers for few steps: they integrate the predicted x0 over half the log-SNR, lambda = log(alpha / sigma).

Let h be the step in lambda. The exact solution is x_s = sigma_s / sigma_t x_t + alpha_s * integral of e^(lambda - lambda_s) x0;
the samplers differ in the extrapolation of x0.
lambda is -inf at a flow's t = 1 and +inf at t = 0, so coefficients are written in 1 / h, which may be 0.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Denoise, Process
from dit_jax.diffusion.samplers.frame import scan_steps


def log_snr_steps(process: Process, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(alpha, sigma [N + 1], h [N], ratio [N]) in float64; ratio = h over the previous h, 0 for the first step."""
    alpha, sigma = process.alpha_sigma(times)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))
    return alpha, sigma, h, step_ratio(h)


def step_ratio(h: np.ndarray) -> np.ndarray:
    """h over the previous h, float64[N]; 0 for the first step, and for the last, whose h is infinite: they are of first order."""
    ratio = np.zeros_like(h)
    ratio[1:-1] = h[1:-1] / h[:-2]
    return ratio


@dataclass(frozen=True)
class DPMSolverPlusPlus2M:
    """DPM-Solver++(2M): linear extrapolation of x0 from the last two steps; order 2, one evaluation per step.

    The first and the last step are of first order (DDIM's).

    Fields:
        num_steps: steps from noise to data.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    num_steps: int = 20

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        alpha, sigma, h, _ = log_snr_steps(process, times)

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
                "extrapolate": self.ratio(alpha, sigma) / 2,
            },
        )
        return x

    def ratio(self, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """`step_ratio` of the variable in which x0 is extrapolated: the log-SNR."""
        with np.errstate(divide="ignore"):
            return step_ratio(np.diff(np.log(alpha) - np.log(sigma)))


@dataclass(frozen=True)
class DPMSolverPlusPlus2MSigma(DPMSolverPlusPlus2M):
    """DPM-Solver++(2M) that extrapolates x0 in ln(sigma) in place of the log-SNR; order 2, one evaluation per step.

    On a linear flow it is `dpmpp_2m` of Stable Diffusion 3.5's code, which applies k-diffusion's sampler to a flow's sigma.
    ln(sigma) is finite at t = 1, so the second step of a flow is of second order; with the log-SNR it is of first.

    Fields:
        num_steps: steps from noise to data.

    Source: k-diffusion's `sample_dpmpp_2m`, as sd3.5 calls it.
    """

    def ratio(self, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """`step_ratio` of ln(sigma)."""
        with np.errstate(divide="ignore"):
            return step_ratio(-np.diff(np.log(sigma)))


@dataclass(frozen=True)
class UniPC:
    """UniPC of order 2 with B(h) = e^h - 1 ("bh2"): the step of DPM-Solver++(2M), corrected with the x0 of the next evaluation.

    One evaluation per step: the x0 at the predicted x both corrects x and predicts the next step.

    Fields:
        num_steps: steps from noise to data.

    Source: Zhao et al. 2023, section 3, with data prediction.
    """

    num_steps: int = 20

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        alpha, sigma, h, ratio = log_snr_steps(process, times)
        from_x, from_x0 = sigma[1:] / sigma[:-1], -alpha[1:] * np.expm1(-h)
        to_before, to_now = corrector_weights(h, ratio)

        def step(carry, c):
            predicted, corrected, x0_now, x0_before, memory = carry  # of the previous step
            prediction, memory = denoise(predicted, c["t"], memory)
            x0 = prediction.x0
            target = x0_now + c["to_before"] * (x0_before - x0_now) + c["to_now"] * (x0 - x0_now)
            x = jnp.where(c["step"] > 0, c["last_from_x"] * corrected + c["last_from_x0"] * target, predicted)
            predicted = c["from_x"] * x + c["from_x0"] * (x0 + c["extrapolate"] * (x0 - x0_now))
            return predicted, x, x0, x0_now, memory

        zeros = jnp.zeros_like(noise)
        predicted, *_ = scan_steps(
            step,
            (noise, noise, zeros, zeros, denoise.init(noise)),
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
