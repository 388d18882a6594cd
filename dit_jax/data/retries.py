"""Reads that are repeated while the storage is away: a network file system that restarts, a disk that is mounted again."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from dit_jax.data.heartbeats import Heartbeats
from dit_jax.errors import TemporaryFailure, Unavailable, UserError

RETRY_SECONDS = 300.0  # default of loader.retry_seconds
MISSING_SECONDS = 10.0  # for a missing file, if other records can be read
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0

T = TypeVar("T")
_saying = threading.Lock()


def unavailable(error: OSError, name: str) -> Unavailable:
    """The error of a record whose source raised an OSError."""
    return Unavailable(f"{name} cannot be read ({error.strerror})", isinstance(error, FileNotFoundError))


def check_retry_seconds(seconds: float) -> None:
    """Raises a UserError if the number of seconds is negative."""
    if not seconds >= 0:
        raise UserError(f"retry_seconds={seconds} must be at least 0; 0 reads once")


class Retries:
    """Calls a read again, with back-off, while it raises Unavailable; for many threads at once.

    The first failure prints one line, for all threads and workers, and so does the end of the outage.

    Args:
        seconds: time after the first failure at which a read is given up.
    """

    def __init__(self, seconds: float, heartbeats: Heartbeats):
        self.seconds, self.heartbeats = seconds, heartbeats

    def __call__(self, read: Callable[[], T], others: Callable[[], bool] = lambda: False) -> T:
        """read(), repeated while it raises Unavailable.

        others: whether another record can be read: a missing file is then given up after MISSING_SECONDS.

        Raises:
            Unavailable: that of the last try.
            TemporaryFailure: the run was asked to stop while this waited.
        """
        start, pause, last = time.monotonic(), FIRST_PAUSE, False
        while True:
            tried = time.monotonic()
            try:
                result = read()
            except Unavailable as error:
                waited = tried - start
                if last or waited >= self.seconds:
                    self.heartbeats.end_outage()
                    raise
                self._say_away(error, tried)
                if error.missing and waited >= MISSING_SECONDS and others():
                    last = True  # once more, as the storage may have come back between the two reads
                    continue
                if self.heartbeats.wait(min(pause, self.seconds - waited)):
                    raise TemporaryFailure(f"stopped while the data was away: {error}") from error
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if pause > FIRST_PAUSE:
                    self._say_back()
                return result

    def _say_away(self, error: Unavailable, tried: float) -> None:
        with _saying:
            if self.heartbeats.begin_outage(tried):
                _say(f"data: {error}; trying again for {self.seconds:g} s (loader.retry_seconds)")

    def _say_back(self) -> None:
        with _saying:
            seconds = self.heartbeats.end_outage()
        if seconds is not None:
            _say(f"data: readable again after {seconds:.1f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # not console.say: in a worker it would start JAX's devices


def given_up(error: Unavailable, seconds: float) -> TemporaryFailure:
    """The error that ends the run."""
    return TemporaryFailure(f"the data cannot be read any more, after {seconds:g} s of trying (loader.retry_seconds): {error}")
