"""Sealed JSON files, which end in the SHA-256 of the rest to detect flipped bytes, and lists of files with their hashes."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dit_jax.errors import UserError
from dit_jax.storage.atomic import Buffer, Written, write_atomic
from dit_jax.storage.bounded import check_form, json_object


def digest(content: dict) -> str:
    """SHA-256 of a JSON object; it depends on the order of keys, but not on the layout of the text."""
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()


def sealed(content: dict) -> bytes:
    """Serialises an object to JSON with its digest under the key "seal"."""
    return (json.dumps({**content, "seal": digest(content)}, indent=1, allow_nan=False) + "\n").encode()


def write_sealed(path: Path, content: dict) -> Written:
    """Replaces a file by the `sealed` text of an object. Raises: OSError."""
    return write_atomic(path, sealed(content))


def read_sealed(path: Path, form: Mapping[str, Any] | None = None) -> dict:
    """Reads the object in a file written by `write_sealed`.

    A seal finds damage. Anybody can make one, so it does not say that the content is of dit_jax.

    Args:
        form: what the object must hold, see `bounded.check_form`.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: any byte of it has changed, or it has another form.
    """
    data = path.read_bytes()
    try:
        content = json_object(data, str(path))
        content.pop("seal")
        intact = sealed(content) == data
    except (ValueError, KeyError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: its content does not match its seal")
    check_form(content, form or {}, str(path))
    return content


def write_listed(path: Path, content: Buffer | Iterable[Buffer]) -> dict:
    """Replaces a file as `write_atomic` does; returns its entry in a list of files: {"name", "bytes", "sha256"}."""
    written = write_atomic(path, content)
    return {"name": path.name, "bytes": written.size, "sha256": written.sha256}


def damage(folder: Path, files: list[dict], hashes: bool) -> dict[str, str]:
    """Finds files (entries as returned by `write_listed`) that are missing or have another size: {name: problem}.

    Hashing uses one thread per core.

    Args:
        hashes: whether to read every byte and compare the SHA-256 too.
    """

    def problem(file: dict) -> str | None:
        path = folder / file["name"]
        try:
            if (size := path.stat().st_size) != file["bytes"]:
                return f"{file['name']} has {size} bytes instead of {file['bytes']}"
            if hashes and sha256_of(path) != file["sha256"]:
                return f"{file['name']} does not match its SHA-256"
        except OSError as error:
            return f"{file['name']}: {error.strerror}"
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = zip(files, pool.map(problem, files), strict=True)
        return {file["name"]: line for file, line in lines if line}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
