"""A stand-in for a pipeline, the demo's server on a thread, and a client that sends what no browser sends."""

import contextlib
import http.client
import json
import threading
import time
from types import SimpleNamespace

import numpy as np

from dit_jax.codecs.pixels import Pixels
from dit_jax.demo import server
from dit_jax.demo.schema import LIMITS, Schema
from dit_jax.demo.worker import Worker
from dit_jax.errors import UserError
from dit_jax.sample.labels import chosen_labels
from dit_jax.sample.samples_file import Samples
from dit_jax.sample.watch import Evaluation

JSON = {"content-type": "application/json"}


class StandIn:
    """Draws 4 x 6 images that depend on the seed, the index and the label; waits at every step while `gate` is closed."""

    num_classes, class_names, image_shape, step = 3, ("cat", "dog", "<b>cow</b>"), (4, 6, 1), 7
    takes_text = False

    def __init__(self):
        task = SimpleNamespace(codec=Pixels(1, mean=0.0, std=0.5), latent_shape=self.image_shape)
        config = SimpleNamespace(sampler=_Section(name="ddim", num_steps=4), guidance=_Section(scale=1.0))
        self.run = SimpleNamespace(config=config, task=task, network=SimpleNamespace(describe=lambda: "a stand-in"))
        self.gate, self.error, self.calls, self.running = threading.Event(), None, [], 0
        self.gate.set()

    def check(
        self,
        labels=None,
        *,
        num_samples=None,
        seed=0,
        sampler="ddim",
        num_steps=None,
        guidance_scale=1.0,
        prompt=None,
        negative_prompt=None,
    ):
        if sampler not in ("ddim", "dopri5"):
            raise UserError(f"{sampler} does not fit")
        if sampler == "dopri5" and num_steps is not None:
            raise UserError("dopri5 chooses its own steps")
        if self.takes_text and prompt is None:
            raise UserError("there is no prompt")
        return chosen_labels(labels, num_samples, self.num_classes, seed)[0], num_steps

    def decode(self, latents):
        raise AssertionError("pixels need no decoder")

    def __call__(self, labels=None, *, callback, **options):
        self.running += 1
        assert self.running == 1, "two drawings at a time"
        try:
            if self.error is not None:
                raise self.error
            chosen, steps = self.check(labels, **options)
            indices = np.arange(len(chosen), dtype=np.int32)
            for number in range(steps or 3):
                callback(Evaluation(indices, number, np.full(len(chosen), 0.5), np.full((len(chosen), 4, 6, 1), number / 10)))
                assert self.gate.wait(20)
            if self.error is not None:
                raise self.error
            self.calls.append(options)
            images = [
                np.random.default_rng((options["seed"], k, label)).integers(0, 256, (4, 6, 1)) for k, label in enumerate(chosen)
            ]
            return Samples(np.asarray(images, np.uint8), chosen, {"seed": options["seed"]})
        finally:
            self.running -= 1


class _Section(dict):
    def __getattr__(self, name):
        return self[name]


class Client:
    def __init__(self, port):
        self.port = port

    def send(self, method, path, body=None, headers=(), host=None):
        """(status, headers, body) of a request with these headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=host is not None, skip_accept_encoding=True)
            if host is not None:
                connection.putheader("Host", host)
            for name, value in dict(headers).items():
                connection.putheader(name, value)
            if body is not None and "transfer-encoding" not in dict(headers) and "content-length" not in dict(headers):
                connection.putheader("content-length", str(len(body)))
            connection.endheaders()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer may come before all is sent
                connection.send(body or b"")
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def get(self, path):
        return self.send("GET", path)

    def ask(self, **fields):
        """(status, JSON) of a request for a drawing."""
        status, _, body = self.send("POST", "/api/jobs", json.dumps(fields).encode(), JSON)
        return status, json.loads(body)

    def state(self, name):
        return json.loads(self.get(f"/api/jobs/{name}")[2])

    def finished(self, name):
        """The state of a drawing at its end."""
        return self.until(name, "done", "failed", "cancelled")

    def until(self, name, *states):
        end = time.monotonic() + 20
        while (found := self.state(name))["state"] not in states:
            assert time.monotonic() < end, found
            time.sleep(0.01)
        return found

    def draw(self, **fields):
        """[PNG of each image] of a drawing."""
        status, job = self.ask(**fields)
        assert status == 202, job
        done = self.finished(job["id"])
        assert done["state"] == "done", done
        return [self.get(f"/api/jobs/{job['id']}/images/{k}.png")[2] for k in range(done["num_images"])]


@contextlib.contextmanager
def serving(pipe, limits=LIMITS, **worker_arguments):
    """A client of a server that draws with this pipeline."""
    worker = Worker(pipe, **worker_arguments)
    application = server.app(Schema(pipe, "stand-in", limits), worker, hosts=["gpu.example"])
    opened = threading.Event()
    running = server.Server(application, on_open=opened.set)
    with server.bind("127.0.0.1", 0) as listening:
        worker.start()
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        assert opened.wait(20)
        client = Client(listening.getsockname()[1])
        client.worker = worker
        try:
            yield client
        finally:
            running.should_exit = True
            thread.join()
            worker.stop()
