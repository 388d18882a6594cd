"""Measures when training steps finish on the devices and what the devices waited for."""

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dit_jax.runtime import phases

IN_FLIGHT = 2  # steps dispatched but not finished: one that runs and one that is ready to follow
KINDS = ("init", "compile", "data", "checkpoint", "preview", "scoring", "other")


@dataclass(frozen=True)
class Finished:
    """A finished step; all times are in seconds.

    Fields:
        at: time at which it finished, by `time.monotonic`.
        dispatched: time at which the host dispatched it.
        seconds: time the devices worked on it: from its dispatch, or from the end of the previous step if that was later.
        waited: time the host spent before it dispatched the step, by kind.
        idle: the part of `waited` during which the devices had no work because the previous step was finished.
        output: of the step, on the host; see `StepClock.dispatched`.
    """

    step: int
    at: float
    dispatched: float
    seconds: float
    waited: Counter
    idle: Counter
    output: Any = None


class StepClock:
    """Times the steps of a loop that runs ahead of the devices, without stalling the loop or the devices.

    JAX dispatches asynchronously: a call returns before the step is done, so the time between two calls says nothing about the
    devices, and blocking on each result would leave them without work. A thread therefore blocks on a small output of every step,
    in order, and records when it is ready. The loop itself waits only if it would be more than IN_FLIGHT steps ahead.

    Time starts when the object is created. As a context manager, it ends the thread on exit.
    """

    def __init__(self):
        self.begin = time.monotonic()
        self._finished: list[Finished] = []
        self._step, self._at = 0, self.begin
        self._spans, self._queue, self._error = [], queue.SimpleQueue(), None
        self._changed = threading.Condition()
        self._thread = None
        self._productive, self._idle = 0.0, Counter()

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Records the time of the block as host time of `kind`, which is also the watchdog's phase; "other" counts as "step"."""
        start = time.monotonic()
        try:
            with phases.phase("step" if kind == "other" else kind):
                yield
        finally:
            self._spans.append((kind, start, time.monotonic()))

    def dispatched(self, step: int, when: float, output: jax.Array) -> None:
        """Records that a step was dispatched.

        Args:
            step: its number; one more than the last.
            when: `time.monotonic()` just before the call.
            output: an array that the step computes and that is not donated.
        """
        if self._thread is None:
            self._step = step - 1
            self._thread = threading.Thread(target=self._watch, name="step clock", daemon=True)
            self._thread.start()
        spans, self._spans = self._spans, []
        self._queue.put((step, when, output, spans))

    def wait(self, step: int) -> None:
        """Blocks until `step` and all earlier steps are finished; raises the error of a step that failed."""
        if self._thread is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._step >= step or self._error is not None)
            if self._error is not None:
                raise self._error

    def take(self, step: int) -> list[Finished]:
        """Waits for `step`; returns the finished steps up to it that were not taken before."""
        taken = self.peek(step)
        with self._changed:
            self._finished = self._finished[len(taken) :]
        return taken

    def peek(self, step: int) -> list[Finished]:
        """Waits for `step`; returns what `take` would, and takes nothing."""
        self.wait(step)
        with self._changed:
            return [x for x in self._finished if x.step <= step]

    def summary(self) -> dict[str, float]:
        """Goodput and idle times since the clock started; call when every step is finished.

        Returns:
            goodput: share of `wall_seconds` during which the devices worked on training steps.
            idle_<kind>_seconds: time without a step because of the host: init (reading, restoring, creating), compile, data,
                checkpoint, preview, scoring, other. Together with the steps they add up to the wall time.
        """
        now = time.monotonic()
        with self._changed:
            idle = self._idle + self._idle_until(now, self._spans, self._thread is None)
        wall = now - self.begin
        return {"goodput": self._productive / wall, "wall_seconds": wall} | {f"idle_{kind}_seconds": idle[kind] for kind in KINDS}

    def __enter__(self):
        return self

    def __exit__(self, exc_type, *rest):
        if self._thread is not None:
            self._queue.put(None)
            if exc_type is None:
                self._thread.join()

    def _watch(self):
        """The thread's loop: blocks on outputs and records times."""
        first = True
        while (item := self._queue.get()) is not None:
            step, when, output, spans = item
            try:
                output = np.asarray(jax.block_until_ready(output))  # no memory of the devices is kept
            except Exception as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            at = time.monotonic()
            waited = Counter()
            for kind, start, end in spans:
                waited[kind] += end - start
            with self._changed:
                idle = self._idle_until(when, spans, first)
                self._finished.append(Finished(step, at, when, at - max(when, self._at), waited, idle, output))
                self._productive += at - max(when, self._at)
                self._idle += idle
                self._step, self._at = step, at
                self._changed.notify_all()
            phases.beat("step")
            first, output, item = False, None, None

    def _idle_until(self, when: float, spans, first: bool) -> Counter:
        """Idle seconds of the devices by kind, from the end of the last step to `when`."""
        idle = Counter()
        for kind, start, end in spans:
            idle[kind] += max(0.0, end - max(start, self._at))
        rest = max(0.0, when - self._at - idle.total())
        idle["init" if first else "other"] += rest  # type: ignore[assignment]  # typeshed has a Counter of int alone
        return idle
