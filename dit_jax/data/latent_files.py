"""The files of a latent cache: names, sealed JSON, crash-safe writing and damage detection.

    settings.json                    everything that determines the bytes; written first
    00007-of-00012.moments.npy       float16 [count * views, h, w, 2c], row views * i + mirror; plain .npy
    00007-of-00012.labels.npy        int32 [count]
    00007-of-00012.index.npy         int64 [count], the number of each record in the source; bad records are skipped
    00007-of-00012.captions.json     count strings or nulls; only if the source has captions
    00007-of-00012.json              facts of the shard: counts, bad records, sums, size and SHA-256 of the files above
    manifest.json                    written last: a cache without it is not finished

JSON files end in a seal, the SHA-256 of the rest, which detects flipped bytes.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dit_jax.errors import UserError

FORMAT = 1
MANIFEST, SETTINGS = "manifest.json", "settings.json"
SUFFIXES = {
    "moments": ".moments.npy",
    "labels": ".labels.npy",
    "index": ".index.npy",
    "captions": ".captions.json",
    "facts": ".json",
}


def shard_file(shard: int, shards: int, kind: str) -> str:
    """Name of a file of shard `shard` of `shards`; kind is a key of SUFFIXES."""
    return f"{shard:05d}-of-{shards:05d}{SUFFIXES[kind]}"


def digest(content: dict) -> str:
    """SHA-256 of a JSON object; it depends on the order of keys, but not on the layout of the text."""
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()


def sealed(content: dict) -> bytes:
    """Serialises an object to JSON with its digest under the key "seal"."""
    return (json.dumps({**content, "seal": digest(content)}, indent=1, allow_nan=False) + "\n").encode()


def read_sealed(path: Path) -> dict:
    """Reads the object in a file written by `sealed`.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: any byte of it has changed.
    """
    data = path.read_bytes()
    try:
        content = json.loads(data)
        content.pop("seal")
        intact = sealed(content) == data
    except (ValueError, AttributeError, KeyError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: its content does not match its seal")
    return content


def npy(array: np.ndarray) -> list:
    """The parts of an .npy file of a C-contiguous array: header and data; the data are not copied."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return [header.getvalue(), array.reshape(-1).view(np.uint8).data]


def write(path: Path, parts: Iterable) -> dict:
    """Writes buffers to `path` atomically, even if the machine crashes; returns {"name", "bytes", "sha256"}.

    The hash is computed from memory; the file is not read back.
    """
    partial = path.with_name(path.name + ".partial")
    sha256, size = hashlib.sha256(), 0
    with open(partial, "wb") as file:
        for part in parts:
            file.write(part)
            sha256.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return {"name": path.name, "bytes": size, "sha256": sha256.hexdigest()}


def damage(folder: Path, files: list[dict], hashes: bool) -> dict[str, str]:
    """Finds files (as returned by `write`) that are missing, differ in size or, with `hashes`, in content: {name: problem}.

    Hashing uses one thread per core.
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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
