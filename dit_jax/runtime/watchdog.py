"""Ends a process in which nothing finishes any more, so that it can be started again: each phase of `phases` has its limit."""

import contextlib
import faulthandler
import functools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dit_jax.errors import UserError
from dit_jax.runtime import phases
from dit_jax.runtime.signals import STOPPED_STATUS, before_exit

T = TypeVar("T")
DEFAULT_SECONDS = 1800.0
LIMITS = {  # of each phase: the time in which something must finish, in units of log.watchdog_seconds; and what did not
    "step": (1.0, "no step has finished"),
    "data": (1.0, "no batch has been read"),
    "checkpoint": (1.0, "the checkpoint is not saved"),
    "restore": (4.0, "the state is neither restored nor created"),
    "compile": (4.0, "the training step is not compiled"),
    "preview": (4.0, "the preview is not drawn"),
    "scoring": (4.0, "the score did not advance"),
    "sampling": (4.0, "no images have been sampled"),
    "encoding": (4.0, "no images have been encoded"),
    "preparing": (4.0, "no images have been prepared"),
    "report": (4.0, "the report is not written"),
    "start or end": (4.0, "the run neither started nor ended"),
}
KEY = "dit_jax/watchdog"  # of JAX's coordination service
GONE = "left"  # in place of a phase: the process has left its watchdog, and says no more
MOST_SECONDS_BETWEEN = 5.0  # two exchanges of a process with the others
LEAVE_SECONDS = 10.0  # for the stacks, which a dead disk may keep from being written


_ending = threading.Lock()  # held by the thread that ends the process
_last: "Peers | None" = None


def wait_if_ending() -> None:
    """Waits for the end if a watchdog is ending this process: an error of the main thread is then that of an ended peer."""
    if _ending.locked():
        time.sleep(60)


def silent_peers() -> str:
    """Names the processes that died or stopped without a word, "" if there are none; takes some seconds if there are several."""
    return "" if _last is None else _last.silent()


class Watchdog:
    """Ends the process with STOPPED_STATUS if nothing finishes within the limit of the phase; a context manager.

    A process whose peer has died waits in a collective forever, and nothing in Python can interrupt it. The stacks of all threads
    are written to stderr and to `file` first. Data loading processes are ended too. Of several processes, the first that ends
    tells the others why; they end with their stacks too, and name it.

    The watchdog is a Python thread: it cannot act while C code holds the interpreter lock. A process that was stopped (Ctrl-Z)
    and continued is given its time again.

    Args:
        seconds: the unit of LIMITS; 0 turns it off. At least the time of several steps.
        file: the stacks are written to it as well as to stderr.
        more: {phase: seconds} to add to its limit.

    Raises:
        UserError: seconds is negative.
    """

    def __init__(self, seconds: float, file: Path | None = None, more: Mapping[str, float] | None = None):
        if not seconds >= 0:
            raise UserError(f"log.watchdog_seconds is {seconds}; it must be at least 0 (0 turns the watchdog off)")
        self.seconds, self.file, self.more = seconds, file, more or {}
        self.tick = min(seconds / 4, 10.0)
        self.status: Callable[[], str] = str  # what the loop waits for, for the message
        self._leaving = threading.Event()
        self._peers: Peers | None = None

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leaving.set()

    def limit(self, name: str) -> float:
        """Seconds within which something must finish in a phase."""
        return self.seconds * LIMITS[name][0] + self.more.get(name, 0.0)

    def _watch(self):
        slept = time.monotonic()
        while not self._leaving.wait(self.tick):
            woken = time.monotonic()
            if woken - slept > self.tick + 5.0:
                phases.beat()  # the process was stopped
            slept = woken
            if self._peers is None:
                self._peers = Peers.of_this_run(min(self.tick, MOST_SECONDS_BETWEEN), self._leaving, self._end)
            now, at = phases.current()
            waited = time.monotonic() - at
            if now is not None and waited > self.limit(now) and waited > self._limit_of_others():
                status = self.status()
                self._end(
                    False,
                    f"{LIMITS[now][1]} for {self.limit(now):g} s (log.watchdog_seconds is {self.seconds:g})"
                    f"{f', {status}' if status else ''}",
                )

    def _limit_of_others(self) -> float:
        """The longest limit of the phases in which other processes are at work: this one may wait for them."""
        busy = None if self._peers is None else _within(2.0, self._peers.busy)
        return max((self.limit(name) for name in busy or ()), default=0.0)

    def _end(self, told: bool, reason: str):
        if not _ending.acquire(blocking=False):
            return
        try:
            said = threading.Thread(target=self._say, args=(told, reason), daemon=True)
            said.start()
            said.join(LEAVE_SECONDS)
            for child in multiprocessing.active_children():
                child.kill()
            if self._peers is not None:
                # The others read the reason at their next exchange, for which the first process, which has it, must live.
                time.sleep((1.5 if self._peers.index else 3.0) * self._peers.every_seconds + 0.5)
        finally:
            os._exit(STOPPED_STATUS)

    def _say(self, told: bool, reason: str):
        which, others, peers = "", "", self._peers
        if peers is not None:
            which = f"process {peers.index} of {peers.count}: "
            if not told:
                others = _within(2.0, functools.partial(peers.tell, which + reason)) or ""
        also = f", also in {self.file}" if self.file is not None else ""
        print(
            f"watchdog: {which}{reason}{others}; ending with status {STOPPED_STATUS}; the same command goes on from what is "
            f"saved. Stacks of all threads{also}:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        if self.file is not None:
            with open(self.file, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        for tell in before_exit:
            tell(f"watchdog: {reason}", STOPPED_STATUS)


class Peers:
    """What the processes of a run tell one another through JAX's coordination service, on a thread of its own: it may not answer.

    Args:
        client: of the service.
        index, count: this process, and their number.
        every_seconds: time between two exchanges.
        leaving: ends the exchange.
        ended: called as ended(True, reason) when another process ends.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        every_seconds: float,
        leaving: threading.Event,
        ended: Callable[[bool, str], None],
    ):
        self.index, self.count, self.every_seconds = index, count, every_seconds
        self._client, self._leaving, self._ended = client, leaving, ended
        threading.Thread(target=self._exchange, name="watchdog peers", daemon=True).start()

    @classmethod
    def of_this_run(cls, *args: Any) -> "Peers | None":
        """None while this process is alone. args: every_seconds, leaving, ended."""
        if "jax" not in sys.modules:
            return None
        from jax._src import distributed

        state = distributed.global_state
        if state.client is None or (state.num_processes or 1) < 2:
            return None
        global _last
        _last = cls(state.client, int(state.process_id or 0), int(state.num_processes), *args)
        return _last

    def tell(self, reason: str) -> str:
        """Tells the others why this process ends; returns what they did last, as text."""
        self._client.key_value_set(f"{KEY}/ended", reason, allow_overwrite=True)
        said = [f"process {i} was heard of {age:.0f} s ago ({name or 'between phases'})" for i, name, age in self._others()]
        return "".join(f"; {text}" for text in said[:8])

    def busy(self) -> list[str]:
        """The phases of the other processes that respond."""
        return [name for _, name, age in self._others() if name in LIMITS and age < 3 * self.every_seconds + 1]

    def silent(self) -> str:
        """See `silent_peers`."""
        time.sleep(2 * self.every_seconds + 1)
        silent = _within(
            2.0, lambda: [str(i) for i, name, age in self._others() if name != GONE and age > 2 * self.every_seconds]
        )
        if silent is None:
            return "process 0 does not respond any more"
        return f"process {', '.join(silent)} of {self.count} does not respond any more" if silent else ""

    def _others(self) -> list[tuple[int, str | None, float]]:
        """(index, last phase, seconds since it was heard of) of each other process, in order."""
        others = []
        for key, value in self._client.key_value_dir_get(f"{KEY}/alive/"):
            index, (name, when) = int(key.rpartition("/")[2]), json.loads(value)
            if index != self.index:
                others.append((index, name, max(time.time() - when, 0.0)))
        return sorted(others)

    def _alive(self, name: str | None):
        self._client.key_value_set(f"{KEY}/alive/{self.index}", json.dumps([name, time.time()]), allow_overwrite=True)

    def _exchange(self):
        while not self._leaving.wait(self.every_seconds):
            reason = ""
            with contextlib.suppress(Exception):  # none has ended, or the first process has
                self._alive(phases.current()[0])
                reason = str(self._client.key_value_try_get(f"{KEY}/ended"))
            if reason:
                self._ended(True, reason)
        with contextlib.suppress(Exception):
            self._alive(GONE)


def _within(seconds: float, call: Callable[[], T]) -> T | None:
    """The result of a call that may fail or hang; None if it does."""
    results: list[T] = []

    def attempt():
        with contextlib.suppress(Exception):
            results.append(call())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
