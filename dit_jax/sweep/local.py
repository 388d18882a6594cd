"""Runs a sweep on this machine, one `python -m dit_jax.main` process after another, so that a failure affects one run only."""

import datetime
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dit_jax.benchmark import machine
from dit_jax.runtime.console import STOPPED_STATUS, duration, say
from dit_jax.sweep.cost import Cost
from dit_jax.sweep.folder import Folder
from dit_jax.sweep.grid import Run

ERROR_LINES = 8
SAY_EVERY_SECONDS = 30.0


class Child:
    """Runs one process at a time; the first SIGINT or SIGTERM makes it save and stop, the second kills it.

    A context manager; `stopping` is True after a signal.

    Args:
        lock: descriptor of the folder's lock, which the process holds too: if the sweep is killed, its run continues to train,
            and another sweep must not start the run a second time.
    """

    def __init__(self, lock: int | None = None):
        self.stopping = False
        self._process: subprocess.Popen | None = None
        self._previous = {}
        self._kept = () if lock is None else (lock,)

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _handle(self, number, frame):
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL if self.stopping else signal.SIGTERM)
        self.stopping = True

    def run(self, command: list[str], log: Path, each_while: Callable = lambda: None) -> tuple[int, str, float]:
        """Runs a command; returns (exit status, last line of stdout, seconds).

        Stderr is appended to the log. `each_while` is called every SAY_EVERY_SECONDS.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with open(log, "a") as errors, tempfile.TemporaryFile("w+") as output:
            errors.write(f"$ {shlex.join(command)}\n")
            errors.flush()
            # It has its own session. Otherwise the terminal's Ctrl-C would reach it in addition to our signal, and a second
            # signal ends it immediately.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True, pass_fds=self._kept
            )
            if self.stopping:  # the signal arrived before the start
                self._process.send_signal(signal.SIGTERM)
            while True:
                try:
                    status = self._process.wait(SAY_EVERY_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    each_while()
            output.seek(0)
            lines = output.read().strip().splitlines()
        return status, lines[-1] if lines else "", time.monotonic() - start


@dataclass
class Pace:
    """Estimates the seconds of runs from finished ones, by a linear fit in compute if there are different sizes."""

    seen: list[tuple[float, float]] = field(default_factory=list)

    def expect(self, compute: float) -> float:
        """Expected seconds for this compute; requires at least one finished run."""
        computes, seconds = np.asarray(self.seen).T
        if np.ptp(computes) < 0.1 * computes.max():
            return float(seconds.mean())
        slope, fixed = np.polyfit(computes, seconds, 1)
        return max(float(fixed + slope * compute), float(seconds.min()))


def main_command(run: Run, workdir: Path | str) -> list[str]:
    return ["-m", "dit_jax.main", *run.flags, f"--workdir={workdir}"]


def last_lines(log: Path, count: int = ERROR_LINES) -> list[str]:
    return log.read_text(errors="replace").rstrip().splitlines()[-count:] if log.exists() else []


def train(run: Run, folder: Folder, child: Child) -> str:
    """Trains or resumes one run; returns "done", "failed" or "stopped"."""
    where = folder.of(run)
    log = where / "log.txt"

    def show():
        line = next((x for x in reversed(last_lines(log, 20)) if x.startswith(("step ", "sampl"))), None)
        if line:
            say(f"    {line}")

    command = [sys.executable, *main_command(run, where)]
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    status, _, seconds = child.run(command, log, show)
    attempts = where / "attempts.jsonl"
    broken = attempts.exists() and not attempts.read_bytes().endswith(b"\n")  # by a kill
    with open(attempts, "a") as file:
        file.write(
            "\n" * broken
            + json.dumps(
                {
                    "command": shlex.join(["python", *command[1:]]),
                    "started": started,
                    "seconds": seconds,
                    "machine": f"{machine.cpu_model()}, {machine.cores()} cores",
                    "status": STOPPED_STATUS if child.stopping and status else status,
                }
            )
            + "\n"
        )
    if status == 0:
        return "done"
    return "stopped" if child.stopping or status == STOPPED_STATUS else "failed"


def train_all(runs: list[Run], costs: list[Cost], folder: Folder, child: Child) -> list[str]:
    """Trains unfinished runs in order; returns the names of failed runs. Ends early if stopped (child.stopping).

    A failed run does not end the sweep; the next start tries it again.
    """
    waiting = [(run, cost) for run, cost in zip(runs, costs, strict=True) if folder.state(run) != "done"]
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished")
    pace, failed = Pace(), []
    for i, (run, cost) in enumerate(waiting):
        left = f", about {duration(sum(pace.expect(c.compute_gmacs) for _, c in waiting[i:]))} left" if pace.seen else ""
        say(
            f"run {i + 1} of {len(waiting)}: {run.name} ({cost.parameters:,} parameters, {cost.gmacs:.4g} GMACs){left}; "
            f"log in {folder.of(run) / 'log.txt'}"
        )
        whole = folder.state(run) == "new"
        outcome = train(run, folder, child)
        if outcome == "stopped":
            child.stopping = True
            return failed
        if outcome == "failed":
            failed.append(run.name)
            say(f"{run.name} FAILED; the sweep continues. Its last lines:")
            for line in last_lines(folder.of(run) / "log.txt"):
                say(f"    {line}")
            continue
        result = folder.result(run)
        assert result is not None  # a run that is done has one
        if whole:
            pace.seen.append((cost.compute_gmacs, folder.attempts(run)[-1]["seconds"]))
        say(f"    done: loss {result['loss']}" + (f", Frechet distance {result['fid']:.4g}" if "fid" in result else ""))
        if child.stopping:
            return failed
    return failed
