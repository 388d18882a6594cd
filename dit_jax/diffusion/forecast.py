"""Sampling with fewer runs of the network's blocks: what they add is forecast from earlier steps by a Taylor series.

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
    """What is known of the blocks' sum.

    Fields:
        terms: float32[order + 1, B, N, D], the derivatives by t at the last full call, by backward differences.
        t: float32, the time of the last full call.
        count: int32, full calls so far.
        calls: int32, all calls so far.
    """

    terms: jax.Array
    t: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    calls: jax.Array


@dataclass(frozen=True)
class Forecast:
    """At which steps the blocks run, and how far the series goes.

    Embeddings and the final layer, which see x_t, t and the condition, run at every step; the blocks at the first
    `warmup_steps` and then at every `interval`-th. In between, what they would add to the tokens is extrapolated. That is one
    tensor per order, where a series for each sub-layer costs 2 x depth of them.

    Fields:
        interval: 1 runs the blocks at every step: forecasting is off.
        order: 0 repeats the last sum, 1 draws a line through two, and so on.
        warmup_steps: at least 1.

    Source: Liu et al. 2025 (TaylorSeer, arXiv 2503.06923), section 3, there for each sub-layer and over step numbers; here over
    t, so that uneven grids are right, and for the sum of all blocks.
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
        """How many of so many steps run the blocks."""
        return min(num_steps, self.warmup_steps) + max(0, num_steps - self.warmup_steps) // self.interval

    def is_full(self, step: jax.Array) -> jax.Array:
        """Whether the blocks run at this call (0, 1, ...)."""
        return (step < self.warmup_steps) | ((step - self.warmup_steps + 1) % self.interval == 0)

    def learn(self, memory: Memory, residual: jax.Array, t: jax.Array) -> Memory:
        """The memory after a full step at t whose blocks added `residual` [B, N, D]."""
        terms = [residual.astype(jnp.float32)]
        for order in range(self.order):
            known = memory.count > order  # as many differences as there were full steps before this one
            slope = (terms[-1] - memory.terms[order]) / jnp.where(known, t - memory.t, 1.0)
            terms.append(jnp.where(known, slope, 0.0))
        return Memory(jnp.stack(terms), t, memory.count + 1, memory.calls)

    def predict(self, memory: Memory, t: jax.Array) -> jax.Array:
        """What the blocks would add at t, float32[B, N, D]."""
        weights, weight = [], jnp.ones((), jnp.float32)
        for order in range(self.order + 1):
            weights.append(weight)
            weight = weight * (t - memory.t) / (order + 1)
        return jnp.tensordot(jnp.stack(weights), memory.terms, axes=1)


@dataclass(frozen=True)
class ForecastingDenoise:
    """A `Denoise` that runs the network's blocks at some calls only and forecasts what they add at the others.

    Fields:
        run: (x, network time, cond) -> (the network's output, what its blocks added [B, N, D]).
        run_head: (x, network time, cond, what the blocks add) -> the network's output, without the blocks.
        denoise_with: binds condition and guidance to a network, which it calls once.
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
