"""Signs of life of a loader's threads and worker processes, the end of workers with their parent, and of workers that hang."""

import contextlib
import faulthandler
import functools
import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

POLL_SECONDS = 0.25
START_SECONDS = 300.0  # for a worker to import what it needs
FRESH_SECONDS = 2.0  # a wait is over if its last sign is older
PID, READ, WAIT = range(3)  # columns: process id, time of the last record, time of the last failed try
COLUMNS = 4
# Columns of row 0: above 0 to stop all waits; begin of the outage, or 0; end of the last one; above 0 once a record was read.
STOP, SINCE, UNTIL, ANY = range(COLUMNS)

_row = 1  # of this process: 1 + its index in a worker, and 1 in a main process that reads by itself


class Heartbeats:
    """Times that threads and worker processes write and the main process reads; pickles as a reference to the same memory.

    Times are those of `time.monotonic`, which the processes of a machine share. The memory is anonymous, so that a kill leaves
    nothing behind. Where the system has no such memory (it is not Linux), the main process knows nothing of its workers.

    Fields:
        on_wait: called in the main process, in any thread, several times per second while the storage is away.
    """

    def __init__(self, num_workers: int = 0):
        self.num_workers = num_workers
        self.on_wait: Callable[[], None] | None = None
        self._owner, self._descriptor = os.getpid(), -1
        if num_workers and hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("dit_jax loader")
            os.ftruncate(self._descriptor, self._size)
        self._map(self._descriptor)

    @property
    def _size(self) -> int:
        return 8 * COLUMNS * (1 + max(self.num_workers, 1))

    def _map(self, descriptor: int) -> None:
        memory = mmap.mmap(descriptor, self._size)  # -1 is memory of this process alone
        self._cells = np.frombuffer(memory, np.float64).reshape(-1, COLUMNS)

    def __getstate__(self):
        return {"num_workers": self.num_workers, "_owner": self._owner, "_descriptor": self._descriptor}

    def __setstate__(self, state):
        self.__dict__.update(state, on_wait=None)
        if self._descriptor < 0:
            return self._map(-1)
        with open(f"/proc/{self._owner}/fd/{self._descriptor}", "r+b") as file:
            self._map(file.fileno())

    def read(self) -> None:
        """Notes that this process has read a record."""
        self._cells[_row, READ] = time.monotonic()
        self._cells[0, ANY] = 1

    def has_read(self) -> bool:
        """Whether any thread or worker has read a record."""
        return bool(self._cells[0, ANY])

    def wait(self, seconds: float) -> bool:
        """Waits for the storage, and notes it; returns whether `stop` was called meanwhile."""
        end = time.monotonic() + seconds
        while not self._cells[0, STOP]:
            now = time.monotonic()
            self._cells[_row, WAIT] = now
            if self.on_wait is not None:
                self.on_wait()
            if now >= end:
                return False
            time.sleep(min(POLL_SECONDS, end - now))
        return True

    def stop(self) -> None:
        """Ends every `wait`, now and later."""
        self._cells[0, STOP] = 1

    def begin_outage(self, tried: float) -> bool:
        """Notes that a read at time `tried` failed; returns whether that is news to a run that goes on."""
        new = not self._cells[0, SINCE] and tried > self._cells[0, UNTIL] and not self._cells[0, STOP]
        if new:
            self._cells[0, SINCE] = tried
        return bool(new)

    def end_outage(self) -> float | None:
        """Notes that the storage is back; returns how many seconds it was away, or None if that is no news."""
        since, now = float(self._cells[0, SINCE]), time.monotonic()
        self._cells[0, [SINCE, UNTIL]] = 0, now
        return now - since if since else None

    def waits(self) -> bool:
        """Whether a thread or a worker waits for the storage."""
        return bool(time.monotonic() - self._cells[1:, WAIT].max() < FRESH_SECONDS)

    def pid(self, worker: int) -> int:
        """Process id of a worker; 0 before it has started."""
        return int(self._cells[1 + worker, PID])

    def last(self, worker: int) -> float:
        """Time of the last sign of life of a worker, 0 before the first."""
        return float(self._cells[1 + worker, [READ, WAIT]].max())

    def name(self, worker: int) -> str:
        """ "worker 1 of 2 (process 4711) of the data loader", for messages; workers are numbered from 0."""
        pid = self.pid(worker)
        return f"worker {worker} of {self.num_workers} ({f'process {pid}' if pid else 'not started'}) of the data loader"

    def close(self) -> None:
        """Closes the descriptor; workers cannot start any more."""
        if self._descriptor >= 0 and self._owner == os.getpid():
            os.close(self._descriptor)
        self._descriptor = -1


def worker_start(heartbeats: Heartbeats) -> Callable[[int, int], None]:
    """The function that grain calls first in each worker process, with (its index, number of workers)."""
    return functools.partial(_start, heartbeats, os.getpid())


def _start(heartbeats: Heartbeats, parent: int, index: int, count: int) -> None:
    global _row
    _row = 1 + index
    heartbeats._cells[_row, : READ + 1] = os.getpid(), time.monotonic()
    threading.Thread(target=_end_with, args=(parent,), name="end with the parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1)  # the stacks of a worker that hangs


def _end_with(parent: int) -> None:
    # Not prctl(PR_SET_PDEATHSIG): that is the death of the thread that started this process, which grain ends at once.
    while os.getppid() == parent:
        time.sleep(2 * POLL_SECONDS)
    os._exit(1)  # multiprocessing's resource tracker then removes the shared memory


class Monitor:
    """Watches the workers while the main process waits for a batch; a context manager, whose exit ends its thread.

    While the storage is away, it calls `heartbeats.on_wait`. A worker that shows no sign of life for `seconds` (0: any time)
    writes its stacks to stderr and is killed, so that the wait for its batch ends with an error.

    Fields:
        hung: the worker that was killed, or None.
    """

    def __init__(self, heartbeats: Heartbeats, seconds: float):
        self.heartbeats, self.seconds = heartbeats, seconds
        self.hung: int | None = None
        self._awaited: tuple[int, float] | None = None  # worker, since
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="monitor of the data loader", daemon=True).start()

    @contextlib.contextmanager
    def waiting(self, worker: int) -> Iterator[None]:
        """The main process waits for this worker during the block."""
        self._awaited = worker, time.monotonic()
        try:
            yield
        finally:
            self._awaited = None

    def silent(self) -> tuple[int, float]:
        """(worker that is waited for, seconds since its last sign of life and since the wait began); (-1, 0) if there is none."""
        if (awaited := self._awaited) is None:
            return -1, 0.0
        worker, since = awaited
        return worker, time.monotonic() - max(since, self.heartbeats.last(worker))

    def close(self) -> None:
        self._closing.set()

    def _watch(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            if self.heartbeats.on_wait is not None and self.heartbeats.waits():
                self.heartbeats.on_wait()
            worker, seconds = self.silent()
            pid = self.heartbeats.pid(worker) if worker >= 0 else 0
            if self.seconds and seconds > (self.seconds if pid else max(self.seconds, START_SECONDS)):
                self.hung = worker
                self._kill(pid)
                return

    def _kill(self, pid: int) -> None:
        """Kills the worker; all of them if it has not got to the point at which it says which it is."""
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
                time.sleep(1.0)
        for child in multiprocessing.active_children():
            if child.name.startswith("grain") and pid in (0, child.pid):
                child.kill()
