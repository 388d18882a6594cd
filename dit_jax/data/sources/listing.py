"""Lists the files of a folder that is a data set: examples and their captions, in class folders or in one."""

import collections
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dit_jax.data.sources.source import is_strange
from dit_jax.errors import UserError
from dit_jax.runtime.console import say

CAPTION_SUFFIX, LONG_SUFFIX = ".txt", ".long.txt"
SLICE = re.compile(r"(?P<folder>[^\[\]]*)\[(?P<start>\d+%?|):(?P<stop>\d+%?|)\]")
HEADER_THREADS = 16


def parse_split(split: str) -> tuple[str, tuple[str, str] | None]:
    """ "train[:90%]" -> ("train", ("", "90%")); a split without a slice has None for it.

    Raises:
        UserError: the brackets hold no slice.
    """
    if not split.endswith("]"):
        return split, None
    found = SLICE.fullmatch(split)
    if found is None:
        raise UserError(f"data.split is {split!r}; write a slice as in train[:90%], [:300] or [300:400]")
    return found["folder"], (found["start"], found["stop"])


def of_slice(names: Sequence[str], part: tuple[str, str], what: str, noun: str) -> list[int]:
    """Sorted indices of the names that lie in the slice of their order by SHA-256.

    Raises:
        UserError: the slice is empty, or goes beyond the end.
    """
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode("utf-8", "surrogateescape")).digest())
    bounds = [
        given if not text else int(text[:-1]) * len(names) // 100 if text.endswith("%") else int(text)
        for text, given in zip(part, (0, len(names)), strict=True)
    ]
    if not 0 <= bounds[0] < bounds[1] <= len(names):
        raise UserError(
            f"the slice [{part[0]}:{part[1]}] of {what}, which has {len(names):,} {noun}, is that from {bounds[0]} to "
            f"{bounds[1]}; it must hold at least one {noun.removesuffix('s')} and end at {len(names)} or before"
        )
    return sorted(order[slice(*bounds)])


def caption_file(image_file: str, suffix: str) -> str:
    """The file with the caption of an image or clip."""
    return image_file.rpartition(".")[0] + suffix


def files_below(
    root: Path, folder: str, suffixes: tuple[str, ...], others: collections.Counter[str], seen: dict[tuple[int, int], str]
) -> Iterator[tuple[str, int]]:
    """Yields (path relative to root, size in bytes) of every example and text under root/folder, following links.

    Args:
        suffixes: of the files that are examples, lower case.
        others: counts what is left out, by its kind.
        seen: {(device, inode): path} of the folders before this one.

    Raises:
        UserError: two paths lead to one folder.
    """
    status = os.stat(root / folder)
    before = seen.setdefault((status.st_dev, status.st_ino), folder)
    if before != folder:
        raise UserError(
            f"{root / before} and {root / folder} are the same folder, so its files would count twice: remove the link"
        )
    with os.scandir(root / folder) as entries:
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if is_strange(entry.name):
                others["hidden, or of a system (@eaDir, __MACOSX, ...)"] += 1
            elif is_dir(entry):
                yield from files_below(root, relative, suffixes, others, seen)
            elif entry.name.lower().endswith(suffixes) or entry.name.endswith(CAPTION_SUFFIX):
                yield relative, _size(entry)
            else:
                others[os.path.splitext(entry.name)[1].lower()[:20] or "no suffix"] += 1


def is_dir(entry: os.DirEntry) -> bool:
    """Whether it is a folder; False for a link that leads nowhere or to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def say_what_is_left_out(path: Path, others: collections.Counter[str], noun: str) -> None:
    """Says how many files of which kinds are no part of the data set."""
    if others:
        kinds = [f"{count:,} x {kind}" for kind, count in others.most_common(5)]
        more = ", ..." if len(others) > 5 else ""
        say(f"{path}: {others.total():,} files or folders are no {noun} and not part of the data set ({', '.join(kinds)}{more})")


def say_numbering(path: Path, names: tuple[str, ...]) -> None:
    """Says so if the classes are numbers in another order than that of the numbers."""
    if not all(name.isascii() and name.isdigit() for name in names) or list(names) == sorted(names, key=lambda n: (len(n), n)):
        return
    first = next(label for label, name in enumerate(names) if int(name[:18]) != label)
    say(
        f"{path}: class folders are numbered in the order of text, so that label {first} is the folder {names[first]}; "
        "pad the names with zeros for the order of numbers"
    )


def _size(entry: os.DirEntry) -> int:
    """Size in bytes; -1 for a broken link, which becomes a bad record on reading."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def sizes_of(count: int, measure: Callable[[int], tuple[float, float, float, float]]) -> np.ndarray:
    """float64 [N, 4]: (frames, height, width, frames per second) of every example; zeros where it cannot be read.

    Such an example is in every bucket, so that it is reported as a bad record when it is drawn.
    """

    def one(index: int) -> tuple[float, float, float, float]:
        try:
            return measure(index)
        except UserError:
            return 0, 0, 0, 0

    say(f"reading the sizes of {count:,} examples")
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return np.array(list(pool.map(one, range(count))), np.float64).reshape(count, 4)
