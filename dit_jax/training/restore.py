"""Restores the state of a run: that of its newest intact checkpoint, or of the last good one before a divergence."""

import contextlib
from collections.abc import Iterator
from typing import Any

from dit_jax.build import Run
from dit_jax.config_file import plain
from dit_jax.errors import UserError
from dit_jax.parallel import hosts
from dit_jax.runtime.console import say
from dit_jax.runtime.versions import check_numeric_settings
from dit_jax.storage import divergences
from dit_jax.storage.checkpoints import Checkpointer, SaveError
from dit_jax.storage.run_folder import Workdir, flatten
from dit_jax.storage.step_folder import OtherStructure
from dit_jax.tasks.state import TrainState, with_structure
from dit_jax.training.meter import Diverged, Meter


class Restorer:
    """Restores the state of a run, and keeps the record of its divergences."""

    def __init__(self, run: Run, folder: Workdir, checkpointer: Checkpointer):
        self._run, self._folder, self._checkpointer = run, folder, checkpointer
        settings = flatten(plain(run.config))
        self._fields = {name: value for name, value in settings.items() if name in divergences.FIELDS}
        self._goes_back = False

    def __call__(self, expected: dict[str, Any]) -> TrainState | None:
        """The state of the newest intact checkpoint, or None without one.

        A diverged run with another rate or clipping goes back to its last good step, maybe to 0.

        expected: {"data": fingerprint of the data set, "numerics": settings of JAX}, as stored with a checkpoint.

        Raises:
            UserError: the data set, or a setting of JAX that changes numbers, differs from that of the checkpoint.
        """
        restored = self._newest_or_good()
        if restored is None:
            return None
        state, meta = restored
        if meta["data"] != expected["data"]:
            raise UserError(
                "the data set has changed since this run began (another version, split, file list or count); restore it, "
                "or give a new --workdir"
            )
        check_numeric_settings(meta.get("numerics", {}), f"the run in {self._folder.path}")  # earlier versions stored none
        say(f"continuing from step {int(state.step)}")
        self._folder.note_saved()  # earlier versions did not
        return state

    def begun(self, step: int) -> None:
        """Records that the run goes on from `step`, if it went back there."""
        if self._goes_back and hosts.is_first():
            divergences.settle(self._folder.path, step)

    def _newest_or_good(self) -> tuple[TrainState, dict] | None:
        divergence, folder = divergences.unsolved(self._folder.path), self._folder.path
        lines = divergences.changes(divergence, self._fields) if divergence else []
        self._goes_back = bool(lines)
        if divergence is None or not lines:
            if divergence is not None:
                say(f"this run diverged at step {divergence['step']} with the same settings, see {folder / divergences.FILE}")
            return self._restore(None)
        good = self._good_step(divergence["first_skipped"])
        say(f"this run diverged at step {divergence['step']}; from step {good} on it has {'; '.join(lines)}")
        if not good:
            self._folder.note_begun_again()
            self._checkpointer.abandon_all()
            return None
        return self._restore(good)

    def _restore(self, step: int | None) -> tuple[TrainState, dict] | None:
        """As `Checkpointer.restore`; clipping or a schedule may have come or gone since the checkpoint was saved."""
        wanted = self._run.abstract_state
        error: OtherStructure | None = None
        for abstract in self._run.abstract_states():
            try:
                restored = self._checkpointer.restore(abstract, step)
            except OtherStructure as other:
                error = error or other
                continue
            if restored is None:
                return None
            state, meta = restored
            return state.replace(opt_state=with_structure(state.opt_state, wanted.opt_state)), meta
        assert error is not None  # there is at least one structure
        raise error

    def _good_step(self, first_skipped: int) -> int:
        """The newest saved step from which at least one step was taken, else 0: the state itself may be what diverged."""
        return max((step for step in self._checkpointer.steps if step < first_skipped - 1), default=0)

    @contextlib.contextmanager
    def recorded_divergence(self, meter: Meter) -> Iterator[None]:
        """Records a `Diverged` in the folder, and adds how the run goes on. A run that comes further has settled the last one."""
        folder, first = self._folder.path, hosts.is_first()
        try:
            yield
        except Diverged as error:
            with contextlib.suppress(SaveError):  # which is logged
                self._checkpointer.wait()
            good = self._good_step(error.first_skipped)
            if first:
                divergences.add(folder, error.step, error.first_skipped, self._fields)
            raise Diverged(
                f"{error}; start the same command again with a lower --config.optimizer.learning_rate, or a lower "
                f"--config.optimizer.clip_norm: it goes on from step {good}, the last good one that is saved",
                error.step,
                error.first_skipped,
            ) from None
        if first and (last := divergences.unsolved(folder)) and meter.last_step >= last["step"]:
            divergences.settle(folder, meter.first_step)
