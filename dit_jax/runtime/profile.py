"""Traces training steps for XProf or TensorBoard's profile page."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging

from dit_jax.errors import UserError
from dit_jax.runtime.console import say
from dit_jax.runtime.step_clock import StepClock


class Profile:
    """Writes a trace of devices and host over some steps to `folder`/plugins/profile/<time>/; a context manager.

    View it with `xprof --logdir=<folder>` or `tensorboard --logdir=<folder>`. Only the first process traces. If tracing fails,
    the failure is reported and the run continues.

    Args:
        start_step: number of completed steps at which the trace starts.
        num_steps: number of traced steps (a few are enough); 0 turns tracing off.
        last_step: last step of the run.

    Raises:
        UserError: the steps are not all within the run.
    """

    def __init__(self, start_step: int, num_steps: int, *, last_step: int, folder: Path, enabled: bool = True):
        if start_step < 0 or num_steps < 0 or (num_steps and start_step + num_steps > last_step):
            raise UserError(
                f"profile.start_step = {start_step} and profile.num_steps = {num_steps}: the traced steps do not lie "
                f"within 0 to num_steps = {last_step}; profile.num_steps = 0 turns tracing off"
            )
        self.start_step, self.stop_step = start_step, start_step + num_steps
        self.folder, self.enabled, self.running = folder, enabled and num_steps > 0, False

    @contextlib.contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Marks the block as the dispatch of the step after `done`; starts the trace if it is due."""
        if self.enabled and done == self.start_step:
            self._attempt(self._start)
        with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
            yield

    def finish(self, done: int, clock: StepClock) -> None:
        """Waits for the last traced step and ends the trace."""
        if self.running and done >= self.stop_step:
            clock.wait(done)
            self._attempt(self._stop)

    def resumed(self, done: int) -> None:
        """Reports that a run that resumes at `done` is past the steps to trace."""
        if self.enabled and done > self.start_step:
            say(f"no trace: the run resumes at step {done}, after profile.start_step = {self.start_step}")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.running:
            self._attempt(self._stop)

    def _start(self):
        jax.profiler.start_trace(self.folder)
        self.running = True

    def _stop(self):
        self.running = False
        jax.profiler.stop_trace()
        say(f"wrote the trace of steps up to {self.stop_step} to {self.folder}; view it with: tensorboard --logdir={self.folder}")

    def _attempt(self, action):
        try:
            action()
        except Exception:
            logging.warning("Tracing to %s failed; the run continues without it.", self.folder, exc_info=True)
