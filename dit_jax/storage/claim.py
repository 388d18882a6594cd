"""Claims on folders and files, so that only one command at a time writes there.

A claim is the first file that a verb writes: `<folder>/.lock`, or `.<name>.lock` next to an output file. It holds the command and
its process as JSON, and an exclusive flock(2), which ends with the process, even if that is killed. A child process that inherits
the descriptor holds the claim too. The next command takes the claim of a dead process over, and continues its work.

Some file systems have no flock. There the file alone is the claim. Its holder lives if its process does or, on another host, if
it renews the time of the file.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dit_jax.errors import UserError
from dit_jax.storage.atomic import is_partial, remove_leftovers

LOCK = ".lock"
WITHOUT_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # what file systems without it answer
# The times of claims without flock. A holder renews the time of its file; one on another host is dead if others, which look at
# the file, see no renewal for several intervals: a network file system may show a change late. Of several commands that take over
# one file at once, the last that writes it keeps it, so each looks again after the time that a write takes.
RENEWED_SECONDS = 5.0
SILENT_SECONDS = 6 * RENEWED_SECONDS
LOOK_SECONDS = 1.0  # at most, between two looks
SETTLED_SECONDS = 0.5
MOST_TEXT = 160  # characters of a command in a message

_held: set[str] = set()  # the ids of the claims of this process


@dataclass(frozen=True)
class Claim:
    """An active claim.

    Fields:
        folder: the folder of the lock file.
        descriptor: of the lock. A child process started with `pass_fds=(descriptor,)` keeps the claim if its parent is killed,
            where the file system has flock.
    """

    folder: Path
    descriptor: int


@contextlib.contextmanager
def claim(folder: str | os.PathLike, what: str, flag: str = "--workdir", wait: bool = False) -> Iterator[Claim]:
    """Creates a folder and holds the claim on it during the block; then removes the lock file.

    Args:
        what: the work that needs the claim, for the error message: "training".
        flag: the user's flag for the folder, for the error message.
        wait: for the end of another command in the folder, instead of raising.

    Raises:
        UserError: another command is running in the folder; or it cannot be written or locked.
    """
    with _claimed(Path(folder) / LOCK, Path(folder), what, flag, wait) as claimed:
        yield claimed


@contextlib.contextmanager
def claim_file(path: str | os.PathLike, what: str, flag: str = "--out", wait: bool = False) -> Iterator[Claim]:
    """Holds the claim on an output file during the block, after removing the partial files of it that a killed command left.

    Args: as `claim`.

    Raises:
        UserError: another command is writing the file; or its folder cannot be written.
    """
    path = Path(path)
    with _claimed(lock_of(path), path, what, flag, wait) as claimed:
        remove_leftovers(path.parent, path.name)
        yield claimed


def lock_of(path: Path) -> Path:
    """The lock file of an output file."""
    return path.with_name(f".{path.name}{LOCK}")


def strange_names(folder: Path, own: re.Pattern[str]) -> list[str]:
    """Names in a claimed folder that are neither those of the verb's own files nor those of unfinished ones; sorted."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if not (own.fullmatch(name) or name == LOCK or is_partial(name)))


@contextlib.contextmanager
def _claimed(file: Path, target: Path, what: str, flag: str, wait: bool) -> Iterator[Claim]:
    me = secrets.token_hex(8)
    _held.add(me)
    try:
        descriptor, renewed = _lock(file, me, wait)
    except BaseException as error:
        _held.discard(me)
        if not isinstance(error, OSError):
            raise
        if not isinstance(error, BlockingIOError):
            raise UserError(f"{target} cannot be written or locked ({error.strerror}); give another {flag}") from None
        raise UserError(
            f"another command, or a process that a killed one left behind, is at work in {target}; wait for it or end it "
            f"{_named(file)}before {what} there, or give another {flag}"
        ) from None
    try:
        yield Claim(file.parent, descriptor)
    finally:
        _held.discard(me)
        if renewed is not None:
            renewed.set()
        try:
            with contextlib.suppress(OSError):
                content = _content(file)  # None on a full disk
                if _is_at(file, descriptor) and (content is None or content["id"] == me):
                    file.unlink()
        finally:
            os.close(descriptor)


def _lock(file: Path, me: str, wait: bool) -> tuple[int, threading.Event | None]:
    """Acquires the lock; returns its descriptor and, without flock, an event that ends its renewal.

    Raises: BlockingIOError if another holds it and not wait, OSError.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        created, descriptor = _opened(file)
        renewed: threading.Event | None = None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                if error.errno not in WITHOUT_FLOCK:
                    raise
                _take_over(file, descriptor, me, created, wait)
                renewed = threading.Event()
            if _is_at(file, descriptor):
                if renewed is None:
                    _write(descriptor, me)
                else:
                    threading.Thread(target=_renew, args=(os.dup(descriptor), renewed), name="claim", daemon=True).start()
                return descriptor, renewed
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder removed this file between the open and the lock


def _opened(file: Path) -> tuple[bool, int]:
    """(whether the file is new, its descriptor)."""
    try:
        return True, os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False, os.open(file, os.O_RDWR | os.O_CREAT, 0o666)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the path still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _host() -> str:
    """This host, and the container where it has one: a number of a process means something only here."""
    try:
        return f"{os.uname().nodename} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename


def _started(pid: int) -> str | None:
    """Tells a running process from others that have had its number; None if there is none, or it is dead and not reaped yet."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # of another user
    return ""


def _write(descriptor: int, me: str) -> None:
    """Writes the command and the process of the claim. A disk that is full does not matter where flock holds it."""
    content = {
        "id": me,
        "command": shlex.join(sys.orig_argv),
        "host": _host(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }
    data = json.dumps(content).encode()
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)


def _content(file: Path) -> dict | None:
    """The command and the process of a claim; None of one of an earlier version, or one that is being written."""
    try:
        content = json.loads(file.read_bytes()[:100_000])
        return content if isinstance(content, dict) and {"id", "command", "host", "pid", "started"} <= content.keys() else None
    except (OSError, ValueError, RecursionError):
        return None


def _named(file: Path) -> str:
    """ "(process 12 on h: python -m dit_jax.main) ", or "" if the claim does not say."""
    content = _content(file)
    if content is None:
        return ""
    command = " ".join(str(content["command"]).split())
    command = command if len(command) <= MOST_TEXT else f"{command[:MOST_TEXT]}..."
    return f"(process {content['pid']} on {str(content['host']).split()[0]}: {command}) "


def _take_over(file: Path, descriptor: int, me: str, created: bool, wait: bool) -> None:
    """Claims a file without flock. Raises: BlockingIOError if its holder lives and not wait."""
    while not created and _lives(file):
        if not wait:
            raise BlockingIOError(errno.EWOULDBLOCK, "another command")
        time.sleep(SETTLED_SECONDS)
    if not _is_at(file, descriptor):
        return  # its holder removed it; `_lock` begins again
    _write(descriptor, me)
    if not created:
        time.sleep(SETTLED_SECONDS)
    content = _content(file)
    if content is not None and content["id"] != me:
        raise BlockingIOError(errno.EWOULDBLOCK, "another command was faster")


def _lives(file: Path) -> bool:
    """Whether the holder of a claim without flock lives; False if there is no claim any more."""
    content = _content(file)
    if content is None:  # without a process: being written, or never to be
        return _changes(file, SETTLED_SECONDS) and _content(file) is not None and _lives(file)
    if content["host"] == _host():
        if content["pid"] == os.getpid():
            return content["id"] in _held
        return isinstance(content["pid"], int) and _started(content["pid"]) == content["started"]
    return _changes(file, SILENT_SECONDS)


def _changes(file: Path, seconds: float) -> bool:
    """Whether the file is written or its time is renewed within so many seconds."""

    def state() -> tuple[int, int] | None:
        try:
            status = file.stat()
            return status.st_mtime_ns, status.st_size
        except FileNotFoundError:
            return None

    first, end = state(), time.monotonic() + seconds
    while time.monotonic() < end:
        if (now := state()) != first:
            return now is not None
        time.sleep(min(seconds / 10, LOOK_SECONDS))
    return False


def _renew(descriptor: int, ended: threading.Event) -> None:
    try:
        while not ended.wait(RENEWED_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(descriptor)
    finally:
        os.close(descriptor)
