"""The training loop: config -> mesh -> data -> step -> records, previews, checkpoints."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.build import Run
from dit_jax.config_file import plain
from dit_jax.errors import UserError
from dit_jax.interop import codec_folder
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import shard_batch
from dit_jax.runtime.console import say
from dit_jax.runtime.profile import Profile
from dit_jax.runtime.signals import StopSignal
from dit_jax.runtime.step_clock import IN_FLIGHT, StepClock
from dit_jax.runtime.watchdog import Watchdog
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import Workdir, write_class_names
from dit_jax.tasks.compiled_step import compile_in_background
from dit_jax.tasks.state import TrainState, create_sharded
from dit_jax.training import starts, summary
from dit_jax.training.events import Event, Log, Preview, Save, Score
from dit_jax.training.meter import Meter
from dit_jax.training.records import Records
from dit_jax.training.results import Results, results_of
from dit_jax.training.scoring import Scorer
from dit_jax.training.wandb_writer import WandbWriter


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


def train(run: Run, workdir: str | os.PathLike) -> TrainResult:
    """Trains to config.num_steps, from the newest checkpoint of the folder if there is one.

    SIGTERM or Ctrl-C ends training early, with everything saved and `stopped` set.

    Raises:
        UserError: the config, the data or the folder is invalid; raised before any training.
        Diverged: see `meter`.
    """
    clock, workdir, num_steps = StepClock(), local_path(workdir).absolute(), run.config.num_steps
    run.task  # raises errors of the config before weights and data are read
    run = run.with_codec_weights(workdir)
    with contextlib.ExitStack() as stack:
        training = Training(run, workdir, clock, stack)
        state = training.restore_or_create()
        step = int(state.step)
        if training.score and training.score.scorer.unfinished(step) and training.score(step, state):
            return TrainResult(run, training.results, state, training.constants, stopped=True)
        if step >= num_steps:
            say(f"step {step} of {num_steps} is reached: nothing to train")
            loss, rate = training.records.last("loss"), training.records.last("images_per_second")
            finished = training.folder.finished
            return TrainResult(run, training.results, state, training.constants, False, loss, rate, finished=finished)

        stepper, batches, batch = training.start(state)
        training.stop.unsaved = True
        stopping = interrupted = False
        while step < num_steps and not (stopping or interrupted):
            clock.wait(step + 1 - IN_FLIGHT)
            with training.profile.step(step):
                dispatched = time.monotonic()
                output = stepper(batch)
                step += 1
                starts.reached(step)
                clock.dispatched(step, dispatched, output)
            training.profile.finish(step, clock)
            stopping = training.stop.requested(step)
            for event in training.events:
                if event.due(step, stopping):
                    with clock.spend(event.kind):
                        interrupted = event(step, stepper.state) or interrupted
            if step < num_steps and not (stopping or interrupted):
                batch = training.next_batch(batches)
        training.finish(step)
    stopped = interrupted or (stopping and step < num_steps)
    meter, dropped = training.meter, {name: count for name, count in training.records.dropped.items() if count}
    return TrainResult(
        run, training.results, stepper.state, training.constants, stopped, meter.loss, meter.images_per_second, dropped
    )


def check_steps(run: Run, begun: int, workdir: Path) -> None:
    """Raises a UserError if the folder has more steps than num_steps, or if the last steps would have a learning rate of 0.

    begun: the last saved step.
    """
    num_steps, optimizer = run.config.num_steps, run.config.optimizer
    if begun > num_steps:
        raise UserError(
            f"{workdir} has {begun} steps and num_steps is {num_steps}; give --config.num_steps={begun} or more, or a new "
            "--workdir. dit_jax.sample --step= samples an earlier checkpoint"
        )
    decay = optimizer.get("decay_steps") if hasattr(run.optimizer, "rate") else None
    if decay is not None and decay < num_steps and begun < num_steps:
        raise UserError(
            f"optimizer.decay_steps is {decay} and num_steps is {num_steps}: the learning rate would be 0 after step {decay}; "
            f"set optimizer.decay_steps to {num_steps} or more, or to None for a constant rate"
        )


class Training:
    """The objects of the loop: the folder, the checkpoints, the records and the events.

    Raises:
        UserError: the config, the data or the folder is invalid.
    """

    def __init__(self, run: Run, workdir: Path, clock: StepClock, stack: contextlib.ExitStack):
        config, first = run.config, hosts.is_first()
        settings = plain(config)
        self.run, self.clock, self.stack = run, clock, stack
        self.fingerprint, self.constants = run.loader.source.fingerprint, run.constants
        self.results = results_of(run)
        scorer = Scorer(run, workdir) if "scoring" in config and config.scoring.every_steps else None
        self.profile = Profile(**config.profile, last_step=config.num_steps, folder=workdir / "profile", enabled=first)
        wandb = WandbWriter(workdir, config.log.wandb, settings) if config.log.wandb else None
        self.watchdog = Watchdog(config.log.watchdog_seconds, workdir / f"stacks{jax.process_index() or ''}.txt", clock)
        checkpointer = Checkpointer(workdir / "checkpoints", **config.checkpoint)
        begun = checkpointer.latest_step or 0
        check_steps(run, begun, workdir)
        self.folder = stack.enter_context(Workdir(workdir, settings, first))
        self.checkpointer = stack.enter_context(checkpointer)
        self.records = stack.enter_context(Records(self.folder.path, first, wandb))
        self.stop = stack.enter_context(StopSignal(unsaved=False))
        if first and len(run.source.class_names) and not self.folder.finished:
            write_class_names(self.folder.path, run.source.class_names)
        if first and run.has_codec_weights:
            codec_folder.keep(self.folder.path, run.codec, run.codec_params)
        self.score = scorer and Score(scorer, self.constants, self.records, self.checkpointer)
        # The step is compiled while the state is restored or created.
        self._compiling = self._compile() if begun < config.num_steps else None

    def _compile(self):
        run = self.run
        say("compiling the training step")
        return compile_in_background(run.task, run.mesh, run.config.seed, run.abstract_state, self.constants, run.abstract_batch)

    def restore_or_create(self) -> TrainState:
        """The state of the newest intact checkpoint, or a new state; prints the summary of the run.

        Raises:
            UserError: the data set differs from that of the checkpoint.
        """
        run, restored = self.run, self.checkpointer.restore(self.run.abstract_state)
        if restored is None:
            state = create_sharded(run.task, jax.random.key(run.config.seed), run.mesh)
        else:
            state, meta = restored
            if meta["data"] != self.fingerprint:
                raise UserError(
                    "the data set has changed since this run began (another version, split, file list or count); restore it, "
                    "or give a new --workdir"
                )
            say(f"continuing from step {int(state.step)}")
        if int(state.step) < run.config.num_steps:
            self.folder.finished = None  # its last checkpoint was damaged and set aside
        if not self.folder.finished:
            self.records.rewind(int(state.step))
        say(summary.text(run, self.folder.path))
        starts.begin(int(state.step), run.config.num_steps)
        if self.score:
            self.score.scorer.forget_after(int(state.step))
            best = self.score.scorer.best
            self.checkpointer.best_step = best and best["step"]
        return state

    def start(self, state: TrainState) -> tuple[Stepper, Any, Any]:
        """Makes the events; returns (the compiled step, this host's batches from the state's step on, the first batch)."""
        config, step = self.run.config, int(state.step)
        self.records.prepare()
        self.profile.resumed(step)
        batches: Any = self.stack.enter_context(self.run.loader.batches(step))
        for context in (self.clock, self.watchdog, self.profile):
            self.stack.enter_context(context)
        batch = self.next_batch(batches)
        with self.clock.spend("compile"):
            compiled, zeros, seconds = (self._compiling or self._compile()).result()
        say(f"compiled the training step in {seconds:.1f} s")
        self.records.scalars(step, {"compile_seconds": seconds})
        stepper = Stepper(compiled, zeros, state, self.constants)
        rate = getattr(self.run.optimizer, "rate", None)
        meter = Meter(self.records, self.clock, self.run.task, self.run.mesh, config.batch_size, config.num_steps, step, rate)
        self.stack.callback(meter.close)
        self.meter, last = meter, config.num_steps
        scorer = self.score.scorer if self.score else None
        self.events: list[Event] = [
            Log(meter, stepper, batches, config.log.every_steps, last),
            Save(self.checkpointer, self.fingerprint, scorer, last),
            Preview(self.results, meter, self.records, self.folder.samples, self.constants, config.preview.every_steps, last),
        ]
        if self.score:
            self.events.append(dataclasses.replace(self.score, meter=meter, clock=self.clock))
        return stepper, batches, batch

    def next_batch(self, batches: Iterator[Any]) -> dict[str, jax.Array]:
        with self.clock.spend("data"):
            return shard_batch(self.run.mesh, next(batches))

    def finish(self, step: int) -> None:
        """Waits for the last step and save, and reports where the time went."""
        self.meter.report()
        self.clock.wait(step)
        with self.clock.spend("checkpoint"):
            self.checkpointer.wait()
        self.meter.finish(step)
