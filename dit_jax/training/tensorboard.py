"""TensorBoard's event files, written without a thread of their own: an error of the disk is raised where it can be counted."""

import os
import time
from typing import Any

import numpy as np


class TensorBoard:
    """An event file in a folder; TensorBoard hides what older files of the folder hold from `purge_step` on.

    Raises:
        OSError: from every method; the file may then hold half an event, and a new object begins another file.
    """

    def __init__(self, folder: str, purge_step: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._event = event_pb2.Event
        os.makedirs(folder, exist_ok=True)
        self._file = EventsWriter(os.path.join(folder, "events"), f".{time.time_ns()}")  # one file per opening
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(purge_step, session_log=start)

    def scalar(self, name: str, value: float, step: int) -> None:
        from tensorboardX import summary

        self._write(step, summary=summary.scalar(name, value))

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """image: uint8 [H, W, C], C = 1 or 3."""
        from tensorboardX import summary

        self._write(step, summary=summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))
