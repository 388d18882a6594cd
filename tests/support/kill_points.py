"""Kills Python code before its n-th operation that changes files, without a process of its own.

The operation raises `Killed`, and so does every later one, in every thread: code that runs on the way out changes nothing more.
Reads still work.
"""

import builtins
import contextlib
import datetime
import errno
import io
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest


class WithoutFlock(int):
    """A share of the operations, on a file system without flock."""


# Of the operations before which a test kills: CI takes every tenth, another tenth each day.
SHARES = [
    pytest.param(10, marks=[pytest.mark.slow, pytest.mark.faults]),
    pytest.param(1, marks=pytest.mark.exhaustive),
    pytest.param(WithoutFlock(10), marks=pytest.mark.exhaustive, id="10-without-flock"),
]
CHANGES = ("replace", "rename", "remove", "unlink", "mkdir", "rmdir", "truncate", "link", "symlink")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killed(BaseException):
    """Not an Exception, so that no handler of errors takes it."""


class Operations:
    """The operations so far below a folder; `names` says what they were."""

    def __init__(self, folder: Path, number: int | None):
        self.folder, self.number, self.names, self.dead = str(folder), number, [], False

    def before(self, name, path):
        if isinstance(path, str | os.PathLike) and not self.is_below(path):
            return
        self.names.append(f"{name} {path}")
        if self.dead or len(self.names) == self.number:
            self.dead = True
            raise Killed(self.names[-1])

    def is_below(self, path):
        path = os.fspath(path)
        return not os.path.isabs(path) or path.startswith(self.folder)  # relative ones belong to a descriptor, as in rmtree


@contextlib.contextmanager
def killed_before(folder: Path, number: int | None):
    """Kills the block before operation `number` below the folder, from 1; with None it only counts. Yields `Operations`."""
    operations = Operations(folder, number)

    def changing(name):
        real = getattr(os, name)

        def call(path, *args, **kwargs):
            operations.before(name, path)
            return real(path, *args, **kwargs)

        return call

    def open_file(real):
        def call(file, mode="r", *args, **kwargs):
            if set(mode) & set("wax+"):
                operations.before("open", file)
            return real(file, mode, *args, **kwargs)

        return call

    def os_open(path, flags, *args, real=os.open, **kwargs):
        if flags & WRITE_FLAGS and not flags & os.O_DIRECTORY:
            operations.before("os.open", path)
        return real(path, flags, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in CHANGES:
            stack.enter_context(mock.patch.object(os, name, changing(name)))
        for module in (builtins, io):
            stack.enter_context(mock.patch.object(module, "open", open_file(open)))
        stack.enter_context(mock.patch.object(os, "open", os_open))
        yield operations


def every(share: int, total: int) -> range:
    """Every `share`-th of the operations 1 .. total, other ones each day; with 1 all of them."""
    return range(1 + datetime.date.today().toordinal() % share, total + 1, share)


def check_every_kill(
    folder: Path,
    command: Callable[[Path], object],
    share: int,
    ended: Callable[[Path], dict] | None = None,
    times: int = 1,
    prepare: Callable[[Path], object] = Path.mkdir,
) -> list[str]:
    """Kills `command(out)` before every `share`-th operation in a new folder `out`; started again it must end as undisturbed.

    Returns the operations of the undisturbed command.

    Args:
        folder: gets a folder for each kill.
        ended: what must be equal, of a folder, as {name: value}; None for all its files (`tree`).
        times: how often each is killed, from the second time on before some other operation.
        prepare: creates the folder `out`, undisturbed.
    """
    if isinstance(share, WithoutFlock):
        with mock.patch("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented"))):
            return check_every_kill(folder, command, int(share), ended, times, prepare)
    ended, outs = ended or tree, (folder / f"out{i}" for i in itertools.count())
    out = next(outs)
    prepare(out)
    with killed_before(out, None) as operations:
        command(out)
    expected, total = ended(out), len(operations.names)
    for number in every(share, total):
        out = next(outs)
        prepare(out)
        for i in range(times):
            with contextlib.suppress(Killed), killed_before(out, number * 7 * i % total + 1 if i else number):
                command(out)
        command(out)
        found = ended(out)
        differ = sorted(name for name in found.keys() | expected.keys() if found.get(name, 0) != expected.get(name, 0))
        assert not differ, f"killed before operation {number}, {operations.names[number - 1]}: {differ} differ"
        shutil.rmtree(out)
    return operations.names


def tree(folder: Path) -> dict[str, bytes]:
    """{path below the folder: content} of all files, and of empty folders as b"/"."""
    paths = sorted(folder.rglob("*"))
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}
    return files | {str(path.relative_to(folder)): b"/" for path in paths if path.is_dir() and not any(path.iterdir())}
