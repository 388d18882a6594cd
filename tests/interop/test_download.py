"""Downloads from a server on this machine: resumed, checked, and refused."""

import contextlib
import hashlib
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from dit_files import held
from kill_points import Killed, check_every_kill, killed_before

from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.errors import UserError
from dit_jax.interop import download as downloads
from dit_jax.interop import pt_writer, vae
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


@pytest.mark.slow
def test_killed_before_any_file_operation(server, tmp_path):
    """A part that is taken for the whole, or for a part of another file; a record of the download that stays."""
    check_every_kill(tmp_path, lambda folder: download(server.published, folder / "in" / "x.pt"), 1, times=2)


@pytest.mark.slow
def test_a_file_that_changes_on_the_server_between_two_kills(server, tmp_path):
    """The beginning of the old file and the end of the new one."""
    old, new = server.content, bytearray(server.content)
    new[1000] ^= 1
    published = server.published._replace(sha256=hashlib.sha256(new).hexdigest())
    for number in itertools.count(1):
        path = tmp_path / str(number) / "x.pt"
        server.content, server.etag, server.cut = old, '"1"', 70_000
        with pytest.raises(UserError, match="run the command again"):
            download(published, path)
        server.content, server.etag, server.cut = bytes(new), '"2"', None
        with contextlib.suppress(Killed), killed_before(path.parent, number) as operations:
            download(published, path)
        download(published, path)
        assert path.read_bytes() == new
        if not operations.dead:
            break
    assert number > 5


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
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1.* elsewhere and copy it to .*in/x\.pt"):
        download(server.published, tmp_path / "in" / "x.pt")


def test_published_files_are_fetched_over_https():
    """A typo in the table."""
    for published in PUBLISHED.values():
        assert published.url.startswith("https://")
        assert published.file_name.endswith((".pt", ".pth", ".safetensors"))


@pytest.fixture
def vae_server(server, tmp_path, monkeypatch):
    """The server has the weights of sd-vae-ft-mse, which are kept below tmp_path."""
    server.content = b"not read here" * 20_000
    url, digest = server.published.url.replace("x.pt", vae.WEIGHTS_NAME), hashlib.sha256(server.content).hexdigest()
    published = PUBLISHED["sd-vae-ft-mse"]._replace(url=url, sha256=digest)
    monkeypatch.setitem(PUBLISHED, "sd-vae-ft-mse", published)
    monkeypatch.setattr(downloads, "CACHE", tmp_path / "cache")
    return server


def test_a_codec_by_name_is_downloaded_once_and_resumed(vae_server, tmp_path):
    """The default codec of ImageNet fetched at every start, started again from zero, or unreadable without its config."""
    with pytest.raises(UserError, match=r"convert --download=sd-vae-ft-mse"):
        vae.find("sd-vae-ft-mse", fetch=False)
    assert not (tmp_path / "cache").exists()
    vae_server.cut = 70_000
    with pytest.raises(
        UserError, match=r"ended after 70000 .* copy it to .*/cache/sd-vae-ft-mse/diffusion_pytorch_model.*--download=sd"
    ):
        vae.find("sd-vae-ft-mse")
    vae_server.cut = None
    folder = vae.find("sd-vae-ft-mse")
    assert vae.find("sd-vae-ft-mse") == vae.find("sd-vae-ft-mse", fetch=False) == folder == tmp_path / "cache" / "sd-vae-ft-mse"
    assert vae_server.asked == [None, "bytes=70000-"]
    assert (folder / vae.WEIGHTS_NAME).read_bytes() == vae_server.content
    assert vae.read_codec(folder) == KLVAE()
    (folder / vae.WEIGHTS_NAME).write_bytes(b"?" + vae_server.content[1:])
    with pytest.raises(UserError, match="the published hash is"):
        vae.find("sd-vae-ft-mse")


@pytest.mark.slow
def test_a_codec_killed_before_any_file_operation(vae_server, tmp_path):
    """Weights without their config, a lock or a partial file that stays."""
    folder = tmp_path / "out"
    folder.mkdir()
    check_every_kill(folder, lambda out: vae.fetch_published("sd-vae-ft-mse", out / "vae"), 3, times=2)


def test_a_folder_of_that_name_wins(vae_server, tmp_path, monkeypatch):
    """A download in place of the user's own folder sd-vae-ft-mse, which older commands name."""
    monkeypatch.chdir(tmp_path)
    for file in ("config.json", vae.WEIGHTS_NAME):
        (tmp_path / "sd-vae-ft-mse").mkdir(exist_ok=True)
        (tmp_path / "sd-vae-ft-mse" / file).write_text("{}")
    assert vae.find("sd-vae-ft-mse").samefile(tmp_path / "sd-vae-ft-mse") and not vae_server.asked


def test_processes_that_start_together_download_once(vae_server):
    """Two processes of a host that write one partial file."""
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(lambda _: vae.find("sd-vae-ft-mse"), range(3)))) == 1
    assert vae_server.asked == [None]


def test_the_written_config_is_that_of_the_published_codec(vae_server):
    """A scale or a size that is not sd-vae-ft-mse's. `published` is its config.json, by SHA-256 of the file."""
    published = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.4.2",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    text = json.dumps(published, indent=2) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"
    written = json.loads((vae.find("sd-vae-ft-mse") / "config.json").read_text())
    assert {
        key: written[key] for key in published if key not in ("_diffusers_version", "sample_size")
    }.items() <= published.items()
    assert written["scaling_factor"] == 0.18215 and written["use_quant_conv"]
