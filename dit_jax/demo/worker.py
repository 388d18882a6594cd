"""The queue: one thread draws one request after the other on all devices of this process."""

import secrets
import threading
import time
import traceback
from collections import OrderedDict, deque
from typing import Any

import numpy as np

from dit_jax.demo.preview import Preview, png
from dit_jax.demo.schema import Request
from dit_jax.errors import Failure, UserError
from dit_jax.pipeline import Pipeline
from dit_jax.sample.samples_file import Samples, npz_bytes
from dit_jax.sample.watch import Evaluation

QUEUED, PREPARING, DRAWING, DONE, FAILED, CANCELLED = "queued", "preparing", "drawing", "done", "failed", "cancelled"
ENDS = (DONE, FAILED, CANCELLED)
MOST_QUEUED = 16
MOST_JOBS = 256  # whose end is remembered
KEPT_BYTES = 2**28  # of the images and files of finished requests
GONE_SECONDS = 10.0  # after which a client that neither listens nor asks is gone
STOP_SECONDS = 5.0  # that a drawing may take to end when the server stops


class Full(Exception):
    """The queue is full."""


class Job:
    """A request and what became of it. The worker's thread and the server's read and write it under `lock`."""

    def __init__(self, request: Request):
        self.id = secrets.token_urlsafe(16)
        self.request = request
        self.lock = threading.Lock()
        self.state, self.message = QUEUED, ""
        self.compiles = False  # whether its settings are drawn with for the first time
        self.latest: dict[int, tuple[int, np.ndarray]] = {}  # {image: (evaluations, its predicted latents)}
        self.pngs: list[bytes] = []
        self.samples: Samples | None = None
        self.seconds: float | None = None
        self.listeners, self.heard = 0, time.monotonic()

    def saw(self, evaluation: Evaluation) -> None:
        """A callback of the sampler: keeps the latents and calls no JAX."""
        with self.lock:
            if self.state in ENDS:  # cancelled
                return
            self.state = DRAWING
            for image, x0 in zip(evaluation.images.tolist(), evaluation.x0, strict=True):
                self.latest[image] = evaluation.number + 1, x0

    def end(self, state: str, message: str = "") -> None:
        """Sets the last state; a job that was cancelled stays so."""
        with self.lock:
            if self.state not in ENDS:
                self.state, self.message, self.latest = state, message, {}

    @property
    def is_abandoned(self) -> bool:
        """Whether its client is gone."""
        return not self.listeners and time.monotonic() - self.heard > GONE_SECONDS

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.pngs)) + (0 if self.samples is None else self.samples.images.nbytes)

    def status(self) -> dict[str, Any]:
        """JSON of the state; the page shows it."""
        with self.lock:
            images = len(self.request.labels)
            total = None if self.request.evaluations is None else self.request.evaluations * images
            done = total if self.state == DONE else sum(number for number, _ in self.latest.values())
            found = {"state": self.state, "message": self.message, "compiles": self.compiles, "done": done, "total": total}
            return found | {"num_images": images, "seconds": self.seconds}

    def describe(self) -> dict[str, Any]:
        """JSON of what was asked for and the labels of the images, which do not change."""
        return {"id": self.id, "fields": self.request.fields, "labels": self.request.labels.tolist()}

    def npz(self) -> bytes | None:
        samples = self.samples
        return None if samples is None else npz_bytes(samples)


class Worker:
    """Draws one request at a time, in the order of their arrival, and keeps the results in memory.

    `start` starts its thread, which alone calls the pipeline to draw.

    Args:
        max_queued: requests that may wait; one more is refused.
        kept_bytes: of finished results; the oldest are dropped.
    """

    def __init__(self, pipe: Pipeline, max_queued: int = MOST_QUEUED, kept_bytes: int = KEPT_BYTES):
        if max_queued < 1:
            raise UserError(f"max_queued is {max_queued}; it must be at least 1")
        self.pipe, self.max_queued, self.kept_bytes = pipe, max_queued, kept_bytes
        self.preview: Preview | None = None
        self.drawn_images = 0
        self._jobs: OrderedDict[str, Job] = OrderedDict()  # by id, oldest first
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_stopping = self._is_busy = False
        self._settings: set[tuple] = set()  # that were drawn with
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> bool:
        """Cancels what waits, and waits STOP_SECONDS for the current drawing; returns whether it has ended."""
        with self._changed:
            self._is_stopping = True
            while self._queue:
                self._queue.popleft().end(CANCELLED, "the server stops")
            self._changed.notify_all()
        self._thread.join(STOP_SECONDS)
        return not self._thread.is_alive()

    def submit(self, request: Request) -> Job:
        """Puts a request at the end of the queue.

        Raises:
            Full: there are max_queued requests before it.
        """
        with self._changed:
            self._drop_abandoned()
            if len(self._queue) >= self.max_queued or self._is_stopping:
                raise Full(f"{len(self._queue)} requests are waiting; try again later")
            job = Job(request)
            self._queue.append(job)
            self._jobs[job.id] = job
            while len(self._jobs) > MOST_JOBS and (old := next((x for x in self._jobs.values() if x.state in ENDS), None)):
                del self._jobs[old.id]
            self._changed.notify_all()
        return job

    def find(self, name: str) -> Job | None:
        """The job with this id, unless it was dropped."""
        return self._jobs.get(name)

    def cancel(self, job: Job) -> None:
        """Takes a job out of the queue. A drawing that has begun runs to its end on the device, and its images are dropped."""
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
            job.end(CANCELLED)

    def position(self, job: Job) -> int:
        """The number of drawings that come before a queued job, the current one included."""
        with self._changed:
            self._drop_abandoned()
            return (self._queue.index(job) if job in self._queue else 0) + self._is_busy

    def _drop_abandoned(self) -> None:
        for job in [job for job in self._queue if job.is_abandoned]:
            self._queue.remove(job)
            job.end(CANCELLED, "its client went away")

    def _next(self) -> Job | None:
        with self._changed:
            while True:
                self._drop_abandoned()
                self._is_busy = False
                if self._is_stopping:
                    return None
                if self._queue:
                    self._is_busy, job = True, self._queue.popleft()
                    job.state = PREPARING
                    return job
                self._changed.wait(GONE_SECONDS)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            try:
                samples, pngs = self._draw(job)
            except (UserError, Failure) as error:
                job.end(FAILED, str(error))
            except Exception as error:  # such as a device without memory for so many tokens: the next request may be smaller
                traceback.print_exc()
                job.end(FAILED, f"drawing failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
            else:
                with self._changed:
                    self.drawn_images += len(samples)
                    if job.state != CANCELLED:
                        job.samples, job.pngs, job.seconds = samples, pngs, time.monotonic() - start
                        job.end(DONE)
                        self._drop_oldest()

    def _draw(self, job: Job) -> tuple[Samples, list[bytes]]:
        fields = job.request.fields
        settings = (
            *(fields.get(name) for name in ("sampler", "num_steps", "guidance_scale")),
            bool(fields.get("negative_prompt")),
        )
        job.compiles = settings not in self._settings
        if self.preview is None:
            task = self.pipe.run.task
            self.preview = Preview(task.codec, task.latent_shape, self.pipe.decode)
        samples = self.pipe(**job.request.arguments, callback=job.saw)
        self._settings.add(settings)
        return samples, [png(image) for image in samples.images]

    def _drop_oldest(self) -> None:
        """Drops the oldest results until the rest fits into memory; the newest stays."""
        finished = [job for job in self._jobs.values() if job.state == DONE]
        total = sum(job.num_bytes for job in finished)
        for job in finished[:-1]:
            if total <= self.kept_bytes:
                return
            total -= job.num_bytes
            del self._jobs[job.id]
