"""The training loop: config -> mesh -> data -> step -> records, previews, checkpoints."""

import contextlib
import dataclasses
import os
import time
from dataclasses import dataclass
from typing import Any

from dit_jax.build import Run, check_dtypes
from dit_jax.runtime import phases
from dit_jax.runtime.console import say
from dit_jax.runtime.step_clock import IN_FLIGHT, StepClock
from dit_jax.storage.paths import local_path
from dit_jax.tasks.state import TrainState
from dit_jax.training.initial import settled
from dit_jax.training.results import Results
from dit_jax.training.setup import Begin, Training
from dit_jax.training.starts import Start


@dataclass
class TrainResult:
    """The result of training, for sampling in the same process.

    Fields:
        run: the run with its codec's weights.
        results: the run's results; `results.finish` makes the final samples and their score.
        constants: the arrays that a step reads and does not change, on the mesh.
        stopped: a signal ended training before the last step, with everything saved.
        loss, images_per_second: of the last logged interval, also of an earlier start; None if there is none.
        dropped: {sink: number of records or pictures that could not be written}, without zeros.
        finished: result.json of a run that was finished before; None for another.
    """

    run: Run
    results: Results
    state: TrainState
    constants: dict[str, Any]
    stopped: bool
    loss: float | None = None
    images_per_second: float | None = None
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    finished: dict[str, Any] | None = None


def train(
    run: Run,
    workdir: str | os.PathLike,
    started: Start | None = None,
    claimed: contextlib.ExitStack | None = None,
    begin: Begin | None = None,
) -> TrainResult:
    """Trains to config.num_steps, from the newest checkpoint of the folder if there is one.

    SIGTERM or Ctrl-C ends training early, with everything saved and `stopped` set.

    Args:
        started: the start in the log of starts; None writes no log.
        claimed: keeps the claim on the folder until it is closed; None releases it at the end of training.
        begin: how the run begins, or goes back; None resumes it, or begins with random parameters.

    Raises:
        UserError: the config, the data or the folder is invalid; raised before any training.
        Diverged: see `meter`.
    """
    clock, workdir = StepClock(), local_path(workdir).absolute()
    run.task  # raises errors of the config before weights and data are read
    check_dtypes(run.config)
    run = settled(run.with_codec_weights(workdir).with_text_encoders(workdir), (begin or Begin()).parent or workdir)
    with contextlib.ExitStack() as stack:
        training = Training(run, workdir, clock, stack, claimed or stack, begin or Begin())
        state, stopped = _take_steps(training, clock, started)
    return _result(training, state, stopped)


def _take_steps(training: Training, clock: StepClock, started: Start | None) -> tuple[TrainState, bool]:
    """Restores or creates the state and takes the missing steps; returns (the last state, whether a signal ended them early)."""
    num_steps = training.run.config.num_steps
    with phases.phase("restore"):
        state = training.restore_or_create(started)
    step = int(state.step)
    if training.resume_score(step, state):
        return state, True
    if step >= num_steps:
        say(f"step {step} of {num_steps} is reached: nothing to train")
        return state, False

    stepper, batches, events, batch = training.start(state)
    del state  # the stepper has it: a second name would keep what a step cannot donate
    stopping = interrupted = False
    while step < num_steps and not (stopping or interrupted):
        clock.wait(step + 1 - IN_FLIGHT)
        with training.profile.step(step):
            dispatched = time.monotonic()
            output = stepper(batch)
            step += 1
            clock.dispatched(step, dispatched, output)
        training.dispatched(step)
        stopping = training.stop.requested(step)
        for event in events:
            if event.due(step, stopping):
                with clock.spend(event.kind):
                    interrupted = event(step, stepper.state) or interrupted
        if step < num_steps and not (stopping or interrupted):
            batch = batches.next_or_none(step, stepper.state)
            stopping = batch is None
    training.finish(step)
    return stepper.state, interrupted or (stopping and step < num_steps)


def _result(training: Training, state: TrainState, stopped: bool) -> TrainResult:
    """The result of training with this last state."""
    dropped = {name: count for name, count in training.records.dropped.items() if count}
    if (meter := training.meter) is not None:
        loss, rate = meter.loss, meter.images_per_second
    else:  # no step was taken
        loss, rate = (training.records.last(name) for name in ("loss", "images_per_second"))
    return TrainResult(training.run, training.results, state, training.constants, stopped, loss, rate, dropped, training.finished)
