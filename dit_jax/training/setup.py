"""Sets up the training of a run: its folder, checkpoints, records, compiled step, batches and events."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dit_jax.build import Run
from dit_jax.config_file import plain
from dit_jax.data.buckets import Buckets
from dit_jax.errors import UserError
from dit_jax.interop import codec_folder
from dit_jax.parallel import hosts
from dit_jax.runtime import phases, watchdog
from dit_jax.runtime.console import say
from dit_jax.runtime.profile import Profile
from dit_jax.runtime.signals import StopSignal
from dit_jax.runtime.step_clock import StepClock
from dit_jax.runtime.versions import numeric_settings
from dit_jax.storage import rewinds
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.storage.run_folder import Workdir, check_not_lost, differences, read_config, read_result, write_class_names
from dit_jax.tasks.compiled_step import compile_in_background
from dit_jax.tasks.state import TrainState, create_sharded
from dit_jax.training import branch, leftovers, summary
from dit_jax.training.batches import Batches
from dit_jax.training.branch import Branch
from dit_jax.training.events import Event, Log, Preview, Save, Score
from dit_jax.training.initial import Initial, starts_from_weights
from dit_jax.training.meter import Meter
from dit_jax.training.records import Records
from dit_jax.training.restore import Restorer
from dit_jax.training.results import results_of
from dit_jax.training.scoring import Scorer
from dit_jax.training.starts import Start
from dit_jax.training.stepper import Stepper
from dit_jax.training.wandb_writer import WandbWriter


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


@dataclass(frozen=True)
class Begin:
    """How a run begins, where it does not simply resume.

    Fields:
        branch: it is a branch of another run.
        rewind: the saved step to which the user takes it back.
    """

    branch: Branch | None = None
    rewind: int | None = None

    @property
    def parent(self) -> Path | None:
        """The folder of the run whose checkpoint this start reads; None if it reads that of its own folder."""
        return self.branch.run if self.branch is not None and not self.branch.begun else None


class Training:
    """The objects of the loop. The constructor opens the folder; `restore_or_create` and `start` make the rest, in this order.

    Args:
        stack: closes everything at the end of training, but for the claim on the folder, which `claimed` keeps.
        begin: how the run begins, or goes back.

    Raises:
        UserError: the config, the data or the folder is invalid.
    """

    def __init__(
        self,
        run: Run,
        workdir: Path,
        clock: StepClock,
        stack: contextlib.ExitStack,
        claimed: contextlib.ExitStack,
        begin: Begin,
    ):
        config, first = run.config, hosts.is_first()
        settings = plain(config)
        self.initial = Initial(run, workdir, begin.parent) if starts_from_weights(run) else None
        run = self.initial.run if self.initial else run
        self.run, self.clock, self.stack = run, clock, stack
        self.started: Start | None = None
        self.meter: Meter | None = None
        self.meta: dict[str, Any] = {"data": run.loader.source.fingerprint, "numerics": numeric_settings()}
        self.constants = run.constants
        self.results = results_of(run)
        self.scorer = Scorer(run, workdir) if "scoring" in config and config.scoring.every_steps else None
        self.profile = Profile(**config.profile, last_step=config.num_steps, folder=workdir / "profile", enabled=first)
        wandb = WandbWriter(workdir, config.log.wandb, settings) if config.log.wandb else None
        self.watchdog = watchdog_of(run, workdir)
        checkpointer = Checkpointer(workdir / "checkpoints", **config.checkpoint)
        begun, back = self._first_step(workdir, checkpointer, begin, settings)
        check_steps(run, begun, workdir)
        is_finished = begun == config.num_steps and back is None
        self.finished = read_result(workdir, begun) if is_finished else None
        stack.enter_context(self.watchdog)
        stack.enter_context(phases.phase("start or end"))
        self.folder = claimed.enter_context(Workdir(workdir, settings, first, self.finished is not None, back))
        self.checkpointer = stack.enter_context(checkpointer)
        checkpointer.on_commit = self.folder.note_saved
        self.restorer = Restorer(run, self.folder, checkpointer, begin.branch, back)
        self.records = stack.enter_context(Records(self.folder.path, first, wandb))
        self.stop = stack.enter_context(StopSignal(unsaved=False))
        if first:
            leftovers.remove(self.folder.path, config.num_steps if config.evaluation.num_images else None, self.scorer)
        if first and len(run.source.class_names) and not self.finished:
            write_class_names(self.folder.path, run.source.class_names)
        if first and run.has_codec_weights:
            codec_folder.keep(self.folder.path, run.codec, run.codec_params)
        if first and self.initial:
            self.initial.keep()
        # The step is compiled while the state is restored or created.
        self._compiling = self._compile() if begun < config.num_steps else None

    def _first_step(
        self, workdir: Path, checkpointer: Checkpointer, begin: Begin, settings: dict[str, Any]
    ) -> tuple[int, int | None]:
        """(the last saved step, or that from which the run begins; the step to which it goes back, or None)."""
        latest = checkpointer.latest_step
        if begin.branch is not None and not begin.branch.begun:
            begin.branch.check(self.run)
            return begin.branch.step, None
        check_not_lost(workdir, latest)
        if begin.branch is None:
            branch.check_unbegun(workdir, latest)
        is_run = (workdir / "config.json").exists()
        same_config = is_run and not differences(read_config(workdir), settings)
        back = rewinds.decided(workdir, begin.rewind, same_config, checkpointer.steps)
        return latest or 0 if back is None else back, back

    def _compile(self) -> Future:
        run, parts = self.run, self.run.parts
        say("compiling the training step" + (f" for {len(parts)} buckets" if len(run.buckets) else ""))
        tasks, batches = [part.task for part in parts], [part.abstract_batch for part in parts]
        return compile_in_background(tasks, run.mesh, run.config.seed, run.abstract_state, self.constants, batches)

    def restore_or_create(self, started: Start | None = None) -> TrainState:
        """The state of the newest intact checkpoint, or a new state; prints the summary of the run.

        started: the start in the log of starts.

        Raises:
            UserError: the data set, or a setting of JAX that changes numbers, differs from that of the checkpoint.
        """
        run, state = self.run, self.restorer(self.meta)
        if state is None:
            random = functools.partial(create_sharded, run.task, jax.random.key(run.config.seed), run.mesh)
            state = self.initial.state() if self.initial else random()
        step = int(state.step)
        self.restorer.begun(step)
        if step < run.config.num_steps:
            self.finished = None  # its last checkpoint was damaged and set aside
        if not self.finished:
            self.records.rewind(step)
        self.restorer.recorded()
        say(summary.text(run, self.folder.path))
        if self.scorer:
            self.scorer.forget_after(step)
            best = self.scorer.best
            self.checkpointer.best_step = best and best["step"]
        self.started = started
        if started is not None:
            started.begin(step, run.config.num_steps)
        return state

    def resume_score(self, step: int, state: TrainState) -> bool:
        """Finishes a score of this step that was interrupted; returns True if a signal stopped it again."""
        if self.scorer is None or not self.scorer.unfinished(step):
            return False
        with self.clock.spend("scoring"):
            return bool(Score(self.scorer, self.constants, self.records, self.checkpointer)(step, state))

    def start(self, state: TrainState) -> tuple[Stepper, Batches, list[Event], Any]:
        """Starts the loop: (the compiled step, the batches from the state's step on, the events, the first batch)."""
        config, step = self.run.config, int(state.step)
        self.records.prepare()
        self.profile.resumed(step)
        read: Any = self.stack.enter_context(self.run.loader.batches(step))
        read.on_wait(functools.partial(phases.beat, "data"))
        self.watchdog.status, self.stop.on_request = read.status, read.stop_waiting
        for context in (self.clock, self.profile):
            self.stack.enter_context(context)
        batches = Batches(self.run.mesh, read, self.clock, self.stop, self.checkpointer, self.meta)
        batch = next(batches)
        with self.clock.spend("compile"):
            compiled, zeros, seconds = (self._compiling or self._compile()).result()
        say(f"compiled the training step in {seconds:.1f} s")
        self.records.scalars(step, {"compile_seconds": seconds})
        stepper = Stepper(compiled, zeros, state, self.constants, self._order(step))
        rate = getattr(self.run.optimizer, "rate", None)
        meter = Meter(self.records, self.clock, self.run.task, self.run.mesh, config.batch_size, config.num_steps, step, rate)
        if len(self.run.buckets):
            meter.work_of = self.work_of(self.run.buckets)
        self.stack.callback(meter.close)
        self.meter, batches.before_save = meter, meter.report
        events = self._events(stepper, read, meter)
        self.stack.enter_context(phases.phase("step"))
        self.stop.unsaved = True
        self.stack.enter_context(self.restorer.recorded_divergence(meter))
        return stepper, batches, events, batch

    def work_of(self, buckets: Buckets) -> Callable[[int], tuple[int, int]]:
        """step -> (images, FLOPs of three forward passes) of its batch."""
        work = [(part.config.batch_size, 6 * part.task.macs() * part.config.batch_size) for part in self.run.parts]
        return lambda step: work[buckets.cycle.at(step)[0]]

    def _order(self, step: int) -> Iterator[int]:
        """The number of the compiled step, which is that of the bucket, for each step from `step` on."""
        buckets = self.run.buckets
        return (buckets.cycle.at(step)[0] for step in itertools.count(step)) if len(buckets) else itertools.repeat(0)

    def _events(self, stepper: Stepper, read: Any, meter: Meter) -> list[Event]:
        """The events in their order; see `events`."""
        config, last = self.run.config, self.run.config.num_steps
        events: list[Event] = [
            Log(meter, stepper, read, config.log.every_steps, last),
            Save(self.checkpointer, self.meta, self.scorer, last, meter),
            Preview(self.results, meter, self.records, self.folder.samples, self.constants, config.preview.every_steps, last),
        ]
        if self.scorer:
            events.append(Score(self.scorer, self.constants, self.records, self.checkpointer, meter, self.clock))
        return events

    def dispatched(self, step: int) -> None:
        """Notes that the step was dispatched."""
        if self.started is not None:
            self.started.step = step
        self.profile.finish(step, self.clock)

    def finish(self, step: int) -> None:
        """Waits for the last step and save, and reports where the time went."""
        assert self.meter is not None  # `start` made it
        self.meter.report()
        self.clock.wait(step)
        with self.clock.spend("checkpoint"):
            self.checkpointer.wait()
        self.meter.finish(step)
