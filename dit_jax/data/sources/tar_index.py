"""An index over tar files: where each sample's image and caption lie, and its label; built once and kept in a file.

Letters: N is the number of samples.
"""

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from dit_jax.data.sources.source import fingerprint
from dit_jax.errors import UserError
from dit_jax.storage.atomic import replacing

FORMAT = 1
SCAN_THREADS = 16  # for storage that answers slowly: the scan of local files is bound by the interpreter


class Row(NamedTuple):
    """One sample; label -1 is none; a caption of size -1 is none. Offsets and sizes in bytes of the file."""

    name: str
    tar: int
    offset: int
    size: int
    label: int = -1
    caption_offset: int = 0
    caption_size: int = -1
    caption_is_json: bool = False


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """Rows as columns, so that a million of them are a few arrays.

    Fields:
        tar: int32 [N], number of the file; offset, size: int64 [N], the image in it, in bytes.
        label: int64 [N], -1 where there is none.
        caption_offset, caption_size: int64 [N]; size -1 is no caption; caption_is_json: bool [N], the caption is a field.
        name_end: int64 [N]; names: uint8, the UTF-8 names one after another, sample i's ending at name_end[i].
    """

    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    caption_offset: np.ndarray
    caption_size: np.ndarray
    caption_is_json: np.ndarray
    name_end: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    def name(self, i: int) -> str:
        """Name of sample i, 0 <= i < N."""
        return self.names[self.name_end[i - 1] if i else 0 : self.name_end[i]].tobytes().decode()

    def sha256(self) -> str:
        """Hex digest of every column."""
        digest = hashlib.sha256()
        for column in _columns(self).values():
            digest.update(np.ascontiguousarray(column.astype(column.dtype.newbyteorder("<"), copy=False)).data)
        return digest.hexdigest()


def _columns(index: TarIndex) -> dict[str, np.ndarray]:
    return {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}


def of_rows(rows: Sequence[Row]) -> TarIndex:
    """The index of some rows, in their order."""
    columns = list(zip(*rows, strict=True)) or [()] * len(Row._fields)
    names = [name.encode() for name in columns[0]]
    kinds = (np.int32, np.int64, np.int64, np.int64, np.int64, np.int64, bool)
    arrays = [np.array(column, kind) for column, kind in zip(columns[1:], kinds, strict=True)]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return TarIndex(*[*arrays, ends, np.frombuffer(b"".join(names), np.uint8)])


def joined(parts: Sequence[TarIndex]) -> TarIndex:
    """One index after another."""
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _columns(parts[0])}
    before = np.cumsum([0] + [len(part.names) for part in parts[:-1]])
    columns["name_end"] = columns["name_end"] + np.repeat(before, [len(part) for part in parts])
    return TarIndex(**columns)


def _rows_of(job: Callable[[], list[Row]]) -> TarIndex:
    return of_rows(job())


def scanned(jobs: Iterable[Callable[[], list[Row]]]) -> TarIndex:
    """The rows of all jobs, in their order; the jobs run in threads, and the first error ends them."""
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        futures = [pool.submit(_rows_of, job) for job in jobs]
        try:
            parts = [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
    return joined(parts or [of_rows([])])


def cached(files: Sequence[Path], layout: str, build: Callable[[], TarIndex], cache: bool = True) -> TarIndex:
    """`build()`, or what it gave for these very files before.

    The index is kept as `dit_jax-index-<hash>.npz` in the folder of the first file; the hash covers the layout and every
    file's name, size and time of change, so that a changed tar is scanned anew. Where that folder cannot be written, a
    warning says so and the next start scans again; a damaged file is replaced.

    Args:
        files: the tars, which exist.
        layout: what the rows mean; part of the hash.
        build: scans the files.
        cache: false neither reads nor writes the file.
    """
    if not cache:
        return build()
    facts = [[file.name, status.st_size, status.st_mtime_ns] for file, status in ((file, file.stat()) for file in files)]
    kept = files[0].parent / f"dit_jax-index-{fingerprint(format=FORMAT, layout=layout, files=facts)}.npz"
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            return TarIndex(**arrays)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        logging.warning("the index %s is damaged (%s) and is built anew", kept, error)
    index = build()
    try:
        with replacing(kept) as partial, open(partial, "wb") as file:  # several hosts may write it at once, all the same
            np.savez(file, allow_pickle=False, **_columns(index))
    except OSError as error:
        logging.warning(
            "the index of %d tars cannot be kept in %s (%s): every start reads all their headers again",
            len(files),
            kept.parent,
            error.strerror,
        )
    return index


def reject(index: TarIndex, bad: np.ndarray, says: Callable[[int], str]) -> None:
    """Raises a UserError for the first sample that is marked in `bad`, bool [N]."""
    if bad.any():
        raise UserError(says(int(np.argmax(bad))))
