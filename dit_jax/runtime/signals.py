"""Turns SIGTERM, SIGINT and SIGHUP into a request to save and stop; all processes stop at the same step.

A verb that continues where it was stopped begins with `end_at_once`: while there is nothing to save, a signal ends it. Within
`StopSignal` there is: the first signal requests a stop, the second ends the process. Ignored signals (nohup) stay ignored.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from absl import logging

STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: no error; the same command resumes, and launch/ starts it again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Called with (why, exit status) before the process ends without leaving its contexts, as by a signal or the watchdog.
before_exit: list[Callable[[str, int], object]] = []


def end_at_once() -> None:
    """From here on, a signal ends the process with STOPPED_STATUS and one line on stderr. Call it on the main thread.

    For a verb whose files are whole at every moment, and which continues when it is called again.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    _write(number, "stopped; the same command goes on")
    for tell in before_exit:
        tell(signal.Signals(number).name, STOPPED_STATUS)
    for child in multiprocessing.active_children():  # the data loader's
        child.kill()
    os._exit(STOPPED_STATUS)


def _write(number: int, text: str) -> None:
    # No logging and no print: the signal may have interrupted them while they held their lock.
    start = "\n" if os.isatty(2) else ""  # the line has a progress bar and "^C"
    os.write(2, f"{start}{signal.Signals(number).name}: {text}\n".encode())


class StopSignal:
    """A context manager: the first SIGTERM, SIGINT or SIGHUP requests a stop, the second ends the process immediately.

    The second signal has its previous effect: a handler installed by other code is called. Python's own KeyboardInterrupt is
    replaced by the system's default, because it would wait for open saves; so is `end_at_once`. Enter the context on the main
    thread.

    unsaved: whether there is something to save. While it is False, and after `end_at_once`, the first signal ends the process.
    on_request: called in the handler of the first signal; it must be safe there.

    With several processes, a signal to one stops all at the same step. A cluster signals its hosts seconds apart, so every host
    may still receive its first signal after it has started to stop. That signal does not end the process, not even after the
    context.
    """

    def __init__(self, unsaved: bool = True):
        self.unsaved = unsaved
        self.on_request: Callable[[], None] | None = None
        self._asked = self._stopping = False
        self._previous = {}
        self._agreement: Any = None

    def __enter__(self):
        import jax  # after `end_at_once`, as that takes a second

        from dit_jax.parallel.hosts import SharedFlag
        from dit_jax.runtime.step_clock import IN_FLIGHT

        if jax.process_count() > 1:
            self._agreement = SharedFlag(delay=IN_FLIGHT)
            self.unsaved = True  # one of several that leaves alone would have the others wait for it
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info):
        if self._stopping and not self._asked:
            return
        for number, handler in self._previous.items():
            # None stands for a handler installed by C code, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def asked(self) -> bool:
        """Whether this process has received a signal."""
        return self._asked

    def requested(self, step: int) -> bool:
        """True from the step at which to save and stop; it is the same step on all processes.

        Call it on all processes after every step.

        Args:
            step: number of completed steps. Several processes stop IN_FLIGHT steps after the request.
        """
        if self._agreement is None:
            self._stopping = self._asked
        elif not self._stopping and self._agreement.seen(self._asked):
            self._stopping = True
            logging.warning("Stopping at step %d, as agreed by all processes.", step)
        return self._stopping

    def _handle(self, number, frame):
        if not self.unsaved and self._previous[number] is _end:
            _end(number, frame)
        for other, handler in self._previous.items():
            foreign = callable(handler) and handler not in (signal.default_int_handler, _end)
            signal.signal(other, handler if foreign else signal.SIG_DFL)
        self._asked = True
        if self.on_request is not None:
            self.on_request()
        _write(number, "saving and stopping; a second signal ends the process immediately")
