"""A claim on a folder: one command writes in it at a time.

The claim is an exclusive flock(2) on `<folder>/.lock`. It ends with the process that holds it, however that ends. A child process
that inherits the descriptor holds it too.
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
    """A claim that is held.

    Fields:
        folder: what is claimed.
        descriptor: of the lock. A child process started with `pass_fds=(descriptor,)` keeps the claim if its parent is killed.
    """

    folder: Path
    descriptor: int


@contextlib.contextmanager
def claim(folder: str | os.PathLike, what: str, flag: str = "--workdir") -> Iterator[Claim]:
    """Holds the claim on a folder, which is created, while the block runs; then removes the lock file.

    Args:
        what: the work that needs it, for the error message: "training".
        flag: what the user gives the folder with, for the error message.

    Raises:
        UserError: another command is at work in the folder; it cannot be written or locked.
    """
    folder = Path(folder)
    try:
        descriptor = _lock(folder)
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
        with contextlib.suppress(OSError):
            if _is_at(folder / LOCK, descriptor):
                (folder / LOCK).unlink()
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock. Raises: BlockingIOError if another holds it, OSError."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(folder / LOCK, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder removed this file between the open and the lock


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
