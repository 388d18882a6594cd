"""An index of tar files: the positions of each sample's image and caption, and its label; built once and stored in a file.

Letters: N is the number of samples.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from dit_jax.data.sources.source import fingerprint
from dit_jax.errors import UserError
from dit_jax.storage.atomic import remove_leftovers, replacing
from dit_jax.storage.bounded import read_npz

FORMAT = 1
SCAN_THREADS = 16  # for slow storage; the scan of local files is limited by the interpreter


class Row(NamedTuple):
    """One sample; label -1 and caption size -1 mean none. Offsets and sizes are in bytes of the file."""

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
    """The rows, stored as columns, so that a million rows are a few arrays.

    Fields:
        tar: int32 [N], number of the file.
        offset, size: int64 [N], position of the image in the file, in bytes.
        label: int64 [N], -1 for none.
        caption_offset, caption_size: int64 [N]; size -1 for none.
        caption_is_json: bool [N], whether the caption is a field of a JSON file.
        name_end: int64 [N], end of sample i's name in `names`.
        names: uint8, the concatenated UTF-8 names.
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
        """Hex digest over all columns."""
        digest = hashlib.sha256()
        for column in _columns(self).values():
            digest.update(np.ascontiguousarray(column.astype(column.dtype.newbyteorder("<"), copy=False)).data)
        return digest.hexdigest()


def _columns(index: TarIndex) -> dict[str, np.ndarray]:
    return {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}


def of_rows(rows: Sequence[Row]) -> TarIndex:
    """Makes an index of rows, in their order."""
    columns = list(zip(*rows, strict=True)) or [()] * len(Row._fields)
    names = [name.encode() for name in columns[0]]
    kinds = (np.int32, np.int64, np.int64, np.int64, np.int64, np.int64, bool)
    arrays = [np.array(column, kind) for column, kind in zip(columns[1:], kinds, strict=True)]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return TarIndex(*[*arrays, ends, np.frombuffer(b"".join(names), np.uint8)])


def joined(parts: Sequence[TarIndex]) -> TarIndex:
    """Concatenates indices."""
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _columns(parts[0])}
    before = np.cumsum([0] + [len(part.names) for part in parts[:-1]])
    columns["name_end"] = columns["name_end"] + np.repeat(before, [len(part) for part in parts])
    return TarIndex(**columns)


def _rows_of(job: Callable[[], list[Row]]) -> TarIndex:
    return of_rows(job())


def scanned(jobs: Iterable[Callable[[], list[Row]]]) -> TarIndex:
    """Runs the jobs in threads and makes an index of all their rows, in order; the first error ends the jobs."""
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        futures = [pool.submit(_rows_of, job) for job in jobs]
        try:
            parts = [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
    return joined(parts or [of_rows([])])


def cached(files: Sequence[Path], layout: str, build: Callable[[], TarIndex], cache: bool = True) -> TarIndex:
    """Returns `build()`, or its stored result for the same files.

    The index is stored as `dit_jax-index-<hash>.npz` in the folder of the first file. The hash covers the layout and every
    file's name, size and modification time, so that a changed tar is scanned again. If the folder cannot be written, a warning
    is logged and the next start scans again. A damaged file is replaced.

    Args:
        files: existing tars.
        layout: meaning of the rows; part of the hash.
        build: scans the files.
        cache: whether to read and write the stored file.
    """
    if not cache:
        return build()
    facts = [[file.name, status.st_size, status.st_mtime_ns] for file, status in ((file, file.stat()) for file in files)]
    kept = files[0].parent / f"dit_jax-index-{fingerprint(format=FORMAT, layout=layout, files=facts)}.npz"
    try:
        return _stored(kept, [file.stat().st_size for file in files])
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logging.warning("the index %s is damaged (%s); building it again", kept, error)
    index = build()
    try:
        remove_leftovers(kept.parent, kept.name)
        with replacing(kept) as partial, open(partial, "wb") as file:  # several hosts may write it at once, all the same
            np.savez(file, allow_pickle=False, **_columns(index))
    except OSError as error:
        if kept.exists():  # of another host, which took our partial file for a leftover
            return index
        logging.warning(
            "the index of %d tars cannot be stored in %s (%s): every start reads all their headers again",
            len(files),
            kept.parent,
            error.strerror,
        )
    return index


def _stored(path: Path, sizes: list[int]) -> TarIndex:
    """Reads an index; every position must lie in one of the files, which have these sizes in bytes. Raises: ValueError."""
    arrays = read_npz(path, [field.name for field in dataclasses.fields(TarIndex)])
    found = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
    wanted = {name: (column.dtype, 1) for name, column in _columns(of_rows([])).items()}
    if found != wanted:
        raise ValueError(f"it has {found}")
    index = TarIndex(**arrays)
    ends, count = index.name_end, len(index)
    if {len(column) for name, column in _columns(index).items() if name != "names"} != {count}:
        raise ValueError("its columns have several lengths")
    if count == 0:
        return index
    if not 0 <= index.tar.min() <= index.tar.max() < len(sizes):
        raise ValueError("it names a file that is not there")
    if not -1 <= index.label.min() <= index.label.max() < 2**31:
        raise ValueError("it has impossible labels")
    ends_of_tar = np.asarray(sizes, np.int64)[index.tar]
    captions = index.caption_size >= 0
    for offset, size, end in (
        (index.offset, index.size, ends_of_tar),
        (index.caption_offset[captions], index.caption_size[captions], ends_of_tar[captions]),
    ):
        if (offset < 0).any() or (size < 0).any() or (size > end).any() or (offset > end - size).any():
            raise ValueError("it points outside of its files")
    if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(index.names):
        raise ValueError("its names do not end where they should")
    index.names.tobytes().decode()
    return index


def reject(index: TarIndex, bad: np.ndarray, says: Callable[[int], str]) -> None:
    """Raises UserError for the first sample marked in `bad`, bool [N]."""
    if bad.any():
        raise UserError(says(int(np.argmax(bad))))
