"""A trace of some training steps, for TensorBoard's profile page or XProf."""

import contextlib
from pathlib import Path

import jax
from absl import logging

from dit_jax.errors import UserError
from dit_jax.runtime.console import say


class Profile:
    """Writes what devices and host do in some steps to `folder`/plugins/profile/<time>/; a context manager.

    Look at it with `xprof --logdir=<folder>` or `tensorboard --logdir=<folder>`. Only the first process traces. A trace that
    cannot be made is said and does not stop the run.

    Args:
        start_step: steps that are done when the trace begins.
        num_steps: how many steps it holds, a few are enough; 0 turns it off.
        last_step: where the run ends.

    Raises:
        UserError: the steps are not all within the run.
    """

    def __init__(self, start_step: int, num_steps: int, *, last_step: int, folder: Path, enabled: bool = True):
        if start_step < 0 or num_steps < 0 or (num_steps and start_step + num_steps > last_step):
            raise UserError(
                f"profile.start_step = {start_step} and profile.num_steps = {num_steps}: a trace of so many steps "
                f"after that step does not lie within 0 to num_steps = {last_step}; profile.num_steps = 0 turns it "
                "off"
            )
        self.start_step, self.stop_step = start_step, start_step + num_steps
        self.folder, self.enabled, self.running = folder, enabled and num_steps > 0, False

    @contextlib.contextmanager
    def step(self, done: int):
        """Marks the block as the dispatch of the step after `done`; begins the trace where it is due."""
        if self.enabled and done == self.start_step:
            self._attempt(self._start)
        with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
            yield

    def finish(self, done: int, clock):
        """Ends the trace after its last step, which is waited for."""
        if self.running and done >= self.stop_step:
            clock.wait(done)
            self._attempt(self._stop)

    def resumed(self, done: int):
        """Says so if a run that goes on from `done` is past the steps to be traced."""
        if self.enabled and done > self.start_step:
            say(f"no trace: the run goes on from step {done}, after profile.start_step = {self.start_step}")

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
        say(f"trace of the steps to {self.stop_step} in {self.folder}; look at it with: tensorboard --logdir={self.folder}")

    def _attempt(self, action):
        try:
            action()
        except Exception:
            logging.warning("The run goes on without a trace in %s.", self.folder, exc_info=True)
