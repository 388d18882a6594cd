"""Skips the network's blocks at some sampling steps; a Taylor series forecasts their residual from earlier steps.

B rows of the network's batch, N tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.diffusion.process import Network, Prediction
from dit_jax.errors import UserError


class Memory(NamedTuple):
    """State of a forecast.

    Fields:
        terms: float32[order + 1, B, N, D], the residual of the blocks and its derivatives by t at the last full call, by
            backward differences.
        t: float32, the time of the last full call.
        count: int32, number of full calls so far.
        calls: int32, number of all calls so far.
    """

    terms: jax.Array
    t: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    calls: jax.Array


@dataclass(frozen=True)
class Forecast:
    """Which steps run the blocks, and the order of the Taylor series.

    Embeddings and the final layer, which depend on x_t, t and the condition, run at every step. The blocks run at the first
    `warmup_steps` steps and then at every `interval`-th step. At the other steps their residual, the sum of what all blocks add
    to the tokens, is extrapolated. This stores one tensor per order; a series for each sub-layer would store 2 x depth.

    Fields:
        interval: 1 runs the blocks at every step: forecasting is off.
        order: 0 repeats the last residual, 1 extrapolates linearly from the last two, and so on.
        warmup_steps: at least 1.

    Source: Liu et al. 2025 (TaylorSeer, arXiv 2503.06923), section 3. Its series is for each sub-layer, in the step number; ours
    is for the sum of all blocks, in t, and so correct for uneven grids.
    """

    interval: int = 1
    order: int = 2
    warmup_steps: int = 3

    def __post_init__(self):
        for name, least in (("interval", 1), ("order", 0), ("warmup_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"forecast.{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def active(self) -> bool:
        return self.interval > 1

    def full_steps(self, num_steps: int) -> int:
        """Number of steps that run the blocks, out of num_steps."""
        return min(num_steps, self.warmup_steps) + max(0, num_steps - self.warmup_steps) // self.interval

    def is_full(self, step: jax.Array) -> jax.Array:
        """Whether the blocks run at this call (0, 1, ...)."""
        return (step < self.warmup_steps) | ((step - self.warmup_steps + 1) % self.interval == 0)

    def learn(self, memory: Memory, residual: jax.Array, t: jax.Array) -> Memory:
        """The memory after a full step at t, in which the blocks added `residual` [B, N, D]."""
        terms = [residual.astype(jnp.float32)]
        for order in range(self.order):
            known = memory.count > order  # there are as many differences as earlier full steps
            slope = (terms[-1] - memory.terms[order]) / jnp.where(known, t - memory.t, 1.0)
            terms.append(jnp.where(known, slope, 0.0))
        return Memory(jnp.stack(terms), t, memory.count + 1, memory.calls)

    def predict(self, memory: Memory, t: jax.Array) -> jax.Array:
        """The forecast residual of the blocks at t, float32[B, N, D]."""
        weights, weight = [], jnp.ones((), jnp.float32)
        for order in range(self.order + 1):
            weights.append(weight)
            weight = weight * (t - memory.t) / (order + 1)
        return jnp.tensordot(jnp.stack(weights), memory.terms, axes=1)


@dataclass(frozen=True)
class ForecastingDenoise:
    """A `Denoise` that runs the network's blocks at some calls and forecasts their residual at the others.

    Fields:
        run: (x, network time, cond) -> (the network's output, the residual of its blocks [B, N, D]).
        run_head: (x, network time, cond, residual) -> the network's output; does not run the blocks.
        denoise_with: binds condition and guidance to a network, and calls the network once.
    """

    forecast: Forecast
    run: Callable
    run_head: Callable
    denoise_with: Callable[[Network], Callable[..., Prediction]]

    def init(self, x: jax.Array) -> Memory:
        shapes = []

        def probe(*args):
            output, residual = self.run(*args)
            shapes.append(residual.shape)
            return output

        jax.eval_shape(self.denoise_with(probe), x, jnp.ones((), x.dtype))
        none = jnp.zeros((), jnp.int32)
        return Memory(jnp.zeros((self.forecast.order + 1, *shapes[0])), jnp.zeros(()), none, none)

    def __call__(self, x_t: jax.Array, t: jax.Array, memory: Memory) -> tuple[Prediction, Memory]:
        after = []

        def network(x, time, cond):
            def full():
                output, residual = self.run(x, time, cond)
                return output, self.forecast.learn(memory, residual, t)

            def forecasted():
                return self.run_head(x, time, cond, self.forecast.predict(memory, t)), memory

            output, learned = jax.lax.cond(self.forecast.is_full(memory.calls), full, forecasted)
            after.append(learned)
            return output

        prediction = self.denoise_with(network)(x_t, t)
        (learned,) = after
        return prediction, learned._replace(calls=memory.calls + 1)
