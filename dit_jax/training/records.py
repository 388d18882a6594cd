"""Metrics of a run: `metrics.jsonl`, one JSON object per line, TensorBoard events under `tensorboard/`, and W&B if enabled."""

import contextlib
import importlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from absl import logging

from dit_jax.storage.atomic import write_atomic


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
        self._writer: Any = None  # of tensorboardX
        self._purge_step: int | None = None
        self._wandb = wandb
        self.dropped = {"metrics.jsonl": 0, "tensorboard": 0, "wandb": 0}

    def prepare(self) -> None:
        """Imports the packages of the first scalar, which takes two seconds if PyTorch is installed."""
        if self._enabled:
            self._attempt("tensorboard", lambda: importlib.import_module("tensorboardX"))

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
        self._attempt("metrics.jsonl", lambda: self._append(json.dumps(row, allow_nan=False) + "\n"))

        def write():
            for name, number in numbers.items():
                self._events().add_scalar(name, number, int(step))

        self._attempt("tensorboard", write)
        if self._wandb is not None:
            self._attempt("wandb", lambda: self._wandb.scalars(int(step), numbers))

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
            self._attempt(
                "tensorboard",
                lambda name=name, image=image: self._events().add_image(name, image, int(step), dataformats="HWC"),
            )
            if self._wandb is not None:
                self._attempt("wandb", lambda name=name, image=image: self._wandb.image(int(step), name, image))

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
            self._attempt("metrics.jsonl", lambda: self._drop_lines_after(step))

    def last(self, name: str) -> float | None:
        """The last value of a metric in metrics.jsonl; None without a finite one."""
        points = curve(read_lines(Path(self._path)), name)
        return points[-1][1] if points else None

    def flush(self) -> None:
        """Flushes all files to the operating system."""
        if self._file is not None:
            self._attempt("metrics.jsonl", self._file.flush)
        if self._writer is not None:
            self._attempt("tensorboard", self._writer.flush)

    def close(self) -> None:
        """Flushes and closes all files; a later record opens them again."""
        if self._file is not None:
            self._attempt("metrics.jsonl", self._file.close)
        if self._writer is not None:
            self._attempt("tensorboard", self._writer.close)
        self._file = self._writer = None
        if self._wandb is not None:
            self._attempt("wandb", self._wandb.close)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _attempt(self, sink, write):
        try:
            write()
        except Exception:
            self.dropped[sink] += 1
            if self.dropped[sink] == 1:
                logging.warning(
                    "Cannot write %s in %s; the run continues without these records.", sink, self._workdir, exc_info=True
                )

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

    def _events(self):
        if self._writer is None:
            from tensorboardX import SummaryWriter

            folder, suffix = os.path.join(self._workdir, "tensorboard"), f".{time.time_ns()}"  # one file per opening
            self._writer = SummaryWriter(folder, purge_step=self._purge_step, filename_suffix=suffix)
            self._purge_step = None
        return self._writer

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
