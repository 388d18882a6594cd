"""The routes of the page, and its server.

| route | answer |
|---|---|
| GET / , /page.js, /page.css | the page; these files are read when the server starts, and no other path opens one |
| GET /api/model | the model, and the fields of a request |
| POST /api/jobs | 202 and the id of a drawing; 400 for a wrong request, 429 where the queue is full |
| GET /api/jobs/ID | its state |
| GET /api/jobs/ID/events | its state and live pictures, as server-sent events, until it ends |
| DELETE /api/jobs/ID | cancels it |
| GET /api/jobs/ID/images/K.png | an image |
| GET /api/jobs/ID/samples.npz | the file that `dit_jax.sample` writes for these images |
| GET /api/jobs/ID/samples.zip | the images as PNG, and the settings |

Errors are JSON, {"error": what is wrong and what to do}.
"""

import asyncio
import contextlib
import importlib.resources
import io
import json
import signal
import socket
import sys
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dit_jax.demo import schema
from dit_jax.demo.access import Guard, Refused, json_body
from dit_jax.demo.preview import data_url
from dit_jax.demo.schema import Schema
from dit_jax.demo.worker import ENDS, QUEUED, Full, Job, Worker
from dit_jax.errors import UserError
from dit_jax.runtime.signals import SIGNALS

PAGE = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("page.css", "text/css")}
LOOK_SECONDS = 0.1  # between looks at a drawing's state
PICTURE_SECONDS = 0.25  # between live pictures of an image
ALIVE_SECONDS = 5.0  # between signs of life to a client that waits
MOST_CONNECTIONS = 128


def app(offers: Schema, worker: Worker, hosts: Collection[str] = ()) -> Starlette:
    """The ASGI application. The worker must be started.

    hosts: see `access.Guard`.
    """
    folder = importlib.resources.files("dit_jax.demo") / "static"
    routes = [Route(path, _constant((folder / name).read_bytes(), kind)) for path, (name, kind) in PAGE.items()]
    api = _Api(offers, worker)
    routes += [
        Route("/api/model", api.model),
        Route("/api/jobs", api.submit, methods=["POST"]),
        Route("/api/jobs/{id}", api.status),
        Route("/api/jobs/{id}", api.cancel, methods=["DELETE"]),
        Route("/api/jobs/{id}/events", api.events),
        Route("/api/jobs/{id}/images/{index:int}.png", api.image),
        Route("/api/jobs/{id}/samples.npz", api.npz),
        Route("/api/jobs/{id}/samples.zip", api.archive),
    ]

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error.response()

    async def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # 404 and 405
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    handlers: dict[Any, Any] = {Refused: refused, HTTPException: other}
    return Starlette(routes=routes, middleware=[Middleware(Guard, hosts=hosts)], exception_handlers=handlers)


def _constant(content: bytes, kind: str) -> Callable:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


class _Api:
    """The answers below /api."""

    def __init__(self, offers: Schema, worker: Worker):
        self.schema, self.worker = offers, worker

    async def model(self, request: Request) -> Response:
        return JSONResponse(self.schema.describe())

    async def submit(self, request: Request) -> Response:
        body = await json_body(request)
        try:
            asked = await run_in_threadpool(lambda: self.schema.check(schema.parse(body)))
        except UserError as error:
            raise Refused(400, str(error)) from None
        try:
            job = self.worker.submit(asked)
        except Full as error:
            return JSONResponse({"error": str(error)}, 429, {"retry-after": "10"})
        return JSONResponse(job.describe() | self._status(job), 202)

    async def status(self, request: Request) -> Response:
        job = self._job(request)
        return JSONResponse(job.describe() | self._status(job))

    async def cancel(self, request: Request) -> Response:
        job = self._job(request)
        self.worker.cancel(job)
        return JSONResponse(job.describe() | self._status(job))

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self._events(self._job(request)), media_type="text/event-stream")

    async def image(self, request: Request) -> Response:
        pngs, index = self._job(request).pngs, request.path_params["index"]
        if index >= len(pngs):
            raise Refused(404, f"there is no image {index}")
        return Response(pngs[index], media_type="image/png")

    async def npz(self, request: Request) -> Response:
        data = await run_in_threadpool(self._finished(request).npz)
        return _download(data, "samples.npz", "application/octet-stream")

    async def archive(self, request: Request) -> Response:
        data = await run_in_threadpool(zip_bytes, self._finished(request))
        return _download(data, "samples.zip", "application/zip")

    def _job(self, request: Request) -> Job:
        job = self.worker.find(request.path_params["id"])
        if job is None:
            raise Refused(404, "there is no such drawing; the oldest are dropped, and all when the server ends. Draw it again")
        job.heard = time.monotonic()
        return job

    def _finished(self, request: Request) -> Job:
        job = self._job(request)
        if job.samples is None:
            raise Refused(404, f"the drawing is {job.state}; it has no images")
        return job

    def _status(self, job: Job) -> dict[str, Any]:
        found = job.status()
        return found | ({"ahead": self.worker.position(job)} if found["state"] == QUEUED else {})

    async def _events(self, job: Job) -> AsyncIterator[bytes]:
        """The state each time it changes, with the pictures that changed; a sign of life where nothing does."""
        said: dict[str, Any] = {}
        shown: dict[int, int] = {}
        last = pictured = 0.0
        job.listeners += 1
        try:
            while True:
                status, pictures, now = self._status(job), {}, time.monotonic()
                if now - pictured >= PICTURE_SECONDS and self.worker.preview is not None:
                    pictured = now
                    pictures = await run_in_threadpool(self._pictures, job, shown)
                if pictures or status != said:
                    said, last = status, now
                    yield f"data: {json.dumps(status | {'pictures': pictures})}\n\n".encode()
                elif now - last >= ALIVE_SECONDS:
                    last = now
                    yield b": waiting\n\n"
                if status["state"] in ENDS:
                    return
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            job.listeners -= 1
            job.heard = time.monotonic()

    def _pictures(self, job: Job, shown: dict[int, int]) -> dict[int, str]:
        """{image: data URL} of the images that went on since `shown`, which is updated."""
        with job.lock:
            changed = {image: x for image, x in job.latest.items() if shown.get(image) != x[0]}
        if not changed or self.worker.preview is None:
            return {}
        shown |= {image: number for image, (number, _) in changed.items()}
        images = self.worker.preview(np.stack([x0 for _, x0 in changed.values()]))
        return {image: data_url(picture) for image, picture in zip(changed, images, strict=True)}


def _download(data: bytes | None, name: str, kind: str) -> Response:
    return Response(data or b"", media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})


def zip_bytes(job: Job) -> bytes:
    """The images of a finished drawing as PNG, named by index and label, and settings.json; the same each time."""
    assert job.samples is not None
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for index, (data, label) in enumerate(zip(job.pngs, job.samples.labels.tolist(), strict=True)):
            archive.writestr(zipfile.ZipInfo(f"{index:04d}_class_{label}.png"), data)
        settings = {"request": job.request.fields, "made_by": job.samples.made_by}
        archive.writestr(zipfile.ZipInfo("settings.json"), json.dumps(settings, indent=1))
    return buffer.getvalue()


def bind(host: str, port: int) -> socket.socket:
    """A socket of the address, on which nothing listens yet.

    Raises:
        UserError: the address is taken, not this machine's, or not allowed.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UserError(f"--host={host} is not known ({error.strerror}); give an address of this machine") from None
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        remedy = "give another --port, or --port=0 for any that is free"
        raise UserError(f"--host={host} --port={port} cannot be used ({error.strerror}); {remedy}") from None
    return found


def url_of(host: str, listening: socket.socket) -> str:
    """The address for a browser on this machine."""
    if host in ("0.0.0.0", "::", ""):
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"


class Server(uvicorn.Server):
    """Serves an application on a bound socket until SIGINT, SIGTERM or SIGHUP; a second signal ends the process at once.

    on_open: called when connections are accepted.
    """

    def __init__(self, application: Starlette, on_open: Callable[[], None] = lambda: None):
        self.on_open = on_open
        super().__init__(
            uvicorn.Config(
                application,
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=1,  # a client that listens to a queue would never leave
                lifespan="off",
                ws="none",
                http="h11",
                loop="asyncio",
                proxy_headers=False,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_open()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which ends the process by the signal although the server has ended in order."""
        previous: dict[int, Any] = {}

        def stop(number: int, frame: Any) -> None:
            self.should_exit = True
            for other in previous:
                signal.signal(other, signal.SIG_DFL)

        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    previous[number] = signal.signal(number, stop)
        yield


def say_open(host: str, url: str, name: str) -> None:
    """Tells the address, and who can reach it."""
    print(f"demo of {name}: open {url}", file=sys.stderr)
    if host not in ("127.0.0.1", "::1", "localhost"):
        print("warning: the page has no password; everybody who reaches this address can draw", file=sys.stderr)
    print("Ctrl-C ends it", file=sys.stderr, flush=True)
