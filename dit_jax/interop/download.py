"""Fetches published weights: goes on where it was cut off, and checks what arrived.

Most publishers give no hash, so the first download records one beside the file, and later runs hold the file to it.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dit_jax.errors import UserError
from dit_jax.interop.pt_reader import is_pt
from dit_jax.storage.atomic import commit, resumable_path, write_atomic
from dit_jax.storage.sealed import sha256_of

TIMEOUT_SECONDS = 60
CHUNK = 1 << 20


class Published(NamedTuple):
    """A file on the web.

    Fields:
        layout: what `convert --from` calls it.
        sha256: in hex, whole or its beginning, as far as the publisher gives it; None where none is given.
    """

    url: str
    file_name: str
    layout: str
    sha256: str | None = None


PUBLISHED = {
    "dit-xl2-256": Published("https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt", "DiT-XL-2-256x256.pt", "official"),
    "dit-xl2-512": Published("https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt", "DiT-XL-2-512x512.pt", "official"),
    "sit-xl2-256": Published(
        "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
        "SiT-XL-2-256x256.pt",
        "sit",
    ),
    "inception": Published(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "pt_inception-2015-12-05-6726825d.pth",
        "inception",
        "6726825d",
    ),
    "dinov2-vitl14": Published(
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth", "dinov2_vitl14_pretrain.pth", "dinov2"
    ),
}


def download(published: Published, path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Makes `path` the published file and returns its SHA-256; a file that is there already is held to its record and kept.

    Without a record or a published hash nobody can tell whether it is the right one: its hash is then recorded as it is.

    Beside it: `<path>.sha256` in the form of sha256sum, and until the end `<path>.partial` with `<path>.partial.json`.

    Args:
        progress: called with bytes done and in all.

    Raises:
        UserError: no connection, or it broke; the server refused or sent something else; size or hash are wrong.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = resumable_path(path)
        _fetch(published.url, partial, progress)
        if not is_pt(partial):
            partial.unlink()
            raise UserError(
                f"{published.url} sent something that is not a PyTorch file; it may have moved. Give the file with "
                "--weights instead"
            )
        found = _check(published, partial, path)
        commit(partial, path)
        partial.with_name(partial.name + ".json").unlink(missing_ok=True)
    else:
        found = _check(published, path, path)
    write_atomic(_record(path), f"{found}  {path.name}\n")
    return found


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _check(published: Published, file: Path, path: Path) -> str:
    """The file's hash, which must be the published or else the recorded one, if there is either."""
    found = sha256_of(file)
    wanted, source = published.sha256, "the published one"
    if wanted is None and _record(path).exists():
        wanted, source = _record(path).read_text().split(maxsplit=1)[0], f"the one recorded in {_record(path)}"
    if wanted is not None and not found.startswith(wanted):
        raise UserError(
            f"{file} has the SHA-256 {found}, and {source} is {wanted}: the file is damaged or was replaced. Delete "
            "it and run the command again (and the record too, if you trust the new file)"
        )
    return found


def _fetch(url: str, partial: Path, progress):
    """Appends to `partial` what it lacks of the file at url."""
    state = partial.with_name(partial.name + ".json")
    have, validator = 0, ""
    if partial.exists() and state.exists():
        stored = json.loads(state.read_text())
        if stored["url"] == url and stored["validator"]:  # else nobody knows whether the rest belongs to the same file
            have, validator = partial.stat().st_size, stored["validator"]
            if have == stored["total"]:
                return
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if have else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
            if response.headers.get_content_maintype() == "text":
                raise UserError(f"{url} sent a page of text, not a file; it may have moved. Give the file with --weights instead")
            if response.status != 206:  # the whole file: it changed, or the server cannot resume
                have = 0
            total = _total(response, have)
            validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            write_atomic(state, json.dumps({"url": url, "validator": validator, "total": total}))
            done = _append(response, partial, have, total, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file
            partial.unlink()
            raise UserError(f"{partial} does not fit {url} any more and was removed; run the command again") from None
        raise UserError(
            f"{url}: the server answered {error.code} {error.reason}. Try later, or give the file with --weights"
        ) from None
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise UserError(f"cannot write {partial}: {error}") from None
        reason = getattr(error, "reason", error)
        kept = f" {partial.stat().st_size} bytes are kept; the same command goes on from there." if partial.exists() else ""
        raise UserError(
            f"cannot download {url}: {reason}.{kept} Without a connection, fetch the file elsewhere and give it with --weights"
        ) from None
    if done != total:
        raise UserError(f"{url}: the connection ended after {done} of {total} bytes; the same command goes on from there")


def _total(response, have: int) -> int:
    """Size of the whole file as the server tells it."""
    length = response.headers.get("Content-Length")
    if length is None:
        raise UserError(
            f"{response.url}: the server does not tell the size, so nothing could be checked; fetch the file "
            "elsewhere and give it with --weights"
        )
    if have:
        start = response.headers.get("Content-Range", "")
        if not start.startswith(f"bytes {have}-"):
            raise UserError(
                f"{response.url}: asked for bytes from {have} on, the server sent {start!r}; delete the .partial "
                "file and run the command again"
            )
    return have + int(length)


def _append(response, partial: Path, have: int, total: int, progress) -> int:
    with open(partial, "r+b" if have else "wb") as file:
        file.seek(have)
        while chunk := response.read(CHUNK):
            file.write(chunk)
            have += len(chunk)
            progress(have, total)
    return have
