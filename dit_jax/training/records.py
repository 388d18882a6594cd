"""Metrics of a run: `metrics.jsonl`, one JSON object per line, TensorBoard events under `tensorboard/`, and W&B if enabled."""

import contextlib
import functools
import importlib
import json
import math
import operator
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging

from dit_jax.errors import NotFinite, TemporaryFailure, UserError
from dit_jax.storage.atomic import write_atomic
from dit_jax.training.tensorboard import TensorBoard

MOST_WAITING = 1_000  # records of a sink that hangs; later ones are dropped
MOST_PREVIEWS = 2  # of these, which are larger
MOST_SECONDS = {"previews": 60.0, "metrics.jsonl": 10.0, "tensorboard": 10.0, "wandb": 60.0}  # that closing a sink may take


class Sink:
    """Runs writes in order on a thread of its own. One that fails or hangs costs records, and never stops the run.

    dropped: number of records that were not written.
    """

    def __init__(self, name: str, workdir: str):
        self.name, self.workdir, self.dropped = name, workdir, 0
        self._writes: queue.Queue[Callable[[], object]] = queue.Queue(MOST_PREVIEWS if name == "previews" else MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def __call__(self, write: Callable[[], object]) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"records in {self.name}", daemon=True)
                self._thread.start()
        try:
            self._writes.put_nowait(write)
        except queue.Full:
            self._failed("it does not respond")

    def wait(self) -> None:
        """Waits for the writes so far, at most MOST_SECONDS."""
        done, seconds, start = threading.Event(), MOST_SECONDS[self.name], time.monotonic()
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._writes.put(done.set, timeout=seconds)
                done.wait(seconds - (time.monotonic() - start))

    def leave(self) -> None:
        """Waits as `wait`; what is not written by then counts as dropped."""
        self.wait()
        if waiting := self._writes.qsize():
            self._failed("it does not respond", waiting)

    def _run(self):
        while True:
            try:
                self._writes.get()()
            except Exception as error:
                self._failed(f"{type(error).__name__}: {error}")

    def _failed(self, why: str, count: int = 1):
        if not self.dropped:
            logging.warning("Cannot write %s in %s (%s); the run continues without them.", self.name, self.workdir, why)
        self.dropped += count


class Records:
    """Scalars and images of one run, appended to `workdir`. Failures of a sink are counted and do not stop the run.

    A line of metrics.jsonl is {"step": int, "time": unix seconds, name: number, ...}. Non-finite numbers are the
    strings "NaN", "Infinity" and "-Infinity", which `float(...)` in Python and `Number(...)` in JavaScript convert back.

    Args:
        workdir: folder on a file system that can append (mount a bucket to use one); created at the first write.
        enabled: pass `jax.process_index() == 0`; if False, every method does nothing.
        wandb: a `WandbWriter`, or None.
    """

    def __init__(self, workdir: str | os.PathLike, enabled: bool = True, wandb: Any = None):
        self._workdir = os.path.abspath(workdir)
        self._path = os.path.join(self._workdir, "metrics.jsonl")
        self._enabled = enabled
        self._file: TextIO | None = None
        self._writer: TensorBoard | None = None
        self._purge_step: int | None = None
        self._wandb = wandb
        self._sinks = {name: Sink(name, self._workdir) for name in MOST_SECONDS}
        self._lost: Counter[str] = Counter()

    @property
    def dropped(self) -> dict[str, int]:
        """Number of records and pictures that could not be written, by sink."""
        return {name: sink.dropped + self._lost[name] for name, sink in self._sinks.items()} | {
            name: count for name, count in self._lost.items() if name not in self._sinks
        }

    def lost(self, what: str, why: object) -> None:
        """Counts a side product, such as "scores", that could not be made; the first one is said."""
        self._lost[what] += 1
        if self._lost[what] == 1:
            logging.warning("Cannot make %s in %s (%s); the run continues and tries the next.", what, self._workdir, why)

    @contextlib.contextmanager
    def without(self, what: str) -> Iterator[None]:
        """Makes a side product in the block: if it fails, it is lost and the run continues.

        Of several processes one may fail alone; the others would wait for it in a collective. So only failures that all of them
        meet, a full disk, NaN or a refusal, are passed over there.
        """
        kinds = Exception if jax.process_count() == 1 else (OSError, UserError, NotFinite, TemporaryFailure)
        try:
            yield
        except kinds as error:
            self.lost(what, f"{type(error).__name__}: {error}")

    def preview(self, write: Callable[[], object]) -> None:
        """Writes a preview on a thread of its own."""
        if self._enabled:
            self._sinks["previews"](write)

    def prepare(self) -> None:
        """Imports the packages of the first scalar, which takes two seconds if PyTorch is installed."""
        if self._enabled:
            self._sinks["tensorboard"](lambda: importlib.import_module("tensorboardX"))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Records {name: number or array of one element} at `step`.

        Raises: ValueError for an array of several elements, or for the names "step" and "time".
        """
        if not self._enabled:
            return
        if taken := {"step", "time"} & set(values):
            raise ValueError(f"metrics may not be called {sorted(taken)}: these are fields of each line")
        numbers = {name: _number(name, value) for name, value in values.items()}
        row = {
            "step": int(step),
            "time": time.time(),
            **{name: _json_number(number) for name, number in numbers.items()},
        }
        line = json.dumps(row, allow_nan=False) + "\n"
        self._sinks["metrics.jsonl"](lambda: self._append(line))

        def write(events):
            for name, number in numbers.items():
                events.scalar(name, number, int(step))

        self._to_tensorboard(write)
        if self._wandb is not None:
            self._sinks["wandb"](lambda: self._wandb.scalars(int(step), numbers))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Records {name: uint8 [H, W, C]}, C = 1 or 3, at `step`, except in metrics.jsonl.

        Raises: ValueError for another dtype or shape.
        """
        if not self._enabled:
            return
        for name, image in images.items():
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
                raise ValueError(f"image {name!r} is {image.dtype}{list(image.shape)}, not uint8 [H, W, 1 or 3]")
            self._to_tensorboard(operator.methodcaller("image", name, image, int(step)))
            if self._wandb is not None:
                self._sinks["wandb"](functools.partial(self._wandb.image, int(step), name, image))

    def rewind(self, step: int) -> None:
        """Drops the records after `step`, so that a run resumed there has no duplicates.

        metrics.jsonl is rewritten atomically, and TensorBoard hides the later events. Lines that are not JSON (truncated by a
        kill) are dropped.
        """
        if not self._enabled:
            return
        self.close()
        self._purge_step = int(step) + 1
        if os.path.exists(self._path):
            self._sinks["metrics.jsonl"](lambda: self._drop_lines_after(step))
            self._sinks["metrics.jsonl"].wait()

    def last(self, name: str) -> float | None:
        """The last value of a metric in metrics.jsonl; None without a finite one."""
        points = curve(read_lines(Path(self._path)), name)
        return points[-1][1] if points else None

    def flush(self) -> None:
        """Flushes all files to the operating system."""
        for name, flush in {"metrics.jsonl": self._flush_file, "tensorboard": self._flush_events}.items():
            self._sinks[name](flush)
        for sink in self._sinks.values():
            sink.wait()

    def close(self) -> None:
        """Flushes and closes all files; a later record opens them again. A sink that does not respond is left behind."""
        if not self._enabled:
            return
        self._sinks["previews"].leave()  # first, as it also writes to the others
        self._sinks["metrics.jsonl"](self._close_file)
        self._sinks["tensorboard"](self._close_events)
        if self._wandb is not None:
            self._sinks["wandb"](self._wandb.close)
        for name in ("metrics.jsonl", "tensorboard", "wandb"):
            self._sinks[name].leave()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _flush_file(self):
        if self._file is not None:
            self._file.flush()

    def _flush_events(self):
        if self._writer is not None:
            self._writer.flush()

    def _close_file(self):
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _close_events(self):
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _to_tensorboard(self, write: Callable[[TensorBoard], None]) -> None:
        def attempt():
            if self._writer is None:
                self._writer = TensorBoard(os.path.join(self._workdir, "tensorboard"), self._purge_step)
                self._purge_step = None
            try:
                write(self._writer)
            except OSError:
                self._writer = None  # the next record begins another file
                raise

        self._sinks["tensorboard"](attempt)

    def _append(self, line):
        if self._file is None:
            os.makedirs(self._workdir, exist_ok=True)
            if os.path.exists(self._path):
                _cut_half_line(self._path)
            self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        try:
            self._file.write(line)
        except OSError:
            file, self._file = self._file, None  # reopening removes a partial line
            with contextlib.suppress(OSError):
                file.close()
            raise

    def _drop_lines_after(self, step):
        kept, late, broken = [], 0, 0
        with open(self._path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    is_late = json.loads(line)["step"] > step
                except (ValueError, KeyError, TypeError):
                    broken += 1
                    continue
                late += is_late
                if not is_late:
                    kept.append(line.rstrip("\n") + "\n")
        logging.info("%s: %d lines after step %d and %d broken lines dropped.", self._path, late, step, broken)
        write_atomic(self._path, "".join(kept))


def read_lines(path: Path) -> list[dict]:
    """The JSON lines of a file, without lines truncated by a kill; [] if the file does not exist."""
    values = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def curve(metrics: list[dict], name: str) -> list[tuple[int, float]]:
    """[(step, value)] of a metric in order, without values that are not finite."""
    values = {row["step"]: float(row[name]) for row in metrics if name in row}
    return sorted((step, value) for step, value in values.items() if np.isfinite(value))


def _number(name, value):
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r} has shape {array.shape}: reduce it to one number")
    number = array.reshape(()).item()
    return int(number) if isinstance(number, (bool, int)) else float(number)


def _json_number(number):
    if isinstance(number, int) or math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _cut_half_line(path):
    """Removes a last line without a newline, which a killed process left; the next line would be appended to it."""
    with open(path, "rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            logging.warning("%s: a half-written last line of %d bytes is dropped.", path, len(content) - end)
            file.truncate(end)
