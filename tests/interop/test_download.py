"""Downloads from a server on this machine: resumed, checked, and refused."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from dit_files import held

from dit_jax.errors import UserError
from dit_jax.interop import pt_writer
from dit_jax.interop.download import PUBLISHED, Published, download


class Handler(BaseHTTPRequestHandler):
    """Serves server.content with Range and If-Range; server.cut ends a connection after so many bytes."""

    def do_GET(self):
        server, start = self.server, 0
        server.asked.append(self.headers.get("Range"))
        if server.status:
            self.send_error(server.status)
            return
        if self.headers.get("Range") and self.headers.get("If-Range") == server.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", server.kind)
        self.send_header("ETag", server.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        self.wfile.write(body[: server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    pt_writer.write(tmp_path / "made.pt", {"x": held(np.arange(50_000, dtype=np.float32))})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.etag, server.kind = (tmp_path / "made.pt").read_bytes(), '"1"', "application/octet-stream"
    server.asked, server.cut, server.status = [], None, None
    server.published = Published(f"http://127.0.0.1:{server.server_port}/x.pt", "x.pt", "official")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_is_recorded_and_held_to_its_record(server, tmp_path):
    """A file fetched twice, or changed afterwards without anyone noticing."""
    path, seen = tmp_path / "in" / "x.pt", []
    found = download(server.published, path, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == server.content
    assert found == hashlib.sha256(server.content).hexdigest()
    assert seen[-1] == (len(server.content),) * 2
    assert sorted(file.name for file in path.parent.iterdir()) == ["x.pt", "x.pt.sha256"]
    assert (path.parent / "x.pt.sha256").read_text() == f"{found}  x.pt\n"
    assert download(server.published, path) == found
    assert len(server.asked) == 1
    path.write_bytes(server.content[:-1] + b"?")
    with pytest.raises(UserError, match="damaged or was replaced"):
        download(server.published, path)


def test_a_broken_download_goes_on_where_it_ended(server, tmp_path):
    """Starting again from zero, or a part kept as if it were the whole."""
    path = tmp_path / "in" / "x.pt"
    server.cut = 70_000
    with pytest.raises(UserError, match=rf"ended after 70000 of {len(server.content)} bytes"):
        download(server.published, path)
    assert not path.exists()
    server.cut = None
    download(server.published, path)
    assert server.asked == [None, "bytes=70000-"]
    assert path.read_bytes() == server.content


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    """Two halves of different files joined."""
    path = tmp_path / "in" / "x.pt"
    server.cut = 70_000
    with pytest.raises(UserError, match="ended after"):
        download(server.published, path)
    server.cut, server.etag = None, '"2"'
    server.content = server.content[:50_000] + b"!" + server.content[50_001:]
    download(server.published, path)
    assert path.read_bytes() == server.content


def test_a_finished_part_is_not_fetched_again(server, tmp_path):
    """A process killed between the last byte and the rename costing the whole download."""
    path = tmp_path / "in" / "x.pt"
    server.cut = 70_000
    with pytest.raises(UserError, match="ended after"):
        download(server.published, path)
    (path.parent / "x.pt.partial").write_bytes(server.content)
    download(server.published, path)
    assert len(server.asked) == 1
    assert path.read_bytes() == server.content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 404}, "answered 404"),
        ({"kind": "text/html"}, "text page"),
        ({"content": b"no weights" * 100}, "did not send a PyTorch file"),
    ],
)
def test_a_server_with_something_else_is_refused(change, message, server, tmp_path):
    """A page about a moved file stored as weights."""
    vars(server).update(change)
    with pytest.raises(UserError, match=message):
        download(server.published, tmp_path / "in" / "x.pt")
    assert not (tmp_path / "in" / "x.pt").exists()


def test_a_published_hash_decides(server, tmp_path):
    """A tampered file accepted."""
    with pytest.raises(UserError, match="the published hash is 00"):
        download(server.published._replace(sha256="00" * 32), tmp_path / "in" / "x.pt")
    assert not (tmp_path / "in" / "x.pt").exists()
    beginning = server.published._replace(sha256=hashlib.sha256(server.content).hexdigest()[:8])
    assert download(beginning, tmp_path / "in" / "x.pt").startswith(beginning.sha256)


def test_without_a_connection_the_message_says_so(server, tmp_path):
    """A stack trace, or a wait without end."""
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1.*--weights"):
        download(server.published, tmp_path / "in" / "x.pt")


def test_published_files_are_fetched_over_https():
    """A typo in the table."""
    for published in PUBLISHED.values():
        assert published.url.startswith("https://")
        assert published.file_name.endswith((".pt", ".pth"))
