"""When training steps really finish, and what the devices waited for in between."""

import contextlib
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass

import jax

IN_FLIGHT = 2  # steps handed to the devices and not finished: one that runs, one that is ready to follow it
KINDS = ("init", "compile", "data", "checkpoint", "preview", "scoring", "other")
UNWATCHED = ("compile", "preview", "scoring")  # of these nobody knows how long they may take


@dataclass(frozen=True)
class Finished:
    """A step that is done; all times in seconds.

    Fields:
        at: when it finished, of `time.monotonic`.
        dispatched: when the host handed it to the devices.
        seconds: how long the devices worked on it: from its dispatch, or from the end of the step before it if that was later.
        waited: what the host did before it could dispatch the step: kind -> how long.
        idle: the part of `waited` in which the devices had nothing to do, because the step before was finished.
    """

    step: int
    at: float
    dispatched: float
    seconds: float
    waited: Counter
    idle: Counter


class StepClock:
    """Times the steps of a loop that runs ahead of the devices, without stopping either.

    JAX returns from a step when it is handed over, not when it is done, so that the time between two calls says nothing about
    the devices; waiting for each result would leave them without work. Here a thread waits for a small output of every step,
    in order, and notes when it is there. The loop itself waits only where it would be more than IN_FLIGHT steps ahead.

    Time begins with the object. A context manager that ends the thread.
    """

    def __init__(self):
        self.begin = time.monotonic()
        self.alive_at = None  # when something last finished; None while no step is to be expected
        self._finished: list[Finished] = []
        self._step, self._at = 0, self.begin
        self._spans, self._queue, self._error = [], queue.SimpleQueue(), None
        self._changed = threading.Condition()
        self._thread = None
        self._productive, self._idle = 0.0, Counter()

    @contextlib.contextmanager
    def spend(self, kind: str):
        """Counts the time of the block as the host's time for `kind`."""
        start, watched = time.monotonic(), self.alive_at is not None
        if kind in UNWATCHED:
            self.alive_at = None
        try:
            yield
        finally:
            self._spans.append((kind, start, time.monotonic()))
            if watched:
                self.alive_at = time.monotonic()

    def dispatched(self, step: int, when: float, output: jax.Array):
        """Notes a step that was handed over.

        Args:
            step: its number; one more than the last.
            when: `time.monotonic()` just before.
            output: an array that the step computes and nobody donates.
        """
        if self._thread is None:
            self._step = step - 1
            self._thread = threading.Thread(target=self._watch, name="step clock", daemon=True)
            self._thread.start()
        if self.alive_at is None:
            self.alive_at = when
        spans, self._spans = self._spans, []
        self._queue.put((step, when, output, spans))

    def wait(self, step: int):
        """Returns once `step` and all before it are finished; raises what made one fail."""
        if self._thread is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._step >= step or self._error is not None)
            if self._error is not None:
                raise self._error

    def take(self, step: int) -> list[Finished]:
        """The steps up to `step`, waited for, that were not taken before."""
        self.wait(step)
        with self._changed:
            taken = [x for x in self._finished if x.step <= step]
            self._finished = self._finished[len(taken) :]
        return taken

    def summary(self) -> dict[str, float]:
        """Where the time went since the clock began; call when every step is finished.

        Returns:
            goodput: share of `wall_seconds` in which the devices worked on training steps.
            idle_<kind>_seconds: when they had no step because of the host: init (reading, restoring, creating), compile, data,
                checkpoint, preview, scoring, other. Together with the steps these are the wall time.
        """
        now = time.monotonic()
        with self._changed:
            idle = self._idle + self._idle_until(now, self._spans, self._thread is None)
        wall = now - self.begin
        return {"goodput": self._productive / wall, "wall_seconds": wall} | {f"idle_{kind}_seconds": idle[kind] for kind in KINDS}

    def __enter__(self):
        return self

    def __exit__(self, exc_type, *rest):
        self.alive_at = None
        if self._thread is not None:
            self._queue.put(None)
            if exc_type is None:
                self._thread.join()

    def _watch(self):
        """Runs in the thread."""
        first = True
        while (item := self._queue.get()) is not None:
            step, when, output, spans = item
            try:
                jax.block_until_ready(output)
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
                self._finished.append(Finished(step, at, when, at - max(when, self._at), waited, idle))
                self._productive += at - max(when, self._at)
                self._idle += idle
                self._step, self._at = step, at
                if self.alive_at is not None:
                    self.alive_at = at
                self._changed.notify_all()
            first, output, item = False, None, None

    def _idle_until(self, when: float, spans, first: bool) -> Counter:
        """What the devices waited for from the end of the last step to `when`: kind -> seconds."""
        idle = Counter()
        for kind, start, end in spans:
            idle[kind] += max(0.0, end - max(start, self._at))
        rest = max(0.0, when - self._at - idle.total())
        idle["init" if first else "other"] += rest  # type: ignore[assignment]  # typeshed has a Counter of int alone
        return idle
