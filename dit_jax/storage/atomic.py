"""Replaces files and folders atomically: a reader sees the old or the new content, even after a kill or a power failure.

Content is written to a partial file in the same folder, `.<name>.<8 hex digits>.partial`, synced to disk and renamed. The digits
are random, so that processes on several hosts may write one file at once: the last rename wins. A writer that fails removes its
partial file. A killed writer leaves it; `remove_leftovers` removes it.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PARTIAL = ".partial"
OLD = ".old"
_OWN_NAME = re.compile(rf"\.(?P<name>.+)\.[0-9a-f]{{8}}(?P<kind>{re.escape(PARTIAL)}|{re.escape(OLD)})")
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)  # of file systems that sync no folders

Buffer = bytes | bytearray | memoryview


class Written(NamedTuple):
    """Size in bytes and SHA-256 in hex of the written content, computed from memory; the file is not read back."""

    size: int
    sha256: str


def write_atomic(path: str | os.PathLike, content: str | Buffer | Iterable[Buffer]) -> Written:
    """Replaces a file by `content`: text in UTF-8, bytes, or a sequence of buffers.

    Raises:
        OSError: the file cannot be written; the old one is kept.
    """
    if isinstance(content, str):
        content = content.encode()
    sha256, size = hashlib.sha256(), 0
    with replacing(path) as partial, open(partial, "wb") as file:
        for part in [content] if isinstance(content, Buffer) else content:
            file.write(part)
            sha256.update(part)
            size += memoryview(part).nbytes
    return Written(size, sha256.hexdigest())


def write_json(path: str | os.PathLike, value: Any, indent: int = 1) -> Written:
    """Replaces a file by JSON text and a newline."""
    return write_atomic(path, json.dumps(value, indent=indent) + "\n")


def append_json(path: str | os.PathLike, value: Any) -> None:
    """Appends a line of JSON to a file, in one write, and syncs it; creates the file.

    A kill leaves the line or nothing. A half line that a power failure left is ended first, so that it spoils no other.

    Raises:
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, ("\n" * is_torn + json.dumps(value) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def npy(array: np.ndarray) -> list[Buffer]:
    """The parts of an .npy file of a C-contiguous array, for `write_atomic`: header and data; the data are not copied."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return [header.getvalue(), array.reshape(-1).view(np.uint8).data]


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a partial path in the folder of `path`, and renames it to `path` if the block ends without an error.

        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    Raises:
        OSError: as the block; or the file cannot be written. The old file is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        commit(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # it must not hide the first error
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new folder next to `path`, and renames it to `path` if the block ends without an error.

    No system call replaces a folder that is not empty: for a moment `path` does not exist, and the old folder is
    `.<name>.<8 hex digits>.old`. If the process is killed then, `remove_leftovers` puts it back.

    Raises:
        OSError: as the block; or the folder cannot be written. The old folder is kept.
    """
    path = Path(path)
    partial = partial_path(path)
    old = partial.with_suffix(OLD)
    try:
        partial.mkdir(parents=True)
        yield partial
        for inside in partial.rglob("*"):
            sync(inside)
        sync(partial)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(partial, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def partial_path(path: str | os.PathLike) -> Path:
    """A new partial path in the folder of `path`. For writers that cannot use `replacing`; see `commit`."""
    path = Path(path)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")


def resumable_path(path: str | os.PathLike) -> Path:
    """`<path>.partial`, for unfinished work that is kept after a failure because the same command resumes it."""
    path = Path(path)
    return path.with_name(f"{path.name}{PARTIAL}")


def is_partial(name: str) -> bool:
    """Whether a name is that of an unfinished file, including those of earlier versions of dit_jax."""
    return name.endswith(PARTIAL)


def commit(partial: Path, path: Path) -> None:
    """Renames a finished partial file to `path`, durably. Raises: OSError."""
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def remove_leftovers(folder: Path, *names: str | re.Pattern[str]) -> None:
    """Removes the partial files and folders that killed writers left in `folder`.

    Partial files of active writers look the same, so call this only while nothing else writes here, for example under a claim.

    Args:
        names: removes only the partial files of these names, or of names that match a pattern. Without names it removes every
            partial file, including resumable ones and those of earlier versions, so the folder must belong to dit_jax.
    """

    def is_named(own: re.Match[str] | None) -> bool:
        return own is not None and any(
            own["name"] == name if isinstance(name, str) else name.fullmatch(own["name"]) for name in names
        )

    for path in list(folder.iterdir()) if folder.is_dir() else []:
        own = _OWN_NAME.fullmatch(path.name)
        if path.is_dir():
            if own and (not names or is_named(own)):
                if own["kind"] == OLD and not (folder / own["name"]).exists():
                    os.replace(path, folder / own["name"])
                else:
                    shutil.rmtree(path, ignore_errors=True)
        elif is_named(own) if names else is_partial(path.name):
            path.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Raises OSError if `path` cannot be written; creates its folder. Call before the work whose result is written there."""
    partial = partial_path(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    partial.unlink(missing_ok=True)  # another command that starts here may have removed it as a leftover


def sync(path: Path) -> None:
    """Blocks until a file, or the entries of a folder, are on disk. Raises: OSError."""
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
