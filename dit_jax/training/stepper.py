"""The compiled training step with its state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.tasks.state import TrainState


class Stepper:
    """The compiled step with its state and sums, which each call replaces.

    Args:
        compiled: one for each shape of batches.
        order: the number in `compiled` of each step.
    """

    def __init__(
        self,
        compiled: Sequence[Callable[..., Any]],
        zeros: Callable[[], Any],
        state: TrainState,
        constants: Any,
        order: Iterator[int],
    ):
        self.state, self.sums, self._zeros = state, zeros(), zeros
        self._compiled, self._constants, self._order = compiled, constants, order
        self._copy = jax.jit(jnp.copy)  # the next step donates the sums

    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Takes one step; returns a small array of the step that is not donated."""
        compiled = self._compiled[next(self._order)]
        self.state, self.sums = compiled(self.state, self.sums, self._constants, batch)
        return self._copy(self.sums["skipped"])

    def take_sums(self) -> dict[str, jax.Array]:
        """The sums since the last call; resets them to zero."""
        sums, self.sums = self.sums, self._zeros()
        return sums
