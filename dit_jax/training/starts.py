"""The log of a run's starts: `starts.jsonl`, two lines per start, one when it begins and one when it ends.

{"start": id, "time": unix seconds, "versions", "commit", "host", "num_processes", "devices", "first_step", "num_steps"}
{"start": id, "time", "last_step", "ended": why, "status": exit status}

A start without a second line was killed, or is running.
"""

import contextlib
import platform
import secrets
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging

from dit_jax.errors import TemporaryFailure, UserError
from dit_jax.parallel import hosts
from dit_jax.runtime import signals, versions
from dit_jax.runtime.command_line import USER_ERROR_STATUS
from dit_jax.storage.atomic import append_json
from dit_jax.training.records import read_lines

FILE = "starts.jsonl"
MOST_TEXT = 300  # characters of an error that are kept


class Start:
    """One start of a run; a context manager that records how it ended. A log that cannot be written never ends the run.

    Fields:
        step: number of completed steps, which the loop updates.
    """

    def __init__(self, workdir: Path):
        self.step = 0
        self._file, self._id, self._open = workdir / FILE, secrets.token_hex(4), False

    def begin(self, step: int, num_steps: int) -> None:
        """Records that the run goes on from `step`. Only the first process writes."""
        self.step = step
        self._open = hosts.is_first()
        self._append(
            time=time.time(),
            versions=versions.versions("jax"),
            commit=versions.commit(),
            host=platform.node(),
            num_processes=jax.process_count(),
            devices=f"{jax.device_count()} x {versions.device_kind()}",
            first_step=step,
            num_steps=num_steps,
        )

    def end(self, why: str, status: int) -> None:
        """Records how the start ended; the first call counts. It may be called in a signal handler."""
        self._append(time=time.time(), last_step=self.step, ended=why, status=status)
        self._open = False

    def _append(self, **facts: Any):
        if not self._open:
            return
        try:
            append_json(self._file, {"start": self._id, **facts})
        except OSError as error:
            self._open = False
            logging.warning("Cannot write %s (%s); the run continues without.", self._file, error.strerror)

    def __enter__(self):
        signals.before_exit.append(self.end)
        return self

    def __exit__(self, kind, error, trace):
        with contextlib.suppress(ValueError):
            signals.before_exit.remove(self.end)
        if error is not None:
            text = " ".join(str(error).split())[:MOST_TEXT]
            statuses = ((UserError, USER_ERROR_STATUS), (TemporaryFailure, signals.STOPPED_STATUS), (BaseException, 1))
            status = next(status for kind_of_error, status in statuses if isinstance(error, kind_of_error))
            self.end(f"{kind.__name__}: {text}", status)


def read(workdir: Path) -> list[dict[str, Any]]:
    """The starts of a run in order, each with the entries of both lines; [] for a run that has no log."""
    starts: dict[str, dict[str, Any]] = {}
    for line in read_lines(workdir / FILE):
        if isinstance(line, dict) and isinstance(line.get("start"), str):
            starts[line["start"]] = starts.get(line["start"], {"began": line.get("time")}) | line
    return list(starts.values())
