"""Samplers of EDM and k-diffusion that add new noise in every step, for every process.

In terms of x / alpha and sigma / alpha, every process adds noise to the data as EDM does; these samplers are written so.
"""

from dataclasses import dataclass

import jax
import numpy as np

from dit_jax.diffusion.process import Denoise, Process, noise_like
from dit_jax.diffusion.samplers.frame import scan_steps
from dit_jax.diffusion.samplers.ode import heun_steps
from dit_jax.errors import UserError

SOLVERS = ("midpoint", "heun")
CURVATURES = {"k_diffusion": 1.0, "taylor": 2.0}
LARGEST_CHURN = 2**0.5 - 1


@dataclass(frozen=True)
class StochasticHeun:
    """Heun's method that first raises the noise level of each step by the factor 1 + gamma with new noise ("churn").

    gamma = min(s_churn / num_steps, sqrt(2) - 1) at noise levels sigma / alpha from s_tmin to s_tmax, and 0 elsewhere. With
    s_churn 0 it is `Heun`. A process with timesteps rises to the nearest one; where it has no more noise (t = 1 of gaussian and
    flow), nothing is added. Started late, a step adds what it adds in the full run.

    Fields:
        num_steps: steps from noise to data.
        s_churn: amount of noise that is added over all steps; EDM's ImageNet samples have 40 at 256 steps.
        s_tmin, s_tmax: noise levels between which noise is added; 0.05 and 50 there.
        s_noise: standard deviation of the added noise; 1.003 there.

    Source: Karras et al. 2022 (EDM), algorithm 2 and table 5.
    """

    num_steps: int = 25
    s_churn: float = 40.0
    s_tmin: float = 0.0
    s_tmax: float = float("inf")
    s_noise: float = 1.0

    def __post_init__(self):
        for name in ("s_churn", "s_tmin", "s_noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"sampler.{name} is {getattr(self, name)}; it must be at least 0 and finite")
        if not self.s_tmin <= self.s_tmax:
            raise UserError(f"sampler.s_tmin is {self.s_tmin} and sampler.s_tmax {self.s_tmax}; s_tmin <= s_tmax is required")

    def evaluations(self, process: Process) -> int:
        return 2 * self.num_steps - (process.min_time > 0)

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps)

    def raised(self, process: Process, times: np.ndarray) -> np.ndarray:
        """float64[N]: the time to which each of the N times is raised."""
        alpha, sigma = process.alpha_sigma(times)
        level = sigma / np.where(alpha > 0, alpha, 1)
        total = self.num_steps + getattr(process, "skipped", 0)  # of the full run, see `late.LastSteps`
        gamma = min(self.s_churn / total, LARGEST_CHURN)
        churned = (alpha > 0) & (self.s_tmin <= level) & (level <= self.s_tmax) & (gamma > 0)
        return np.where(churned, np.maximum(process.time_of((1 + gamma) * level), times), times)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        raised = self.raised(process, times[:-1])
        (alpha, sigma), (alpha_raised, sigma_raised) = process.alpha_sigma(times[:-1]), process.alpha_sigma(raised)
        keep = np.where(raised > times[:-1], alpha_raised / np.where(alpha > 0, alpha, 1), 1.0)
        added = np.sqrt(np.maximum(sigma_raised**2 - (keep * sigma) ** 2, 0))

        def churn(x, c):
            return c["keep"] * x + c["added"] * noise_like(keys, x.shape[1:], c["step"])

        return heun_steps(process, denoise, noise, times, raised, churn, {"keep": keep, "added": self.s_noise * added})


def history_of(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(h_1, h_2), float64[N]: the steps in lambda before each step of h [N], and before that; infinite where there is none."""
    padded = np.concatenate([[np.inf, np.inf], h])
    return padded[1:-1], padded[:-2]


def sde_rows(process: Process, times: np.ndarray, eta: float, s_noise: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(rows {"t", "from_x", "from_x0", "deviation"}, h), float64[N], of the first-order step of the reverse SDE in lambda.

    lambda = log(alpha / sigma) rises by h. The step is exact for a constant x0: x_s = sigma_s / sigma_t e^(-eta h) x_t +
    alpha_s (1 - e^(-(1 + eta) h)) x0 + sigma_s sqrt(1 - e^(-2 eta h)) z.
    """
    alpha, sigma = process.alpha_sigma(times)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))  # infinite at alpha = 0 and at sigma = 0
    noisy = eta * h if eta else np.zeros_like(h)
    rows = {
        "t": times[:-1],
        "from_x": sigma[1:] / sigma[:-1] * np.exp(-noisy),
        "from_x0": -alpha[1:] * np.expm1(-h - noisy),
        "deviation": s_noise * sigma[1:] * np.sqrt(-np.expm1(-2 * noisy)),
    }
    return rows, h


def check_noise(eta: float, s_noise: float) -> None:
    """Raises a UserError unless eta and s_noise are at least 0 and finite."""
    for name, value in (("eta", eta), ("s_noise", s_noise)):
        if not 0 <= value < float("inf"):
            raise UserError(f"sampler.{name} is {value}; it must be at least 0 and finite")


def phi_2(h: np.ndarray) -> np.ndarray:
    """1 - (1 - e^-h) / h; 1 at infinity."""
    return 1 + np.expm1(-h) / h


@dataclass(frozen=True)
class DPMSolverPlusPlus2MSDE:
    """DPM-Solver++(2M) on the reverse SDE: linear extrapolation of x0 from the last two steps, one evaluation per step.

    The first and the last step are of first order. With eta 0 and "midpoint" it is `DPMSolverPlusPlus2M`.

    Fields:
        num_steps: steps from noise to data.
        eta: amount of noise: 0 is the ODE, 1 the reverse SDE.
        s_noise: standard deviation of the noise of each step, times that of the SDE.
        solver: weight of the extrapolation, one of SOLVERS.

    Source: Lu et al. 2022 (DPM-Solver++), section 6 and algorithm 3; k-diffusion's `sample_dpmpp_2m_sde`.
    """

    num_steps: int = 25
    eta: float = 1.0
    s_noise: float = 1.0
    solver: str = "midpoint"

    def __post_init__(self):
        check_noise(self.eta, self.s_noise)
        if self.solver not in SOLVERS:
            raise UserError(f"sampler.solver is {self.solver!r}; it must be one of {', '.join(SOLVERS)}")

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        rows, h = sde_rows(process, times, self.eta, self.s_noise)
        before, _ = history_of(h)
        alpha, _ = process.alpha_sigma(times)
        known = np.isfinite(h) & np.isfinite(before)
        h, before = np.where(known, h, 1), np.where(known, before, 1)
        exponent = (1 + self.eta) * h
        weight = -np.expm1(-exponent) / 2 if self.solver == "midpoint" else phi_2(exponent)
        rows["slope"] = np.where(known, alpha[1:] * weight * h / before, 0)

        def step(carry, c):
            x, x0_before, memory = carry
            prediction, memory = denoise(x, c["t"], memory)
            x0 = prediction.x0
            x = c["from_x"] * x + c["from_x0"] * x0 + c["slope"] * (x0 - x0_before)
            if self.eta:
                x = x + c["deviation"] * noise_like(keys, x.shape[1:], c["step"])
            return x, x0, memory

        return scan_steps(step, (noise, noise * 0, denoise.init(noise)), rows)[0]


@dataclass(frozen=True)
class DPMSolverPlusPlus3MSDE:
    """DPM-Solver++(3M) on the reverse SDE: x0 as a parabola through the last three steps, one evaluation per step.

    The first and the last step are of first order, the second is of second order. The published formula takes half of the second
    derivative of x0. With eta 0 it has order 2, and a small error at few steps; with the Taylor series of the parabola it has
    order 3.

    Fields:
        num_steps: steps from noise to data.
        eta: amount of noise: 0 is the ODE, 1 the reverse SDE.
        s_noise: standard deviation of the noise of each step, times that of the SDE.
        curvature: one of CURVATURES: "k_diffusion" is the published formula, "taylor" has the second derivative twice as large.

    Source: k-diffusion's `sample_dpmpp_3m_sde`, with which HDiT is sampled (Crowson et al. 2024).
    """

    num_steps: int = 25
    eta: float = 1.0
    s_noise: float = 1.0
    curvature: str = "k_diffusion"

    def __post_init__(self):
        check_noise(self.eta, self.s_noise)
        if self.curvature not in CURVATURES:
            raise UserError(f"sampler.curvature is {self.curvature!r}; it must be one of {', '.join(CURVATURES)}")

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        rows, h = sde_rows(process, times, self.eta, self.s_noise)
        alpha, _ = process.alpha_sigma(times)
        rows["newer"], rows["older"] = (
            alpha[1:] * weight for weight in parabola_weights(h, self.eta, CURVATURES[self.curvature])
        )

        def step(carry, c):
            x, newer, x0_before, memory = carry  # newer: x0 of the last step less that of the step before
            prediction, memory = denoise(x, c["t"], memory)
            x0, older = prediction.x0, newer
            newer = x0 - x0_before
            x = c["from_x"] * x + c["from_x0"] * x0 + c["newer"] * newer + c["older"] * older
            if self.eta:
                x = x + c["deviation"] * noise_like(keys, x.shape[1:], c["step"])
            return x, newer, x0, memory

        zeros = noise * 0
        return scan_steps(step, (noise, zeros, zeros, denoise.init(noise)), rows)[0]


def parabola_weights(h: np.ndarray, eta: float, curvature: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights, float64[N], on (x0 now - x0 before) and on the same difference one step earlier; 0 where there is none."""
    h_1, h_2 = history_of(h)
    first = np.isfinite(h) & np.isfinite(h_1)
    second = first & np.isfinite(h_2)
    h, h_1, h_2 = np.where(first, h, 1), np.where(first, h_1, 1), np.where(second, h_2, 1)
    exponent = (1 + eta) * h
    slope = phi_2(exponent)
    bend = curvature * (slope / exponent - 0.5)
    newer, older = h / h_1, -h / h_2
    span = np.where(second, h / (h_1 + h_2), 0)
    lead = np.where(second, h_1 / (h_1 + h_2), 0)
    share = slope * lead - bend * span
    return np.where(first, newer * (slope + share), 0), np.where(second, older * share, 0)
