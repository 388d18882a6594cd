"""The batches of a run on its mesh, and the save before a run ends for want of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from dit_jax.parallel.mesh import shard_batch
from dit_jax.runtime.console import say
from dit_jax.runtime.signals import StopSignal
from dit_jax.runtime.step_clock import StepClock
from dit_jax.storage.checkpoints import Checkpointer, SaveError
from dit_jax.tasks.state import TrainState


class Batches:
    """An iterator over global batches on the mesh, whose waits are spent on the clock as "data".

    Args:
        batches: of this host, from the first step on.
        meta: stored with a checkpoint.
    Fields:
        before_save: called before the state is saved.
    """

    def __init__(
        self,
        mesh: Mesh,
        batches: Iterator[Any],
        clock: StepClock,
        stop: StopSignal,
        checkpointer: Checkpointer,
        meta: dict[str, Any],
    ):
        self._mesh, self._batches, self._clock, self._stop = mesh, batches, clock, stop
        self._checkpointer, self._meta = checkpointer, meta
        self.before_save: Callable[[], None] = lambda: None

    def __next__(self) -> dict[str, jax.Array]:
        with self._clock.spend("data"):
            return shard_batch(self._mesh, next(self._batches))

    def next_or_none(self, step: int, state: TrainState) -> dict[str, jax.Array] | None:
        """The next batch; None if a signal came while data was waited for. Before this, or an error, the state is saved."""
        try:
            return next(self)
        except Exception as error:
            self._save_before(error, step, state)
            if not self._stop.asked:
                raise
            return None

    def _save_before(self, error: Exception, step: int, state: TrainState) -> None:
        """Saves the state of a run that ends for want of data. One of several processes cannot: the others do not know of it."""
        if jax.process_count() > 1:
            return
        with self._clock.spend("checkpoint"):
            try:
                with contextlib.suppress(SaveError):
                    self._checkpointer.wait()
                if self._checkpointer.latest_step != step:
                    say(f"saving step {step} before the run ends ({type(error).__name__})")
                    self.before_save()
                    self._checkpointer.save(step, state, self._meta)
            except SaveError as failure:  # must not hide the first error
                logging.error("%s", failure)
