"""Sampling with fewer runs of the network's blocks: what they add is forecast from earlier steps by a Taylor series.

B rows of the network's batch, N tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.diffusion.process import Denoise, Network
from dit_jax.errors import UserError


class Memory(NamedTuple):
    """What is known of the blocks' sum at the last full step.

    Fields:
        terms: float32[order + 1, B, N, D], its derivatives by t from order 0 on, by backward differences.
        t: float32, the time of that step.
        count: int32, full steps so far.
    """

    terms: jax.Array
    t: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which nobody calls


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

    def is_full(self, step):
        """Whether the blocks run at this step (0, 1, ...)."""
        return (step < self.warmup_steps) | ((step - self.warmup_steps + 1) % self.interval == 0)

    def learn(self, memory: Memory, residual, t) -> Memory:
        """The memory after a full step at t whose blocks added `residual` [B, N, D]."""
        terms = [residual.astype(jnp.float32)]
        for order in range(self.order):
            known = memory.count > order  # as many differences as there were full steps before this one
            slope = (terms[-1] - memory.terms[order]) / jnp.where(known, t - memory.t, 1.0)
            terms.append(jnp.where(known, slope, 0.0))
        return Memory(jnp.stack(terms), t, memory.count + 1)

    def predict(self, memory: Memory, t):
        """What the blocks would add at t, float32[B, N, D]."""
        weights, weight = [], jnp.ones((), jnp.float32)
        for order in range(self.order + 1):
            weights.append(weight)
            weight = weight * (t - memory.t) / (order + 1)
        return jnp.tensordot(jnp.stack(weights), memory.terms, axes=1)


@dataclass(frozen=True)
class ForecastingDenoise:
    """A `Denoise` whose blocks run at some steps only; `scan_steps` carries what it remembers.

    Fields:
        run: (x, network time, cond) -> (the network's output, what its blocks added [B, N, D]).
        run_head: (x, network time, cond, what the blocks add) -> the network's output, without the blocks.
        denoise_with: binds condition and guidance to a network, which it calls once.
    """

    forecast: Forecast
    run: Callable
    run_head: Callable
    denoise_with: Callable[[Network], Denoise]

    def __call__(self, x, t):
        """Runs the blocks and remembers nothing: for a call outside of the loop."""
        return self.denoise_with(lambda *args: self.run(*args)[0])(x, t)

    def start(self, x) -> Memory:
        """An empty memory for samples like x."""
        found = []

        def probe(*args):
            output, residual = self.run(*args)
            found.append(residual.shape)
            return output

        jax.eval_shape(self.denoise_with(probe), x, jnp.ones((), x.dtype))
        return Memory(jnp.zeros((self.forecast.order + 1, *found[0])), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def at(self, memory: Memory, step) -> "OneStep":
        return OneStep(self, memory, step)


class OneStep:
    """The `Denoise` of one step, to be called once; then `memory` is what the next step needs.

    Raises:
        UserError: called again, by a sampler that evaluates the network several times a step.
    """

    def __init__(self, denoise: ForecastingDenoise, memory: Memory, step):
        self._denoise, self.memory, self._step, self._called = denoise, memory, step, False

    def __call__(self, x, t):
        if self._called:
            raise UserError(
                "forecast.interval is above 1 and the sampler evaluates the network several times a step; choose one "
                "evaluation a step, as ddim, ddpm or dpmpp, or set the interval to 1"
            )
        self._called = True
        forecast, before = self._denoise.forecast, self.memory

        def network(x, time, cond):
            def full():
                output, residual = self._denoise.run(x, time, cond)
                return output, forecast.learn(before, residual, t)

            def forecasted():
                return self._denoise.run_head(x, time, cond, forecast.predict(before, t)), before

            output, self.memory = jax.lax.cond(forecast.is_full(self._step), full, forecasted)
            return output

        return self._denoise.denoise_with(network)(x, t)
