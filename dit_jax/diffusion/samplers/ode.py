"""Fixed-step solvers of a process's ODE, d (x / scale) / d clock = slope. The clock of a flow is time (SiT); that of a
Gaussian process is sigma / alpha (DDIM, EDM)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Denoise, Process
from dit_jax.diffusion.samplers.frame import scan_steps
from dit_jax.errors import UserError


def euler_steps(process: Process, denoise: Denoise, x: jax.Array, times: np.ndarray, evaluated: np.ndarray) -> jax.Array:
    """Euler's method over a grid of times [N + 1] in either direction, from x [B, ...]; returns x at the last time.

    evaluated: [N] times at which the network gives the slope of each step; times[:-1] where the process is defined there.
    """
    scale, clock = process.ode(times)

    def step(carry, c):
        x, memory = carry
        prediction, memory = denoise(x, c["t"], memory)
        return c["from_x"] * x + c["from_slope"] * process.slope(prediction, c["t"]), memory

    x, _ = scan_steps(
        step,
        (x, denoise.init(x)),
        {"t": evaluated, "from_x": scale[1:] / scale[:-1], "from_slope": scale[1:] * np.diff(clock)},
    )
    return x


@dataclass(frozen=True)
class Euler:
    """Euler's method, order 1; on a Gaussian process it is DDIM with eta 0 (Song et al. 2021, section 4.3).

    Fields:
        num_steps: steps from noise to data.
    """

    num_steps: int = 50

    def evaluations(self, process: Process) -> int:
        return self.num_steps

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        return euler_steps(process, denoise, noise, times, times[:-1])


def heun_steps(
    process: Process,
    denoise: Denoise,
    x: jax.Array,
    times: np.ndarray,
    begun: np.ndarray,
    begin: Callable[[jax.Array, Any], jax.Array] = lambda x, c: x,
    rows: Mapping[str, np.ndarray] | None = None,
) -> jax.Array:
    """Heun's method over a grid of times [N + 1] from x [B, ...]; returns x at the last time.

    begun: [N] times at which the steps begin: times[:-1], or where `begin` takes x from there.
    begin: (x, row of coefficients) -> x at the time of `begun`.
    rows: coefficients [N] of `begin`.
    """
    scale, clock = process.ode(times)
    scale_begun, clock_begun = process.ode(begun)

    def step(carry, c):
        x, memory = carry
        x = begin(x, c)

        def slope(x, t, memory):
            prediction, memory = denoise(x, t, memory)
            return process.slope(prediction, t), memory

        first, memory = slope(x, c["t"], memory)
        euler = c["from_x"] * x + c["from_slope"] * first

        def corrected():
            second, after = slope(euler, c["t_next"], memory)
            return c["from_x"] * x + c["from_slope"] * (first + second) / 2, after

        return jax.lax.cond(c["correct"], corrected, lambda: (euler, memory))

    end, _ = scan_steps(
        step,
        (x, denoise.init(x)),
        {
            "t": begun,
            "t_next": times[1:],
            "correct": times[1:] >= process.min_time,
            "from_x": scale[1:] / scale_begun,
            "from_slope": scale[1:] * (clock[1:] - clock_begun),
            **(rows or {}),
        },
    )
    return end


@dataclass(frozen=True)
class Heun:
    """Heun's method, order 2: the mean of the slopes at both ends of a step; two evaluations per step.

    The last step of a process with discrete timesteps, which is not defined at t = 0, is an Euler step.

    Fields:
        num_steps: steps from noise to data.

    Source: Karras et al. 2022 (EDM), algorithm 1; torchdiffeq's "heun2", as SiT uses it.
    """

    num_steps: int = 25

    def evaluations(self, process: Process) -> int:
        return 2 * self.num_steps - (process.min_time > 0)

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        return heun_steps(process, denoise, noise, times, times[:-1])


def integral_weights(nodes: np.ndarray, start: float, end: float) -> np.ndarray:
    """w, so that sum(w * f(nodes)) is the integral from start to end of the polynomial through (nodes, f(nodes)); float64."""
    powers = np.arange(len(nodes))
    u = (np.asarray(nodes) - start) / (end - start)
    return (end - start) * np.linalg.solve(u[None, :] ** powers[:, None], 1 / (powers + 1))


@dataclass(frozen=True)
class AdamsBashforth:
    """Adams-Bashforth of order 2, 3 or 4 with variable steps: extrapolates the last slopes, one evaluation per step.

    The first points are computed with polynomials of increasing degree, which keeps the order: Euler gives point 1; a line
    through slopes 0 and 1 gives points 1 (again) and 2; a parabola gives points 1 to 3. Orders 3 and 4 take 1 and 3 more
    evaluations than steps.
    On a Gaussian process it is DEIS's rho-AB (Zhang & Chen 2023).

    Fields:
        num_steps: steps from noise to data.
        order: 2, 3 or 4.

    Source: Hairer, Norsett & Wanner 1993, section III.1 and III.5 (variable steps).
    """

    num_steps: int = 25
    order: int = 2

    def __post_init__(self):
        if self.order not in (2, 3, 4):
            raise UserError(f"sampler.order is {self.order}; it must be 2, 3 or 4")
        if self.num_steps < self.order:
            raise UserError(
                f"sampler.num_steps is {self.num_steps}; Adams-Bashforth of order {self.order} needs at least {self.order}: "
                "take more steps, or a lower order"
            )

    def evaluations(self, process: Process) -> int:
        return self.num_steps + (self.order - 1) * (self.order - 2) // 2

    def schedule(self, clock: np.ndarray) -> tuple[list[tuple[int, np.ndarray, bool]], np.ndarray]:
        """By evaluation: (point of the grid, weights on the slopes of the points that slots 0 .. order - 1 hold, whether the
        point becomes the base of the next); then the weights of the last step."""

        def row(point, first, last, base):
            weights = np.zeros(self.order)
            weights[np.arange(first, last + 1) % self.order] = integral_weights(
                clock[first : last + 1], clock[base], clock[point]
            )
            return weights

        rows = [(0, np.zeros(self.order), False)]
        for sweep in range(1, self.order):
            rows += [(i, row(i, 0, sweep - 1, 0), sweep == i == self.order - 1) for i in range(1, sweep + 1)]
        rows += [(i, row(i, i - self.order, i - 1, i - 1), True) for i in range(self.order, self.num_steps)]
        return rows, row(self.num_steps, self.num_steps - self.order, self.num_steps - 1, self.num_steps - 1)

    def times(self, process: Process) -> np.ndarray:
        """float64[num_steps + 1] descending times, from noise to 0."""
        return process.grid(self.num_steps)

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        times = self.times(process)
        scale, clock = process.ode(times)
        rows, last = self.schedule(clock)
        points, weights, is_base = (np.array(column) for column in zip(*rows, strict=True))

        def step(carry, c):
            base, slopes, memory = carry
            y = base + jnp.tensordot(c["weights"], slopes, axes=1)
            prediction, memory = denoise(c["scale"] * y, c["t"], memory)
            slope = process.slope(prediction, c["t"])
            return jnp.where(c["is_base"], y, base), slopes.at[c["slot"]].set(slope), memory

        slopes = jnp.zeros((self.order, *noise.shape), noise.dtype)
        base, slopes, _ = scan_steps(
            step,
            (noise / scale[0], slopes, denoise.init(noise)),
            {
                "t": times[points],
                "scale": scale[points],
                "weights": weights,
                "is_base": is_base,
                "slot": points % self.order,
            },
        )
        return scale[-1] * (base + jnp.tensordot(jnp.asarray(last, noise.dtype), slopes, axes=1))
