"""Turns SIGTERM and SIGINT into a request to save and stop; all processes stop at the same step."""

import os
import signal

import jax
from absl import logging

from dit_jax.parallel.hosts import SharedFlag
from dit_jax.runtime.step_clock import IN_FLIGHT

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context manager: the first SIGTERM or SIGINT requests a stop, the second ends the process immediately.

    The second signal has its previous effect: a handler installed by other code is called. Python's own KeyboardInterrupt is
    replaced by the system's default, because it would wait for open saves. A signal that was ignored (nohup) stays ignored. Enter
    the context on the main thread.

    With several processes, a signal to one stops all at the same step. A cluster signals its hosts seconds apart, so every host
    may still receive its first signal after it has started to stop. That signal does not end the process, not even after the
    context.
    """

    def __init__(self):
        self._asked = self._stopping = False
        self._previous = {}
        self._agreement = None

    def __enter__(self):
        if jax.process_count() > 1:
            self._agreement = SharedFlag(delay=IN_FLIGHT)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info):
        if self._stopping and not self._asked:
            return
        for number, handler in self._previous.items():
            # None stands for a handler installed by C code, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

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
        for other, handler in self._previous.items():
            foreign = callable(handler) and handler is not signal.default_int_handler
            signal.signal(other, handler if foreign else signal.SIG_DFL)
        self._asked = True
        # No logging here: the signal may have interrupted the logger while it held its lock.
        name = signal.Signals(number).name
        start = "\n" if os.isatty(2) else ""  # the line has a progress bar and "^C"
        os.write(2, f"{start}{name}: saving and stopping; a second signal ends the process immediately\n".encode())
