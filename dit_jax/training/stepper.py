"""The compiled training step with its state."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.tasks.state import TrainState


class Stepper:
    """The compiled step with its state and sums, which each call replaces."""

    def __init__(self, compiled: Callable[..., Any], zeros: Callable[[], Any], state: TrainState, constants: Any):
        self.state, self.sums, self._zeros = state, zeros(), zeros
        self._compiled, self._constants = compiled, constants
        self._copy = jax.jit(jnp.copy)  # the next step donates the sums

    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Takes one step; returns a small array of the step that is not donated."""
        self.state, self.sums = self._compiled(self.state, self.sums, self._constants, batch)
        return self._copy(self.sums["skipped"])

    def take_sums(self) -> dict[str, jax.Array]:
        """The sums since the last call; resets them to zero."""
        sums, self.sums = self.sums, self._zeros()
        return sums
