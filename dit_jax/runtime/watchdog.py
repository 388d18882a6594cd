"""Ends a run that hangs, so that it can be restarted."""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

from dit_jax.errors import UserError
from dit_jax.runtime.signals import STOPPED_STATUS, tell_before_exit
from dit_jax.runtime.step_clock import StepClock


class Watchdog:
    """Ends the process with STOPPED_STATUS if no step finishes for `seconds`; a context manager.

    A process whose peer has died waits in a collective forever, and nothing in Python can interrupt it. Compilation, previews and
    everything before the first step do not count (see `StepClock.spend`); loading data and saving do. The stacks of all threads
    are written to stderr and to `file` first. Data loading processes are ended too.

    The watchdog is a Python thread: it cannot act while C code holds the interpreter lock.

    Args:
        seconds: 0 turns it off; otherwise at least the time of several steps.
        file: the stacks are written to it as well as to stderr.

    Raises:
        UserError: seconds is negative.
    """

    def __init__(self, seconds: float, file: Path, clock: StepClock):
        if not seconds >= 0:
            raise UserError(f"log.watchdog_seconds is {seconds}; it must be at least 0 (0 turns the watchdog off)")
        self.seconds, self.file, self.clock = seconds, file, clock
        self._leaving = threading.Event()

    def __enter__(self):
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self._leaving.set()

    def _watch(self):
        while not self._leaving.wait(min(self.seconds / 4, 10.0)):
            alive_at = self.clock.alive_at
            if alive_at is not None and time.monotonic() - alive_at > self.seconds:
                self._end()

    def _end(self):
        try:
            print(
                f"watchdog: no step has finished for {self.seconds:g} s (log.watchdog_seconds); ending with status "
                f"{STOPPED_STATUS}; start again to resume from the last checkpoint. Stacks of all threads, also in {self.file}:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
            with open(self.file, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            for child in multiprocessing.active_children():
                child.kill()
            tell_before_exit(f"watchdog: no step for {self.seconds:g} s", STOPPED_STATUS)
        finally:  # also if the disk is full
            os._exit(STOPPED_STATUS)
