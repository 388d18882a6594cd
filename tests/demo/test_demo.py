"""The demo's server: what it draws, what it refuses, and who waits for whom."""

import base64
import http.client
import io
import json
import socket
import threading
import time
import zipfile

import jax
import numpy as np
import pytest
from demo_client import JSON, StandIn, serving
from PIL import Image

from dit_jax.codecs.pixels import Pixels
from dit_jax.demo import access, server, worker
from dit_jax.demo.preview import Preview, fit, smooth_latents
from dit_jax.demo.schema import Limits, Schema
from dit_jax.errors import NotFinite, UserError
from dit_jax.pixels import to_uint8


@pytest.fixture
def pipe():
    return StandIn()


@pytest.fixture
def client(pipe):
    with serving(pipe, Limits(max_images=5, max_steps=9), max_queued=2) as client:
        yield client


def test_a_drawing(client, pipe):
    """Catches images of other settings than were asked for, in another order, or that differ when drawn again; files without
    them."""
    asked = {"labels": [2, 0], "num_images": 3, "seed": 5, "num_steps": 2, "guidance_scale": 1.5}
    status, job = client.ask(**asked)
    assert status == 202 and job["labels"] == [2, 0, 2] and job["fields"] == asked | {"sampler": "ddim"}
    done = client.finished(job["id"])
    assert done["state"] == "done" and done["done"] == done["total"] == 6
    assert pipe.calls == [{"num_samples": 3, "seed": 5, "num_steps": 2, "guidance_scale": 1.5, "sampler": "ddim"}]
    pngs = [client.get(f"/api/jobs/{job['id']}/images/{k}.png")[2] for k in range(3)]
    images = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])[..., None]
    wanted = [np.random.default_rng((5, k, label)).integers(0, 256, (4, 6, 1)) for k, label in enumerate([2, 0, 2])]
    assert (images == wanted).all()
    with np.load(io.BytesIO(client.get(f"/api/jobs/{job['id']}/samples.npz")[2])) as file:
        assert (file["arr_0"] == images).all() and file["labels"].tolist() == [2, 0, 2]
    with zipfile.ZipFile(io.BytesIO(client.get(f"/api/jobs/{job['id']}/samples.zip")[2])) as archive:
        assert archive.namelist() == ["0000_class_2.png", "0001_class_0.png", "0002_class_2.png", "settings.json"]
        assert [archive.read(name) for name in archive.namelist()[:3]] == pngs
        assert json.loads(archive.read("settings.json"))["request"] == job["fields"]
    assert client.draw(**asked) == pngs != client.draw(**asked | {"seed": 6})
    assert client.get(f"/api/jobs/{job['id']}/images/3.png")[0] == 404


def test_a_network_with_text_is_asked_for_prompts(pipe):
    """Catches a form without a prompt, a prompt that does not reach the pipeline, and an expander that the page would offer."""
    pipe.num_classes, pipe.class_names, pipe.takes_text = 0, (), True
    with serving(pipe) as client:
        fields = json.loads(client.get("/api/model")[2])["fields"]
        assert "labels" not in fields and not any("expander" in name for name in fields)
        assert fields["prompt"]["kind"] == fields["negative_prompt"]["kind"] == "text"
        client.draw(prompt="a <b>three</b>", num_images=1, num_steps=1)
        client.draw(prompt="a", negative_prompt="b", guidance_scale=2, num_images=1, num_steps=1)
        assert [call["prompt"] for call in pipe.calls] == ["a <b>three</b>", "a"]
        assert [call.get("negative_prompt") for call in pipe.calls] == [None, "b"]
        for wrong, said in ((3, "must be a text"), ("x" * 5000, "at most 4,000")):
            status, answer = client.ask(prompt=wrong)
            assert status == 400 and said in answer["error"]


def test_defaults_are_those_of_the_model(client):
    """Catches a page that offers samplers that do not fit, or steps that a sampler does not take; labels out of their order."""
    found = json.loads(client.get("/api/model")[2])
    assert found["model"] == {"name": "stand-in", "network": "a stand-in", "step": 7, "height": 4, "width": 6, "channels": 1}
    assert found["fields"]["sampler"]["choices"] == [{"name": "ddim", "num_steps": 4}, {"name": "dopri5", "num_steps": None}]
    assert found["fields"]["labels"]["classes"] == ["cat", "dog", "<b>cow</b>"]
    job = client.ask()[1]
    assert job["fields"] == {
        "labels": "balanced",
        "num_images": 5,
        "sampler": "ddim",
        "num_steps": 4,
        "guidance_scale": 1.0,
        "seed": 0,
    }
    assert job["labels"] == [0, 1, 2, 0, 1] and client.finished(job["id"])["state"] == "done"
    own = client.ask(sampler="dopri5", labels="none")[1]
    assert own["fields"]["num_steps"] is None and own["total"] is None and own["labels"] == [3] * 5
    assert client.finished(own["id"])["state"] == "done"


def test_a_network_without_labels(pipe):
    """Catches a page that asks for classes or guidance where there are none."""
    pipe.num_classes, pipe.class_names = 0, ()
    schema = Schema(pipe, "x")
    assert list(schema.fields) == ["num_images", "sampler", "num_steps", "seed"]
    assert schema.check({"num_images": 2}).labels.tolist() == [0, 0]
    pipe.image_shape = (8, 4, 6, 1)
    with pytest.raises(UserError, match="draws clips"):
        Schema(pipe, "x")


def test_live_pictures(client, pipe):
    """Catches pictures of another image or another step, a stream that does not end, and progress that is not counted."""
    pipe.gate.clear()
    job = client.ask(labels=[1], num_images=2, num_steps=2)[1]
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
    connection.request("GET", f"/api/jobs/{job['id']}/events")
    answer = connection.getresponse()
    assert answer.getheader("content-type").startswith("text/event-stream")
    seen = []
    for line in iter(answer.readline, b""):
        if line.startswith(b"data: "):
            seen.append(json.loads(line[6:]))
            if seen[-1]["pictures"]:
                pipe.gate.set()
    states = list(dict.fromkeys(status["state"] for status in seen))
    assert states[-2:] == ["drawing", "done"] and seen[-1]["done"] == 4
    first = next(status for status in seen if status["pictures"])
    assert first["compiles"] and first["done"] == 2 and set(first["pictures"]) == {"0", "1"}
    picture = first["pictures"]["0"].partition(",")[2]
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))) == 128).all()  # latents of 0
    assert not client.finished(client.ask(labels=[2], num_steps=2)[1]["id"])["compiles"]
    assert client.finished(client.ask(labels=[2], num_steps=3)[1]["id"])["compiles"]


MANY = json.dumps({"labels": [0] * 9000}).encode()
WRONG = {
    "no JSON": (b"{labels}", 400, "the request is not JSON"),
    "empty": (b"", 400, "the request is not JSON"),
    "not UTF-8": (b'{"seed": "\xff"}', 400, "the request is not JSON"),
    "NaN": (b'{"guidance_scale": NaN}', 400, "NaN is no number of JSON"),
    "nested": (b"[" * 8000, 400, "not JSON"),
    "twice": (b'{"seed": 1, "seed": 2}', 400, "a key stands twice"),
    "list": (b"[3]", 400, "send an object"),
    "thousands of digits": (b'{"seed": ' + b"9" * 5000 + b"}", 400, "the request is not JSON"),
    "unknown field": (b'{"sede": 3}', 400, 'there is no field "sede"; did you mean seed?'),
    "a file": (b'{"autoguidance": "/etc/passwd"}', 400, "there is no field"),
    "unknown label": (b'{"labels": [3]}', 400, "label 3 is out of range: 0 to 2"),
    "label of another type": (b'{"labels": ["1"]}', 400, "not a whole number"),
    "truth as label": (b'{"labels": [true]}', 400, "not a whole number"),
    "no label": (b'{"labels": []}', 400, "labels is empty"),
    "labels of another type": (b'{"labels": 3}', 400, "give class numbers, as in [3, 5]"),
    "unknown word": (b'{"labels": "all"}', 400, "balanced, random, none"),
    "many labels": (json.dumps({"labels": [0] * 1001}).encode(), 400, "at most 1000"),
    "many images": (b'{"num_images": 6}', 400, "this server takes 1 to 5"),
    "no images": (b'{"num_images": 0}', 400, "this server takes 1 to 5"),
    "text as number": (b'{"num_images": "2"}', 400, "must be a whole number from 1 to 5"),
    "truth as number": (b'{"seed": true}', 400, "must be a whole number"),
    "fraction": (b'{"num_steps": 2.5}', 400, "must be a whole number"),
    "many steps": (b'{"num_steps": 10}', 400, "this server takes 1 to 9"),
    "large number": (b'{"guidance_scale": 1e400}', 400, "out of range"),
    "huge number": (b'{"guidance_scale": 1' + b"0" * 400 + b"}", 400, "out of range"),
    "negative seed": (b'{"seed": -1}', 400, "this server takes 0 to 4294967295"),
    "unknown sampler": (b'{"sampler": "magic"}', 400, "choose one of ddim, dopri5"),
    "sampler of another type": (b'{"sampler": ["ddim"]}', 400, "choose one of ddim, dopri5"),
    "steps of a sampler without": (b'{"sampler": "dopri5", "num_steps": 3}', 400, "chooses its own steps"),
    "too large": (MANY, 413, "at most 16384 are read"),
}


@pytest.fixture(scope="module")
def shared():
    pipe = StandIn()
    with serving(pipe, Limits(max_images=5, max_steps=9)) as client:
        client.pipe = pipe
        yield client


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(shared, name):
    """Catches what is wrong and is drawn, clamped, or answered with a stack trace; a server that ends by it."""
    body, status, text = WRONG[name]
    found = shared.send("POST", "/api/jobs", body, JSON)
    assert found[0] == status and text in json.loads(found[2])["error"], found
    assert not shared.pipe.calls
    assert shared.get("/api/model")[0] == 200


def test_a_large_request_without_a_length(shared):
    """Catches a body that is read to its end because no header says its length, or says another."""
    body = b"".join(b"%x\r\n%s\r\n" % (4096, b" " * 4096) for _ in range(8)) + b"0\r\n\r\n"
    status, _, answer = shared.send("POST", "/api/jobs", body, JSON | {"transfer-encoding": "chunked"})
    assert status == 413 and b"larger than the 16384 bytes" in answer
    for length in ("99999999999999999999", "1e3", "-1"):
        assert shared.send("POST", "/api/jobs", b"{}", JSON | {"content-length": length})[0] in (400, 413)
    assert shared.send("GET", "/api/model", None, {"content-length": "20000"})[0] == 413


def test_a_request_that_does_not_arrive(shared, monkeypatch):
    """Catches connections that are held for ever by a client that sends half of its request."""
    monkeypatch.setattr(access, "BODY_SECONDS", 0.1)
    assert shared.send("POST", "/api/jobs", b"{", JSON | {"content-length": "2"})[0] == 408


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_content_types(shared, kind):
    """Catches a form of another site, which a browser sends without asking."""
    status, _, body = shared.send("POST", "/api/jobs", b"{}", {"content-type": kind} if kind else {})
    assert status == 415 and b"send application/json" in body


@pytest.mark.parametrize(
    "host, headers, status",
    [
        ("127.0.0.1:1", {}, 200),
        ("localhost", {}, 200),
        ("[::1]:7860", {}, 200),
        ("10.0.0.7:7860", {}, 200),
        ("GPU.example:80", {}, 200),
        ("localhost:5", {"origin": "http://localhost:5"}, 200),
        ("evil.example", {}, 421),
        ("127.0.0.1.evil.example", {}, 421),
        ("localhost@evil.example", {}, 421),
        ("localhost:x", {}, 421),
        ("", {}, 421),
        ("localhost:5", {"origin": "http://evil.example"}, 403),
        ("localhost:5", {"origin": "http://localhost:6"}, 403),
        ("localhost:5", {"origin": "null"}, 403),
        ("localhost:5", {"origin": "file://localhost:5"}, 403),
    ],
)
def test_hosts_and_origins(shared, host, headers, status):
    """Catches DNS rebinding, and pages of other sites that read or draw through the user's browser."""
    assert shared.send("GET", "/api/model", None, headers, host=host)[0] == status
    if status != 200:
        assert shared.send("POST", "/api/jobs", b"{}", JSON | headers, host=host)[0] == status


def test_requests_of_another_site(shared):
    """Catches a request that the browser itself marks as another site's; a second Host or Origin beside the one that is
    checked."""
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 415), ("none", 415)):
        assert shared.send("POST", "/api/jobs", b"{}", {"sec-fetch-site": site})[0] == status
    with socket.create_connection(("127.0.0.1", shared.port), 20) as raw:
        raw.sendall(b"GET /api/model HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert b" 400 " in raw.makefile("rb").readline()
    with socket.create_connection(("127.0.0.1", shared.port), 20) as raw:
        origins = b"Origin: http://localhost\r\nOrigin: http://evil.example\r\n"
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + origins + b"Connection: close\r\n\r\n")
        assert b" 400 " in raw.makefile("rb").readline()


PATHS = (
    "/../setup.cfg",
    "/page.js/../../worker.py",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/..%2f..%2fetc%2fpasswd",
    "//etc/passwd",
    "/static/page.js",
    "/static/",
    "/page.html",
    "/worker.py",
    "/api/",
    "/api/jobs",
    "/api/jobs/../../../etc/passwd",
    "/api/jobs/%2e%2e%2f%2e%2e/images/0.png",
    "/api/jobs/x/images/-1.png",
    "/api/jobs/x/images/0.png/../../samples.npz",
    "/docs",
    "/openapi.json",
)


@pytest.mark.parametrize("path", PATHS)
def test_no_path_opens_a_file(shared, path):
    """Catches files of the machine, or lists of them, that a path reaches."""
    status, _, body = shared.get(path)
    assert status in (404, 405) and set(json.loads(body)) == {"error"}


def test_methods(shared):
    """Catches an address that answers to a method that it is not made for."""
    for method, path in (("POST", "/"), ("PUT", "/api/jobs"), ("DELETE", "/api/model"), ("TRACE", "/api/model")):
        assert shared.send(method, path, b"{}", JSON)[0] == 405


def test_the_page_and_its_headers(shared):
    """Catches scripts or styles within the page, or from elsewhere, which the policy blocks; an answer without the policy."""
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        status, headers, body = shared.get(path)
        assert status == 200 and headers["content-type"].startswith(kind) and b"http:" not in body and b"https:" not in body
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    page = shared.get("/")[2].decode()
    assert "style=" not in page and "<style" not in page and page.count("<script") == 1 and "onclick" not in page
    assert "innerHTML" not in shared.get("/page.js")[2].decode()
    for status, headers, _ in (shared.get("/none"), shared.send("GET", "/", host="evil.example")):
        assert status in (404, 421) and headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in shared.send("GET", "/", None, {"origin": f"http://127.0.0.1:{shared.port}"})[1]


def test_two_clients_at_once(client, pipe):
    """Catches images that go to the other client, and two drawings that share the device."""
    found = {}

    def draw(seed):
        found[seed] = client.draw(labels=[seed % 3], num_images=2, seed=seed)

    pipe.gate.clear()
    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    pipe.gate.set()
    for thread in threads:
        thread.join()
    assert found[1] == client.draw(labels=[1], num_images=2, seed=1) != found[2]
    assert found[2] == client.draw(labels=[2], num_images=2, seed=2)


def test_the_queue(client, pipe):
    """Catches a queue without an end, a place in it that is wrong, and a cancelled request that is drawn."""
    pipe.gate.clear()
    first = client.ask(seed=1)[1]["id"]
    client.until(first, "drawing")
    second, third = (client.ask(seed=seed)[1] for seed in (2, 3))
    assert (second["ahead"], third["ahead"]) == (1, 2)
    status, answer = client.ask(seed=4)
    assert status == 429 and answer["error"] == "2 requests are waiting; try again later"
    assert client.get(f"/api/jobs/{third['id']}/samples.npz")[0] == client.get(f"/api/jobs/{third['id']}/samples.zip")[0] == 404
    assert client.send("DELETE", f"/api/jobs/{second['id']}")[0] == 200
    assert client.state(second["id"])["state"] == "cancelled" and client.state(third["id"])["ahead"] == 1
    pipe.gate.set()
    assert client.finished(third["id"])["state"] == "done"
    assert [call["seed"] for call in pipe.calls] == [1, 3]
    client.send("DELETE", f"/api/jobs/{third['id']}")
    assert client.state(third["id"])["state"] == "done"


@pytest.mark.parametrize("error", [None, RuntimeError("too late")])
def test_a_running_drawing_is_cancelled(client, pipe, error):
    """Catches images of a drawing that its client has cancelled, and a next one that waits for nothing."""
    pipe.gate.clear()
    job = client.ask(seed=1)[1]["id"]
    client.until(job, "drawing")
    client.send("DELETE", f"/api/jobs/{job}")
    following = client.ask(seed=2)[1]
    assert client.state(job)["state"] == "cancelled" and following["ahead"] == 1
    pipe.error = error
    pipe.gate.set()
    assert client.finished(following["id"])["state"] == ("failed" if error else "done")
    assert client.state(job)["state"] == "cancelled" and client.get(f"/api/jobs/{job}/images/0.png")[0] == 404


@pytest.mark.slow
def test_a_client_that_goes_away(client, pipe, monkeypatch):
    """Catches drawings for tabs that are closed, and waiting clients that are taken for gone."""
    monkeypatch.setattr(worker, "GONE_SECONDS", 0.5)
    pipe.gate.clear()
    client.until(client.ask(seed=1)[1]["id"], "drawing")
    closed, open_ = client.ask(seed=2)[1]["id"], client.ask(seed=3)[1]["id"]
    streams = {}
    for job in (closed, open_):
        streams[job] = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
        streams[job].request("GET", f"/api/jobs/{job}/events")
        streams[job].getresponse().readline()
    time.sleep(0.6)
    assert client.worker.find(closed).state == "queued"  # somebody listens
    streams[closed].sock.shutdown(socket.SHUT_RDWR)
    streams[closed].close()
    time.sleep(0.9)
    assert client.state(open_)["ahead"] == 1 and client.worker.find(closed).state == "cancelled"
    pipe.gate.set()
    assert client.finished(open_)["state"] == "done" and [call["seed"] for call in pipe.calls] == [1, 3]


@pytest.mark.parametrize(
    "error, text",
    [
        (
            RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmany lines"),
            "drawing failed: RuntimeError: RESOURCE_EXHAUSTED: out of",
        ),
        (NotFinite("2 of 2 images hold NaN"), "2 of 2 images hold NaN"),
    ],
)
def test_an_error_while_drawing(client, pipe, capsys, error, text):
    """Catches a server that ends, or a client that waits for ever, after a drawing that fails."""
    pipe.error = error
    done = client.finished(client.ask()[1]["id"])
    assert done["state"] == "failed" and done["message"].startswith(text) and "many" not in done["message"]
    assert ("Traceback" in capsys.readouterr().err) == (type(error) is RuntimeError)
    pipe.error = None
    assert len(client.draw(num_images=2)) == 2


def test_results_have_a_bound(pipe):
    """Catches a server whose memory grows with every drawing, and one that drops the drawing that was just made."""
    with serving(pipe, kept_bytes=1) as client:
        first, second = (client.ask(seed=seed, num_images=1)[1]["id"] for seed in (1, 2))
        assert client.finished(second)["state"] == "done"
        assert client.get(f"/api/jobs/{first}")[0] == 404 and client.get(f"/api/jobs/{second}/images/0.png")[0] == 200
        assert b"the oldest are dropped" in client.get(f"/api/jobs/{first}/samples.npz")[2]


def test_stopping_cancels_what_waits(pipe):
    """Catches a server that draws its queue before it ends."""
    with serving(pipe) as client:
        pipe.gate.clear()
        client.until(client.ask(seed=1)[1]["id"], "drawing")
        waiting = client.worker.find(client.ask(seed=2)[1]["id"])
        threading.Timer(0.3, pipe.gate.set).start()
    assert waiting.state == "cancelled" and [call["seed"] for call in pipe.calls] == [1]


def test_addresses():
    """Catches a taken port that is found after the weights are read, with a stack trace."""
    with server.bind("127.0.0.1", 0) as listening:
        listening.listen()
        port = listening.getsockname()[1]
        assert server.url_of("127.0.0.1", listening) == f"http://127.0.0.1:{port}/"
        assert server.url_of("0.0.0.0", listening) == f"http://localhost:{port}/"
        assert server.url_of("::1", listening) == f"http://[::1]:{port}/"
        with pytest.raises(UserError, match=f"--port={port} cannot be used .* --port=0 for any that is free"):
            server.bind("127.0.0.1", port)
    with pytest.raises(UserError, match=r"--host=nowhere\.invalid"):
        server.bind("nowhere.invalid", 0)


def test_pictures_of_pixels_are_the_images():
    """Catches live pictures of a network on pixels that are darker or lighter than what is drawn."""
    codec, latents = Pixels(3, mean=-0.39, std=0.75), np.random.default_rng(0).normal(size=(2, 5, 3, 3)).astype(np.float32)
    pictures = Preview(codec, (5, 3, 3), None)(latents)
    wanted = np.asarray(to_uint8(codec.decode({}, jax.numpy.asarray(latents))))
    assert np.abs(pictures.astype(int) - wanted.astype(int)).max() <= 1 and pictures.std() > 30
    latents[0, 0, 0] = np.nan
    assert (Preview(codec, (5, 3, 3), None)(latents)[0, 0, 0] == 0).all()


def test_pictures_of_latents():
    """Catches a map that mixes up channels, rows and columns, or leaves out the constant; latents of another scale."""
    matrix = np.random.default_rng(1).normal(size=(4, 3)) * 0.1

    def decode(latents):  # linear, at three times the size
        images = (latents @ matrix + [0.1, -0.2, 0.3]).repeat(3, 1).repeat(3, 2)
        return np.clip(127.5 * images + 127.5, 0, 255).round().astype(np.uint8)

    latents = smooth_latents(8, (6, 10, 4))
    assert latents.shape == (8, 6, 10, 4) and abs(latents.std() - 1) < 0.01 and np.abs(np.diff(latents, axis=2)).mean() < 0.6
    preview = Preview(object(), (6, 10, 4), decode)
    assert not preview.is_exact
    np.testing.assert_allclose(preview.matrix, [*matrix, [0.1, -0.2, 0.3]], atol=3e-3)
    np.testing.assert_allclose(fit(latents, decode(latents)), preview.matrix)
    other = np.random.default_rng(2).normal(size=(2, 6, 10, 4)).astype(np.float32)
    assert np.abs(preview(other).astype(int) - decode(other)[:, ::3, ::3].astype(int)).max() <= 2
