"""SIGTERM and SIGINT as a request to save and stop, which all processes grant at the same step."""

import os
import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context manager during which the first SIGTERM or SIGINT is a request and the second ends the process at once.

    The second signal has the effect it had before: a handler installed by other code is called; Python's own
    KeyboardInterrupt is replaced by the system's default, because it would wait for open saves. A signal that was
    ignored (nohup) stays ignored. Enter it on the main thread.

    With several processes SIGTERM belongs to JAX's preemption service (`jax.distributed.initialize` installed it),
    which picks a step that no process has passed yet; a SIGINT is handed on to it. From that step on SIGTERM ends the
    process at once; before, only SIGKILL does.
    """

    def __init__(self):
        self._requested = False
        self._previous = {}

    def __enter__(self):
        mine = (signal.SIGINT,) if jax.process_count() > 1 else _SIGNALS
        for number in mine:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info):
        for number, handler in self._previous.items():
            # None stands for a handler installed by C code, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def requested(self, step):
        """True from the step on at which to save and stop, the same on all processes, which call this every step.

        Args:
            step: steps completed, increasing by one per call and starting equal on all processes.
        """
        if jax.process_count() > 1 and not self._requested and multihost_utils.reached_preemption_sync_point(step):
            self._requested = True  # JAX says so for this one step only
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            logging.warning("Stopping at step %d, as agreed by all processes.", step)
        return self._requested

    def _handle(self, number, frame):
        # No logging here: the signal may have interrupted the logger while it held its lock.
        name = signal.Signals(number).name
        os.write(2, f"{name}: saving and stopping after this step; a second signal ends the process at once\n".encode())
        for other, handler in self._previous.items():
            foreign = callable(handler) and handler is not signal.default_int_handler
            signal.signal(other, handler if foreign else signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._requested = True
