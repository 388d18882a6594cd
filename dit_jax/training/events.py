"""The events of the training loop: what runs between two steps.

After each step the loop runs the events that are due, in order. Saving precedes scoring, which needs the saved step.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from dit_jax.runtime.step_clock import StepClock
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.tasks.state import TrainState
from dit_jax.training.meter import Meter
from dit_jax.training.records import Records
from dit_jax.training.results import Results
from dit_jax.training.scoring import Scorer


class Event(Protocol):
    """An action between two steps.

    Fields:
        kind: the category of its time on the clock, one of `step_clock.KINDS`.
    """

    kind: str

    def due(self, step: int, stopping: bool) -> bool:
        """Whether the event runs after this step. stopping: a signal asked the run to save and stop."""
        ...

    def __call__(self, step: int, state: TrainState) -> bool | None:
        """Runs the event; True if a signal interrupted it and the run must stop."""
        ...


@dataclass
class Log:
    """Records the means over an interval of steps.

    It is due after every step: the sums of an interval are read one step late, while the devices compute the next step.
    """

    meter: Meter
    stepper: Any
    batches: Any
    every_steps: int
    num_steps: int

    kind = "other"

    def due(self, step: int, stopping: bool) -> bool:
        return True

    def __call__(self, step: int, state: TrainState) -> None:
        self.meter.report()
        self.meter.passed(step)
        self.meter.bad_records = len(self.batches.bad_records)
        if step % self.every_steps == 0 or step == self.num_steps:
            self.meter.defer(step, self.stepper.take_sums())


@dataclass
class Save:
    """Saves a checkpoint with `meta`: at its interval, at the last step, before a score, and when the run stops.

    While steps are skipped, the state is that of an earlier step and perhaps the reason. It would displace the good ones.
    """

    checkpointer: Checkpointer
    meta: dict[str, Any]
    scorer: Scorer | None
    num_steps: int
    meter: Meter

    kind = "checkpoint"

    def due(self, step: int, stopping: bool) -> bool:
        scored = self.scorer is not None and self.scorer.due(step)
        wanted = self.checkpointer.due(step) or scored or step == self.num_steps
        return stopping or (wanted and not self.meter.skipped_in_a_row(step))

    def __call__(self, step: int, state: TrainState) -> None:
        self.meter.report()  # first: a run that is killed and resumes at this step does not record it again
        self.checkpointer.save(step, state, self.meta)


@dataclass
class Preview:
    """Writes previews from the moving average: at its interval and at the last step."""

    results: Results
    meter: Meter
    records: Records
    folder: Any
    constants: Any
    every_steps: int
    num_steps: int

    kind = "preview"

    def due(self, step: int, stopping: bool) -> bool:
        return bool(self.every_steps) and (step % self.every_steps == 0 or step == self.num_steps)

    def __call__(self, step: int, state: TrainState) -> None:
        self.meter.report()
        with self.records.without("previews"):
            seconds = self.results.preview(self.folder, self.records, step, state, self.constants)
            self.records.scalars(step, {"preview_seconds": seconds})


@dataclass
class Score:
    """Scores samples from the moving average, and keeps the checkpoint of the best step."""

    scorer: Scorer
    constants: Any
    records: Records
    checkpointer: Checkpointer
    meter: Meter | None = None
    clock: StepClock | None = None

    kind = "scoring"

    def due(self, step: int, stopping: bool) -> bool:
        return self.scorer.due(step) and not stopping and not (self.meter and self.meter.skipped_in_a_row(step))

    def __call__(self, step: int, state: TrainState) -> bool:
        if self.meter is not None and self.clock is not None:  # None when an interrupted score is continued, before the loop
            self.meter.report()
            self.clock.wait(step)
        if problem := self.scorer.problem(step):
            self.records.lost("scores", problem)
            return False
        with self.records.without("scores"):
            result = self.scorer(step, state.ema_params, self.constants, lambda values: self.records.scalars(step, values))
            if result is None:
                return True
            best = self.scorer.best
            assert best is not None  # there is a score now
            self.checkpointer.best_step = best["step"]
            return False
        self.scorer.give_up(step)
        return False
