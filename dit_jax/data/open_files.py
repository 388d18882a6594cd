"""Reads parts of files that stay open between reads."""

import functools
import os
from pathlib import Path

OPEN_FILES = 256


class _File:
    """A file descriptor that is closed when the last thread that reads from it releases it."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)


class OpenFiles:
    """Reads from files with pread, from many threads at once; opens a file at its first read, at most OPEN_FILES at a time.

    It is pickled without its files. A memory map would end the process (SIGBUS) where a read raises an error.
    """

    def __init__(self):
        self._open = functools.lru_cache(OPEN_FILES)(_File)

    def __reduce__(self):
        return OpenFiles, ()

    def read_into(self, path: Path, offset: int, out: memoryview) -> int:
        """Fills `out`, of bytes, from a file; returns the number of bytes read, which is less at the end of the file.

        Raises:
            OSError: the file cannot be read. The next call opens it anew: after a fault of the storage, an open file may fail for
                ever (ESTALE).
        """
        done = 0
        try:
            file = self._open(path)
            # Network file systems may return less, and one read returns at most 2 GiB.
            while done < len(out) and (count := os.preadv(file.fd, [out[done:]], offset + done)):
                done += count
        except OSError:
            self._open.cache_clear()
            raise
        return done
