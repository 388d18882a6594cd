"""Ends a run that hangs, so that whoever started it can start it again."""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

from dit_jax.errors import UserError
from dit_jax.runtime.console import STOPPED_STATUS
from dit_jax.runtime.step_clock import StepClock


class Watchdog:
    """Ends the process with STOPPED_STATUS when no step has finished for `seconds`; a context manager.

    A process whose peer has died waits in a collective for ever, and nothing in Python interrupts it. Compiling and previews
    are not counted, see `StepClock.spend`, nor is anything before the first step; loading of data and saving are. First the
    stacks of all threads go to stderr and to `file`. Data loading processes are ended too.

    The watch is a Python thread: it cannot act while C code holds the interpreter's lock.

    Args:
        seconds: 0 turns it off. At least several steps' time.
        file: where the stacks are written, beside stderr.

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
                f"{STOPPED_STATUS}, start again to go on from the last checkpoint. Stacks of all threads, also in {self.file}:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
            with open(self.file, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            for child in multiprocessing.active_children():
                child.kill()
        finally:  # a full disk must not keep it alive
            os._exit(STOPPED_STATUS)
