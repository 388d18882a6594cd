"""The training loop: config -> mesh -> data -> step -> records, previews, checkpoints."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from dit_jax.build import Run, check_dtypes
from dit_jax.config_file import plain
from dit_jax.errors import UserError
from dit_jax.interop import codec_folder
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import shard_batch
from dit_jax.runtime import phases, watchdog
from dit_jax.runtime.console import say
from dit_jax.runtime.profile import Profile
from dit_jax.runtime.signals import StopSignal
from dit_jax.runtime.step_clock import IN_FLIGHT, StepClock
from dit_jax.runtime.versions import check_numeric_settings, numeric_settings
from dit_jax.storage import divergences
from dit_jax.storage.checkpoints import Checkpointer, SaveError
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import Workdir, check_not_lost, flatten, read_result, write_class_names
from dit_jax.storage.step_folder import OtherStructure
from dit_jax.tasks.compiled_step import compile_in_background
from dit_jax.tasks.state import TrainState, create_sharded, with_structure
from dit_jax.training import leftovers, summary
from dit_jax.training.events import Event, Log, Preview, Save, Score
from dit_jax.training.meter import Diverged, Meter
from dit_jax.training.records import Records
from dit_jax.training.results import Results, results_of
from dit_jax.training.scoring import Scorer
from dit_jax.training.starts import Start
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


def train(
    run: Run, workdir: str | os.PathLike, started: Start | None = None, claimed: contextlib.ExitStack | None = None
) -> TrainResult:
    """Trains to config.num_steps, from the newest checkpoint of the folder if there is one.

    SIGTERM or Ctrl-C ends training early, with everything saved and `stopped` set.

    Args:
        started: the start in the log of starts; None writes no log.
        claimed: keeps the claim on the folder until it is closed; None releases it at the end of training.

    Raises:
        UserError: the config, the data or the folder is invalid; raised before any training.
        Diverged: see `meter`.
    """
    clock, workdir, num_steps = StepClock(), local_path(workdir).absolute(), run.config.num_steps
    run.task  # raises errors of the config before weights and data are read
    check_dtypes(run.config)
    run = run.with_codec_weights(workdir)
    with contextlib.ExitStack() as stack:
        training = Training(run, workdir, clock, stack, claimed or stack)
        with phases.phase("restore"):
            state = training.restore_or_create(started)
        step = int(state.step)
        if training.resume_score(step, state):
            return training.result(state, stopped=True)
        if step >= num_steps:
            say(f"step {step} of {num_steps} is reached: nothing to train")
            return training.result(state)

        stepper, batches, batch = training.start(state)
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
            for event in training.events:
                if event.due(step, stopping):
                    with clock.spend(event.kind):
                        interrupted = event(step, stepper.state) or interrupted
            if step < num_steps and not (stopping or interrupted):
                batch = training.next_batch_or_none(batches, step, stepper.state)
                stopping = batch is None
        training.finish(step)
    return training.result(stepper.state, stopped=interrupted or (stopping and step < num_steps))


def watchdog_of(run: Run, workdir: Path) -> watchdog.Watchdog:
    """The watchdog of a run. A batch that is waited for may be retried for `loader.retry_seconds`, on top of its limit."""
    retry_seconds = run.config.loader.get("retry_seconds", 0.0)
    file = workdir / f"stacks{jax.process_index() or ''}.txt"
    return watchdog.Watchdog(run.config.log.watchdog_seconds, file, {"data": retry_seconds})


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
    rate = getattr(run.optimizer, "rate", None)
    decay = optimizer.get("decay_steps") if rate is not None else None
    if decay is not None and decay < num_steps and begun < num_steps:
        both = "it and decay_start " if optimizer.get("decay_start") is not None else ""
        raise UserError(
            f"optimizer.decay_steps is {decay} and num_steps is {num_steps}: the learning rate would be 0 after step {decay}; "
            f"set optimizer.decay_steps to {num_steps} or more, or {both}to None for a constant rate"
        )
    if decay is None and rate is not None and begun < num_steps and rate(num_steps - 1) == 0:
        last = max((step for step in range(num_steps) if rate(step) != 0), default=-1) + 1
        raise UserError(
            f"optimizer {optimizer.name!r} has a learning rate of 0 after step {last}, and num_steps is {num_steps}; lower "
            "num_steps, or change its schedule"
        )


class Training:
    """The objects of the loop: the folder, the checkpoints, the records and the events.

    Raises:
        UserError: the config, the data or the folder is invalid.
    """

    def __init__(self, run: Run, workdir: Path, clock: StepClock, stack: contextlib.ExitStack, claimed: contextlib.ExitStack):
        config, first = run.config, hosts.is_first()
        settings = plain(config)
        self.fields = {name: value for name, value in flatten(settings).items() if name in divergences.FIELDS}
        self.run, self.clock, self.stack = run, clock, stack
        self.started: Start | None = None
        self.meta: dict[str, Any] = {"data": run.loader.source.fingerprint, "numerics": numeric_settings()}
        self.constants = run.constants
        self.results = results_of(run)
        scorer = Scorer(run, workdir) if "scoring" in config and config.scoring.every_steps else None
        self.profile = Profile(**config.profile, last_step=config.num_steps, folder=workdir / "profile", enabled=first)
        wandb = WandbWriter(workdir, config.log.wandb, settings) if config.log.wandb else None
        self.watchdog = watchdog_of(run, workdir)
        checkpointer = Checkpointer(workdir / "checkpoints", **config.checkpoint)
        begun = checkpointer.latest_step or 0
        check_not_lost(workdir, checkpointer.latest_step)
        check_steps(run, begun, workdir)
        self.finished = read_result(workdir, begun) if begun == config.num_steps else None
        stack.enter_context(self.watchdog)
        stack.enter_context(phases.phase("start or end"))
        self.folder = claimed.enter_context(Workdir(workdir, settings, first, self.finished is not None))
        self.checkpointer = stack.enter_context(checkpointer)
        checkpointer.on_commit = self.folder.note_saved
        self.records = stack.enter_context(Records(self.folder.path, first, wandb))
        self.stop = stack.enter_context(StopSignal(unsaved=False))
        if first:
            leftovers.remove(self.folder.path, config.num_steps if config.evaluation.num_images else None, scorer)
        if first and len(run.source.class_names) and not self.finished:
            write_class_names(self.folder.path, run.source.class_names)
        if first and run.has_codec_weights:
            codec_folder.keep(self.folder.path, run.codec, run.codec_params)
        self.score = None if scorer is None else Score(scorer, self.constants, self.records, self.checkpointer)
        # The step is compiled while the state is restored or created.
        self._compiling = self._compile() if begun < config.num_steps else None

    def _compile(self):
        run = self.run
        say("compiling the training step")
        return compile_in_background(run.task, run.mesh, run.config.seed, run.abstract_state, self.constants, run.abstract_batch)

    def restore_or_create(self, started: Start | None = None) -> TrainState:
        """The state of the newest intact checkpoint, or a new state; prints the summary of the run.

        started: the start in the log of starts.

        Raises:
            UserError: the data set, or a setting of JAX that changes numbers, differs from that of the checkpoint.
        """
        run, restored = self.run, self._restored()
        if restored is None:
            state = create_sharded(run.task, jax.random.key(run.config.seed), run.mesh)
        else:
            state, meta = restored
            if meta["data"] != self.meta["data"]:
                raise UserError(
                    "the data set has changed since this run began (another version, split, file list or count); restore it, "
                    "or give a new --workdir"
                )
            check_numeric_settings(meta.get("numerics", {}), f"the run in {self.folder.path}")  # earlier versions stored none
            say(f"continuing from step {int(state.step)}")
            self.folder.note_saved()  # earlier versions did not
        if self._goes_back and hosts.is_first():
            divergences.settle(self.folder.path, int(state.step))
        if int(state.step) < run.config.num_steps:
            self.finished = None  # its last checkpoint was damaged and set aside
        if not self.finished:
            self.records.rewind(int(state.step))
        say(summary.text(run, self.folder.path))
        if self.score:
            self.score.scorer.forget_after(int(state.step))
            best = self.score.scorer.best
            self.checkpointer.best_step = best and best["step"]
        self.started = started
        if started is not None:
            started.begin(int(state.step), run.config.num_steps)
        return state

    def resume_score(self, step: int, state: TrainState) -> bool:
        """Finishes a score of this step that was interrupted; returns True if a signal stopped it again."""
        if self.score is None or not self.score.scorer.unfinished(step):
            return False
        with self.clock.spend("scoring"):
            return bool(self.score(step, state))

    def result(self, state: TrainState, stopped: bool = False) -> TrainResult:
        """The result of training with this last state."""
        dropped = {name: count for name, count in self.records.dropped.items() if count}
        loss, rate = (self.records.last(name) for name in ("loss", "images_per_second"))
        if meter := getattr(self, "meter", None):  # there is one from `start` on
            loss, rate = meter.loss, meter.images_per_second
        return TrainResult(self.run, self.results, state, self.constants, stopped, loss, rate, dropped, self.finished)

    def _restored(self) -> tuple[TrainState, dict] | None:
        """As `Checkpointer.restore`. A diverged run with another rate or clipping goes back to its last good step, maybe to 0."""
        divergence, folder = divergences.unsolved(self.folder.path), self.folder.path
        lines = divergences.changes(divergence, self.fields) if divergence else []
        self._goes_back = bool(lines)
        if divergence is None or not lines:
            if divergence is not None:
                say(f"this run diverged at step {divergence['step']} with the same settings, see {folder / divergences.FILE}")
            return self._restore(None)
        good = self._good_step(divergence["first_skipped"])
        say(f"this run diverged at step {divergence['step']}; from step {good} on it has {'; '.join(lines)}")
        if not good:
            self.folder.note_begun_again()
            self.checkpointer.abandon_all()
            return None
        return self._restore(good)

    def _restore(self, step: int | None) -> tuple[TrainState, dict] | None:
        """As `Checkpointer.restore`; clipping or a schedule may have come or gone since the checkpoint was saved."""
        wanted = self.run.abstract_state
        error: OtherStructure | None = None
        for abstract in self.run.abstract_states():
            try:
                restored = self.checkpointer.restore(abstract, step)
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
        return max((step for step in self.checkpointer.steps if step < first_skipped - 1), default=0)

    @contextlib.contextmanager
    def recorded_divergence(self) -> Iterator[None]:
        """Records a `Diverged` in the folder, and adds how the run goes on. A run that comes further has settled the last one."""
        folder, first = self.folder.path, hosts.is_first()
        try:
            yield
        except Diverged as error:
            with contextlib.suppress(SaveError):  # which is logged
                self.checkpointer.wait()
            good = self._good_step(error.first_skipped)
            if first:
                divergences.add(folder, error.step, error.first_skipped, self.fields)
            raise Diverged(
                f"{error}; start the same command again with a lower --config.optimizer.learning_rate, or a lower "
                f"--config.optimizer.clip_norm: it goes on from step {good}, the last good one that is saved",
                error.step,
                error.first_skipped,
            ) from None
        if first and (last := divergences.unsolved(folder)) and self.meter.last_step >= last["step"]:
            divergences.settle(folder, self.meter.first_step)

    def start(self, state: TrainState) -> tuple[Stepper, Any, Any]:
        """Makes the events; returns (the compiled step, this host's batches from the state's step on, the first batch)."""
        config, step = self.run.config, int(state.step)
        self.records.prepare()
        self.profile.resumed(step)
        batches: Any = self.stack.enter_context(self.run.loader.batches(step))
        batches.on_wait(functools.partial(phases.beat, "data"))
        self.watchdog.status, self.stop.on_request = batches.status, batches.stop_waiting
        for context in (self.clock, self.profile):
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
            Save(self.checkpointer, self.meta, scorer, last, meter),
            Preview(self.results, meter, self.records, self.folder.samples, self.constants, config.preview.every_steps, last),
        ]
        if self.score:
            self.events.append(dataclasses.replace(self.score, meter=meter, clock=self.clock))
        self.stack.enter_context(phases.phase("step"))
        self.stop.unsaved = True
        self.stack.enter_context(self.recorded_divergence())
        return stepper, batches, batch

    def next_batch(self, batches: Iterator[Any]) -> dict[str, jax.Array]:
        with self.clock.spend("data"):
            return shard_batch(self.run.mesh, next(batches))

    def next_batch_or_none(self, batches: Iterator[Any], step: int, state: TrainState) -> dict[str, jax.Array] | None:
        """The next batch; None if a signal came while data was waited for. Before this, or an error, the state is saved."""
        try:
            return self.next_batch(batches)
        except Exception as error:
            self.save_before(error, step, state)
            if not self.stop.asked:
                raise
            return None

    def dispatched(self, step: int) -> None:
        """Notes that the step was dispatched."""
        if self.started is not None:
            self.started.step = step
        self.profile.finish(step, self.clock)

    def save_before(self, error: Exception, step: int, state: TrainState) -> None:
        """Saves the state of a run that ends for want of data. One of several processes cannot: the others do not know of it."""
        if jax.process_count() > 1:
            return
        with self.clock.spend("checkpoint"):
            try:
                with contextlib.suppress(SaveError):
                    self.checkpointer.wait()
                if self.checkpointer.latest_step != step:
                    say(f"saving step {step} before the run ends ({type(error).__name__})")
                    self.meter.report()
                    self.checkpointer.save(step, state, self.meta)
            except SaveError as failure:  # must not hide the first error
                logging.error("%s", failure)

    def finish(self, step: int) -> None:
        """Waits for the last step and save, and reports where the time went."""
        self.meter.report()
        self.clock.wait(step)
        with self.clock.spend("checkpoint"):
            self.checkpointer.wait()
        self.meter.finish(step)
