"""Claims on folders, so that only one command at a time writes in a folder.

A claim is an exclusive flock(2) on `<folder>/.lock`. It ends with the process that holds it, even if that is killed. A child
process that inherits the descriptor holds the claim too.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dit_jax.errors import UserError

LOCK = ".lock"


@dataclass(frozen=True)
class Claim:
    """An active claim.

    Fields:
        folder: the claimed folder.
        descriptor: of the lock. A child process started with `pass_fds=(descriptor,)` keeps the claim if its parent is killed.
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
    folder = Path(folder)
    try:
        descriptor = _lock(folder, wait)
    except BlockingIOError:
        raise UserError(
            f"another command, or a process that a killed one left behind, is at work in {folder}; wait for it or end it "
            f"before {what} there, or give another {flag}"
        ) from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written or locked ({error.strerror}); give another {flag}") from None
    try:
        yield Claim(folder, descriptor)
    finally:
        try:
            with contextlib.suppress(OSError):
                if _is_at(folder / LOCK, descriptor):
                    (folder / LOCK).unlink()
        finally:
            os.close(descriptor)


def _lock(folder: Path, wait: bool) -> int:
    """Acquires the lock and returns its descriptor. Raises: BlockingIOError if another process holds it and not wait, OSError."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(folder / LOCK, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder removed this file between the open and the lock


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the path still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
