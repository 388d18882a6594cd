"""An adaptive solver of a continuous process's ODE."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.flow import Coefficients, velocity_of
from dit_jax.diffusion.process import Denoise, Process, expand
from dit_jax.diffusion.samplers.frame import require_continuous
from dit_jax.errors import UserError

# Row i gives stage i + 1 from the slopes of stages 0 .. i; the last row is the solution of order 5, whose slope is
# also the first slope of the next step (FSAL). Dormand & Prince 1980, table 2.
NODES = np.array([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
STAGES = np.array(
    [
        [1 / 5, 0, 0, 0, 0, 0, 0],
        [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
        [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
    ]
)
FOURTH_ORDER = np.array([5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40])
FIRST_STEP, SHORTEST_STEP = 1e-2, 1e-4


@dataclass(frozen=True)
class DormandPrince:
    """Dormand-Prince 5(4). Step control keeps the RMS error of a step over an example below atol + rtol |x|.

    Every example has its own step sizes, so it does not depend on its batch, up to rounding (about 1e-5: step control
    amplifies it). A step takes six evaluations, accepted or rejected, and a batch takes as many steps as its slowest example.
    A step of SHORTEST_STEP is always accepted, which bounds the number of steps. The ODE is d x / d (1 - t) = velocity. A process
    whose network is not defined at t = 0 (edm) is solved to `min_time`; its last step is of Euler.

    Fields:
        rtol, atol: relative and absolute tolerance of the error of a step.

    Source: Dormand & Prince 1980; step control as in Hairer, Norsett & Wanner 1993, section II.4. SiT's default
    is "dopri5" with rtol 1e-3, atol 1e-6 and one error norm over the batch.
    """

    rtol: float = 1e-3
    atol: float = 1e-6

    def __post_init__(self):
        for name in ("rtol", "atol"):
            if not getattr(self, name) > 0:
                raise UserError(f"sampler.{name} is {getattr(self, name)}; it must be positive")

    def evaluations(self, process: Process) -> None:
        return None

    def __call__(self, process: Process, denoise: Denoise, noise: jax.Array, keys: jax.Array) -> jax.Array:
        require_continuous(process, "dopri5")
        stages, nodes, error_weights = (jnp.asarray(a, noise.dtype) for a in (STAGES, NODES, STAGES[-1] - FOURTH_ORDER))

        end = 1 - process.min_time

        def slope(x, s, memory):  # s = 1 - t is f[B]
            prediction, memory = denoise(x, 1 - s, memory)
            c = Coefficients(*(expand(value, x) for value in process.coefficients(1 - s)))  # type: ignore[attr-defined]
            return velocity_of(prediction.x0, prediction.noise, c), memory

        def attempt(state):
            x, s, h, first, memory = state
            h = jnp.minimum(h, end - s)  # 0 for an example that has arrived
            slopes = jnp.zeros((7, *x.shape), x.dtype).at[0].set(first)

            def stage(carry, c):
                slopes, _, memory = carry
                point = x + expand(h, x) * jnp.tensordot(c["weights"], slopes, axes=1)
                new, memory = slope(point, s + c["node"] * h, memory)
                return (slopes.at[c["index"]].set(new), point, memory), None

            rows = {"weights": stages, "node": nodes, "index": jnp.arange(1, 7)}
            (slopes, new, memory), _ = jax.lax.scan(stage, (slopes, x, memory), rows)
            error = expand(h, x) * jnp.tensordot(error_weights, slopes, axes=1)
            relative = error / (self.atol + self.rtol * jnp.maximum(jnp.abs(x), jnp.abs(new)))
            ratio = jnp.sqrt(jnp.mean(jnp.square(relative).reshape(len(x), -1), axis=1))
            # NaN is accepted, so that the loop ends and the result is NaN.
            accept = (ratio <= 1) | (h <= SHORTEST_STEP) | jnp.isnan(ratio)
            factor = jnp.where(jnp.isnan(ratio), 10.0, jnp.clip(0.9 * jnp.maximum(ratio, 1e-10) ** -0.2, 0.2, 10.0))
            return (
                jnp.where(expand(accept, x), new, x),
                jnp.where(accept, s + h, s),
                jnp.maximum(h * factor, SHORTEST_STEP),
                jnp.where(expand(accept, x), slopes[6], first),
                memory,
            )

        start = jnp.zeros(len(noise), noise.dtype)
        first, memory = slope(noise, start, denoise.init(noise))
        state = noise, start, jnp.full_like(start, FIRST_STEP), first, memory
        x, s, *_, memory = jax.lax.while_loop(lambda state: (state[1] < end).any(), attempt, state)
        return x if process.min_time == 0 else denoise(x, 1 - s, memory)[0].x0
