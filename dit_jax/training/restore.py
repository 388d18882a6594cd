"""Restores the state of a run: its newest intact checkpoint, one that it goes back to, or that of the run it branches from."""

import contextlib
from collections.abc import Iterator
from typing import Any

from dit_jax.build import Run
from dit_jax.config_file import plain
from dit_jax.errors import UserError
from dit_jax.parallel import hosts
from dit_jax.runtime.console import say
from dit_jax.runtime.versions import check_numeric_settings
from dit_jax.storage import branch_record, divergences, rewinds
from dit_jax.storage.checkpoints import Checkpointer, SaveError
from dit_jax.storage.run_folder import Workdir, flatten
from dit_jax.storage.step_folder import OtherStructure
from dit_jax.tasks.state import TrainState, with_structure
from dit_jax.training.branch import Branch
from dit_jax.training.meter import Diverged, Meter


class Restorer:
    """Restores the state of a run, and keeps the record of its divergences.

    Args:
        branch: how the run was begun from another one, if this start says so.
        back: the step to which the user takes the run back; None for the newest.
    """

    def __init__(
        self,
        run: Run,
        folder: Workdir,
        checkpointer: Checkpointer,
        branch: Branch | None = None,
        back: int | None = None,
    ):
        self._run, self._folder, self._checkpointer, self._branch, self._back = run, folder, checkpointer, branch, back
        settings = flatten(plain(run.config))
        self._fields = {name: value for name, value in settings.items() if name in divergences.FIELDS}
        self._goes_back = False

    def __call__(self, expected: dict[str, Any]) -> TrainState | None:
        """The state of the newest intact checkpoint, or None without one.

        A diverged run with another rate or clipping goes back to its last good step, maybe to 0. A branch that has no checkpoint
        yet saves that of the other run as its first.

        expected: {"data": fingerprint of the data set, "numerics": settings of JAX}, as stored with a checkpoint.

        Raises:
            UserError: the data set, or a setting of JAX that changes numbers, differs from that of the checkpoint.
        """
        if self._branch is not None and not self._branch.begun:
            return self._begin(self._branch, expected)
        restored = self._newest_or_good() if self._back is None else self._rewound(self._back)
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
        """Records that the run goes on from `step`, if it went back there; sets aside what belongs to later steps."""
        if self._goes_back and hosts.is_first():
            divergences.settle(self._folder.path, step)
            if self._back is not None:
                rewinds.set_aside(self._folder.path, step)

    def recorded(self) -> None:
        """Ends a rewind, once the metrics of later steps are dropped."""
        if self._back is not None and hosts.is_first():
            rewinds.finish(self._folder.path)

    def _begin(self, branch: Branch, meta: dict[str, Any]) -> TrainState:
        state = branch.restore(self._run)
        branch.note(self._folder.path, self._run.config)
        self._checkpointer.save(branch.step, state, meta)
        self._checkpointer.wait()
        say(f"a branch of {branch.run} from step {branch.step} on; it is not read any more")
        return state

    def _rewound(self, step: int) -> tuple[TrainState, dict] | None:
        self._goes_back = True
        try:
            restored = self._restore(step)
        except (UserError, FileNotFoundError) as error:
            if hosts.is_first():
                rewinds.cancel(self._folder.path)
            raise UserError(f"the run cannot go back to step {step}, and nothing is changed: {error}") from error
        say(f"the run goes back to step {step}, as --rewind says; later steps are set aside in {self._folder.path}")
        return restored

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
        if not good and (record := branch_record.read(folder)):
            raise UserError(
                f"no checkpoint of {folder} from before step {divergence['first_skipped']} is left; begin the branch of "
                f"{record['run']} again with --restart"
            )
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
        """The newest saved step from which at least one step was taken, else 0: the state itself may be what diverged.

        The state that a branch began from is good: it is another run's.
        """
        begun = (branch_record.read(self._folder.path) or {}).get("step")
        return max((step for step in self._checkpointer.steps if step < first_skipped - 1 or step == begun), default=0)

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
