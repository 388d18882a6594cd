"""Lists the members of a tar file from its headers, without reading the data between them.

Supports ustar, the old v7 layout, GNU long names and base-256 sizes, and PAX headers. It handles millions of members: a scan
reads one small window per member and never keeps more than that.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dit_jax.errors import UserError

BLOCK = 512
WINDOW = 8192  # one read covers a header and, with small members, the next headers
MAX_EXTENSION = 1 << 20  # largest long name or PAX header; usually they have a few hundred bytes
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REGULAR, DIRECTORY, EXTENSIONS, NO_MEMBER = b"0\07", b"5", b"xgLK", b"V"
REFUSED = {
    b"1": "a hard link: pack with tar --hard-dereference",
    b"2": "a symbolic link: pack with tar --dereference",
    b"S": "a sparse file: pack without --sparse",
    b"M": "the continuation of another volume: join the volumes",
}


class Member(NamedTuple):
    """A regular file in a tar: its name, and the offset and size of its data in bytes."""

    name: str
    offset: int
    size: int


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Context manager that opens a file descriptor for reading; an OSError inside becomes a UserError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check that it exists, is a file, and is readable") from None


class TarScan:
    """Iterates over the regular members of an uncompressed tar, in order; iterating to the end verifies that it is complete.

    Directories and volume labels are skipped. A leading "./" of a name is removed; bytes of a name that are not UTF-8 become
    backslash escapes.

    Args:
        fd: file descriptor; only pread is used.
        what: name of the tar in error messages.
        start, end: byte range of the tar in the file: the complete file, or a tar within a tar.

    Raises (while iterating):
        UserError: the file is not a tar, is compressed, damaged or truncated, has no end mark or something after it, or has a
            member that is a link, sparse or a device.
    Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
    """

    def __init__(self, fd: int, what: str, start: int = 0, end: int | None = None):
        self.what = what
        self._fd, self._start = fd, start
        self._end = os.fstat(fd).st_size if end is None else end
        self._window, self._window_at = b"", start

    def read(self, offset: int, size: int) -> bytes:
        """Reads `size` bytes from `offset` of the file.

        Raises:
            UserError: the tar ends earlier.
        """
        if offset + size > self._end:
            raise self._truncated()
        first = offset - self._window_at
        if first < 0 or first + size > len(self._window):
            self._window = os.pread(self._fd, min(max(size, WINDOW), max(self._end - offset, 0)), offset)
            self._window_at, first = offset, 0
        data = self._window[first : first + size]
        if len(data) < size:
            raise self._truncated()
        return data

    def _truncated(self) -> UserError:
        return UserError(
            f"{self.what} is truncated: it ends at byte {self._end - self._start:,}, in a member or before the end mark; copy or "
            "pack it again"
        )

    def __iter__(self) -> Iterator[Member]:
        position, shared, own, long_name = self._start, {}, {}, None
        while True:
            header = self.read(position, BLOCK)
            if not any(header):
                return self._check_end(position)
            kind, name, size = self._parse(header, position)
            data = position + BLOCK
            if size >= 2**63:
                raise self._damaged(position, f"a member of {size:,} bytes")
            if kind in EXTENSIONS:
                if size > MAX_EXTENSION:
                    raise self._damaged(position, f"a header of {size:,} bytes")
                body = self.read(data, size)
                if kind == b"L":
                    long_name = _text(body.rstrip(b"\0"))
                elif kind in b"xg":
                    (own if kind == b"x" else shared).update(self._pax(body, position))
                position = data + _padded(size)
                continue
            attributes = shared | own
            name = attributes.get("path", long_name or name).removeprefix("./")
            size = int(attributes.get("size", size))
            own, long_name = {}, None
            if "GNU.sparse" in attributes:
                kind = b"S"
            if kind in DIRECTORY or (kind in REGULAR and name.endswith("/")):
                size = 0
            elif kind in REGULAR:
                if size > self._end - data:
                    raise self._truncated()
                yield Member(name, data, size)
            elif kind not in NO_MEMBER:
                raise UserError(f"{self.what}: member {name} is {REFUSED.get(kind, f'of type {kind!r}: leave it out')}")
            position = data + _padded(size)

    def _parse(self, header: bytes, position: int) -> tuple[bytes, str, int]:
        """Parses a header block and checks its checksum; returns (type, name, size)."""
        try:
            checksum = int(header[148:156].strip(b" \0"), 8)
            # The checksum's own field counts as eight spaces.
            if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                raise ValueError("wrong checksum")
            # GNU tar writes sizes from 8 GiB on as a big-endian number after a set bit.
            size = int.from_bytes(header[125:136]) if header[124] == 0x80 else int(header[124:136].strip(b" \0") or b"0", 8)
            if size < 0:
                raise ValueError(f"size {size}")
        except ValueError as error:
            raise self._damaged(position, f"no header ({error})") from None
        name = header[:100].rstrip(b"\0").split(b"\0")[0]
        if header[257:263] == b"ustar\0":  # GNU's own magic ends differently, and it has times in place of ustar's prefix
            prefix = header[345:500].split(b"\0")[0]
            name = prefix + b"/" + name if prefix else name
        return header[156:157], _text(name), size

    def _pax(self, body: bytes, position: int) -> dict[str, str]:
        """Parses the "length key=value\\n" records of a PAX header; returns path, size, and "GNU.sparse" for any such key."""
        attributes, at = {}, 0
        while at < len(body) and body[at]:
            digits = body[at : body.find(b" ", at)]
            length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
            key, equals, value = body[at + len(digits) + 1 : at + length - 1].partition(b"=")
            if length < 1 or at + length > len(body) or not equals:
                raise self._damaged(position, "an unreadable PAX header")
            if key in (b"path", b"size"):
                attributes[key.decode()] = _text(value)
            elif key.startswith(b"GNU.sparse"):
                attributes["GNU.sparse"] = ""
            at += length
        stated = attributes.get("size", "0")
        if not (stated.isascii() and stated.isdigit() and len(stated) < 20):
            raise self._damaged(position, f"a PAX header with size {stated!r:.40}")
        return attributes

    def _damaged(self, position: int, problem: str) -> UserError:
        begin = os.pread(self._fd, 8, self._start)
        for magic, name in COMPRESSED.items():
            if begin.startswith(magic):
                return UserError(f"{self.what} is compressed ({name}), so it has no random access: unpack it to a .tar first")
        where = f"at byte {position - self._start:,} there is {problem}"
        return UserError(f"{self.what} is {'damaged' if position > self._start else 'not a tar'}: {where}; copy or pack it again")

    def _check_end(self, position: int) -> None:
        for at in range(position, self._end, 1 << 20):
            if any(os.pread(self._fd, min(1 << 20, self._end - at), at)):
                raise UserError(
                    f"{self.what} continues after the end mark at byte {position - self._start:,}; it probably consists of "
                    "several concatenated tars. Unpack it (tar --ignore-zeros) and pack it as one"
                )


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
