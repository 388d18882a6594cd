"""Downloads published weights, resumes interrupted downloads and verifies the files.

Most publishers give no hash. The first download therefore records the hash next to the file, and later runs compare with it.
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
from dit_jax.runtime import console
from dit_jax.storage.atomic import commit, remove_leftovers, resumable_path, write_atomic
from dit_jax.storage.bounded import read_json
from dit_jax.storage.claim import claim_file, lock_of
from dit_jax.storage.sealed import sha256_of

CACHE = Path("~/.cache/dit_jax/weights")  # of files that a config names, such as the codec sd-vae-ft-mse
TIMEOUT_SECONDS = 60
CHUNK = 1 << 20


class Published(NamedTuple):
    """A file on the web.

    Fields:
        layout: its name for `convert --from`; "vae" for an autoencoder, which is used as it is.
        sha256: hex digest or a prefix of it, as far as the publisher gives it; None if none is given.
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
    "sd-vae-ft-mse": Published(  # config.json of the same revision is what `vae.fetch_published` writes
        "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493/"
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "vae",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
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


def how_to_get(path: Path) -> str:
    """The end of a message about a file that does not exist: the command that downloads it; "" for no published file name."""
    names = [name for name, published in PUBLISHED.items() if published.file_name == path.name]
    if not names:
        return ""
    text = f"; python -m dit_jax.convert --download={names[0]} --weights={path} downloads it"
    if PUBLISHED[names[0]].layout not in ("official", "sit"):
        return text
    return f"{text}, and --download=sd-vae-ft-mse the autoencoder of its latents (else that is downloaded on first use)"


def byte_progress(name: str) -> Callable[[int, int], None]:
    """A callback (bytes done, total bytes) that prints progress to stderr."""
    progress = None

    def update(done: int, total: int) -> None:
        nonlocal progress
        progress = progress or console.Progress(f"{name}: bytes", total)
        progress.update(done)

    return update


def download(published: Published, path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Downloads the published file to `path` unless it exists, verifies it and returns its SHA-256.

    The hash is compared with the published one or else with the recorded one. If there is neither, the file cannot be verified,
    and its hash is recorded.

    Also writes `<path>.sha256` in the format of sha256sum and, during the download, `<path>.partial` and `<path>.partial.json`.

    Args:
        progress: called with (bytes done, total bytes).

    Raises:
        UserError: the connection failed or broke; the server refused or sent something else; size or hash are wrong.
    """
    state = _state(resumable_path(path))
    if path.exists() and not (state.exists() or lock_of(path).exists()):
        digest = _check(published, path, path)
        if _record(path).exists() and _record(path).read_text() == _recorded(digest, path):
            return digest  # nothing is written: the folder may be read-only by now
    with claim_file(path, "downloading", "--weights", wait=True):
        remove_leftovers(path.parent, state.name, _record(path).name)
        digest = _check(published, path, path) if path.exists() else _download(published, path, progress)
        state.unlink(missing_ok=True)
        write_atomic(_record(path), _recorded(digest, path))
    return digest


def _download(published: Published, path: Path, progress) -> str:
    partial = resumable_path(path)
    try:
        _fetch(published.url, partial, progress)
    except UserError as error:
        raise UserError(f"{error} Or download it elsewhere and copy it to {path}; the same command then takes it") from None
    if path.suffix != ".safetensors" and not is_pt(partial):
        partial.unlink()
        raise UserError(
            f"{published.url} did not send a PyTorch file; it may have moved. Download it elsewhere and copy it to {path}"
        )
    digest = _check(published, partial, path)
    commit(partial, path)
    return digest


def _state(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _recorded(digest: str, path: Path) -> str:
    return f"{digest}  {path.name}\n"


def _check(published: Published, file: Path, path: Path) -> str:
    """Returns the file's hash; raises if it differs from the published one or, without one, from the recorded one."""
    digest = sha256_of(file)
    wanted, source = published.sha256, "the published hash"
    if wanted is None and _record(path).exists():
        wanted, source = _record(path).read_text().split(maxsplit=1)[0], f"the hash recorded in {_record(path)}"
    if wanted is not None and not digest.startswith(wanted):
        raise UserError(
            f"{file} has the SHA-256 {digest}, but {source} is {wanted}: the file is damaged or was replaced. Delete "
            "it and run the command again (if you trust the new file, delete the record too)"
        )
    return digest


def _fetch(url: str, partial: Path, progress):
    """Downloads the part of the file at `url` that `partial` does not have yet, and appends it."""
    state = _state(partial)
    have, validator = 0, ""
    if partial.exists() and state.exists():
        stored = read_json(state, "delete it", {"url": str, "validator": str})
        if stored["url"] == url and stored["validator"]:  # otherwise the file at the URL may have changed
            have, validator = partial.stat().st_size, stored["validator"]
            if have == stored["total"]:
                return
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if have else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
            if response.headers.get_content_maintype() == "text":
                raise UserError(f"{url} sent a text page, not a file; it may have moved.")
            if response.status != 206:  # the whole file: it changed, or the server cannot resume
                have = 0
            total = _total(response, have)
            validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if not have:  # the bytes of another file must not get the validator of this one
                partial.unlink(missing_ok=True)
            write_atomic(state, json.dumps({"url": url, "validator": validator, "total": total}))
            done = _append(response, partial, have, total, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the partial file is longer than the published one
            partial.unlink()
            raise UserError(f"{partial} no longer matches {url} and was removed; run the command again.") from None
        raise UserError(f"{url}: the server answered {error.code} {error.reason}. Try later.") from None
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise UserError(f"cannot write {partial}: {error}.") from None
        reason = getattr(error, "reason", error)
        kept = f" {partial.stat().st_size} bytes are kept; run the command again to resume." if partial.exists() else ""
        raise UserError(f"cannot download {url}: {reason}.{kept}") from None
    if done != total:
        raise UserError(f"{url}: the connection ended after {done} of {total} bytes; run the command again to resume.")


def _total(response, have: int) -> int:
    """Total size of the file, from the response headers."""
    length = response.headers.get("Content-Length")
    if length is None:
        raise UserError(f"{response.url}: the server does not report the size, so the download cannot be verified.")
    if have:
        start = response.headers.get("Content-Range", "")
        if not start.startswith(f"bytes {have}-"):
            raise UserError(
                f"{response.url}: the request was for bytes from {have}, but the server sent {start!r}; delete the "
                ".partial file and run the command again."
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
