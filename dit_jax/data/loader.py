"""Batches of a source: an endless shuffled stream for training, or one pass in order.

Letters: B is the global batch size, P the number of processes (hosts), b = B / P the rows per host.
"""

import contextlib
import functools
import math
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from dit_jax.data.buckets import Cycle
from dit_jax.data.heartbeats import Heartbeats, Monitor, worker_start
from dit_jax.data.retries import RETRY_SECONDS, Retries, check_retry_seconds, given_up, unavailable
from dit_jax.data.sources.source import Example, Source
from dit_jax.errors import TemporaryFailure, Unavailable, UserError

Batch = dict[str, Any]  # arrays, and those of TEXTS as lists of str or None
TEXTS = ("caption", "caption_long")  # entries of an example
BadRecord = tuple[int, str]  # number in the source, reason

REPLACEMENT_TRIES = 16
SMALL = 300  # records of a data set that is read once before training: seconds for photographs


class _ReadAndTransform(grain.transforms.RandomMap):
    """Maps a place among the records to (example, bad records); an unreadable record is replaced by the next readable one.

    The replacement uses the random numbers of the original record, so that the example is a function of the position in the
    stream. While the storage is away, reads are repeated; a record that stays away although one of the next can be read is bad.

    records: numbers in the source of those that are read, int [n]; None for all.
    """

    def __init__(self, source: Source, records: np.ndarray | None, transform: grain.transforms.RandomMap, retries: Retries):
        self._source, self._records, self._transform, self._retries = source, records, transform, retries
        self._lost: set[int] = set()  # for these no time is spent in later epochs

    def _number(self, place: int) -> int:
        """The number in the source of a place among the records that are read."""
        return place if self._records is None else int(self._records[place])

    def random_map(self, element: int, rng: np.random.Generator) -> tuple[Batch, list[BadRecord]]:
        start = rng.bit_generator.state
        example, bad, away = self._first_readable(int(element), rng)
        if new := [number for number in away if number not in self._lost]:
            try:
                read(self._source, new[0])
            except UserError:
                self._lost.update(new)
            else:  # the storage came back after this record was given up
                rng.bit_generator.state = start
                return self.random_map(element, rng)
        return example, bad

    def _first_readable(self, first: int, rng: np.random.Generator) -> tuple[Batch, list[BadRecord], list[int]]:
        """(example, bad records before it, those of them that the storage does not give)."""
        start, size = rng.bit_generator.state, len(self._source if self._records is None else self._records)
        bad: list[BadRecord] = []
        away: list[int] = []
        for number in (self._number((first + i) % size) for i in range(min(REPLACEMENT_TRIES, size))):
            try:
                if number not in self._lost and self._lost.issuperset(away):
                    again = functools.partial(read, self._source, number)
                    record = self._retries(again, functools.partial(self._can_read_after, number))
                else:  # time was spent on it, or on one before it
                    record = read(self._source, number)
                self._retries.heartbeats.read()
                return self._transform.random_map(record, rng), bad, away
            except UserError as error:
                bad.append((number, str(error)))
                rng.bit_generator.state = start
                if isinstance(error, Unavailable):
                    away.append(number)
                    last = error
        if len(away) == len(bad) and self._retries.heartbeats.has_read():
            raise given_up(last, self._retries.seconds)
        raise UserError(
            f"{len(bad)} consecutive records from number {self._number(first)} cannot be read: check the storage. {bad[0][1]}"
        )

    def _can_read_after(self, number: int) -> bool:
        try:
            read(self._source, (number + 1) % len(self._source))
        except UserError:
            return False
        return len(self._source) > 1


def read(source: Source, number: int) -> Example:
    """source[number], with Unavailable in place of an OSError of the system."""
    try:
        return source[number]
    except OSError as error:
        if error.errno is None:  # of a decoder, such as Pillow's
            raise
        raise unavailable(error, f"record {number}") from error


class Part(NamedTuple):
    """What the batches of one shape are read from and made with; see `Loader`.

    Fields:
        transform: as of `Loader`.
        batch_size: global.
        seed: in [0, 2**32).
        records: numbers in the source of the records that are read, int [n]; None for all.
    """

    transform: grain.transforms.RandomMap
    batch_size: int
    seed: int
    records: np.ndarray | None = None


Row = tuple[Batch, list[BadRecord]]


class _HostBlocks:
    """One host's blocks of the batches from a step on.

    A host reads consecutive blocks of a batch, so that the rows of all hosts, concatenated, are the batch that a single host
    would read.

    Args:
        streams: for each part an endless stream of rows.
        host_sizes: for each part the rows of a batch on this host.
    """

    def __init__(self, streams: list[grain.MapDataset], host_sizes: list[int], cycle: Cycle, start: int, index: int, count: int):
        # A thread processes a few rows at a time: single rows have 4 times the overhead on small images, and complete batches
        # per thread would fill the memory and delay the first batch.
        sizes = [math.gcd(rows, 8) for rows in host_sizes]
        self._streams = [
            stream.batch(size, drop_remainder=True, batch_fn=list) for stream, size in zip(streams, sizes, strict=True)
        ]
        self._counts = [rows // size for rows, size in zip(host_sizes, sizes, strict=True)]  # blocks of a batch on a host
        self.largest = max(self._counts)
        self._cycle, self._index, self._hosts = cycle, index, count
        self._ends = np.cumsum([self._counts[part] for part in cycle.order])
        self._first = self._blocks_before(start)
        steps = (len(x) // (n * count) // w for x, n, w in zip(self._streams, self._counts, cycle.weights, strict=True))
        self._length = min(steps) * int(self._ends[-1]) - self._first

    def _blocks_before(self, step: int) -> int:
        cycles, place = divmod(step, len(self._cycle))
        return cycles * int(self._ends[-1]) + (int(self._ends[place - 1]) if place else 0)

    def count(self, step: int) -> int:
        """Number of blocks of a step."""
        return self._counts[self._cycle.at(step)[0]]

    def of_step(self, step: int) -> list[list[Row]]:
        """The blocks of a step."""
        return [self._block(step, block) for block in range(self.count(step))]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> list[Row]:
        cycles, rest = divmod(self._first + int(i), int(self._ends[-1]))
        place = int(np.searchsorted(self._ends, rest, side="right"))
        step = cycles * len(self._cycle) + place
        return self._block(step, rest - (int(self._ends[place - 1]) if place else 0))

    def _block(self, step: int, block: int) -> list[Row]:
        part, ordinal = self._cycle.at(step)
        per_host = self._counts[part]
        return self._streams[part][(ordinal * self._hosts + self._index) * per_host + block]


class _HostBatches:
    """One host's batches from a step on, one after the other, for worker processes."""

    def __init__(self, blocks: _HostBlocks, start: int):
        self._blocks, self._start = blocks, start

    def __len__(self) -> int:
        return len(self._blocks) // self._blocks.largest

    def __getitem__(self, i: int) -> tuple[Batch, list[BadRecord]]:
        return _join(self._blocks.of_step(self._start + int(i)))


class _Joined:
    """An iterator over batches, of one over their blocks."""

    def __init__(self, iterator: Any, blocks: _HostBlocks, start: int):
        self._iterator, self._blocks, self._step = iterator, blocks, start

    def __next__(self) -> tuple[Batch, list[BadRecord]]:
        rows = [next(self._iterator) for _ in range(self._blocks.count(self._step))]
        self._step += 1
        return _join(rows)

    def close(self) -> None:
        self._iterator.close()


class Loader:
    """Shuffled training batches; the batch of a step is a function of (source, transform, batch_size, seed, step).

    The number of processes, workers and threads affects only the speed, and there is no loader state to save. Every
    example occurs once per epoch, and every epoch has another order; batches may span two epochs.

    An unreadable record i (the source or the transform raises UserError) is replaced by record i + 1 of the source, or
    i + 2, ... up to 16 tries; the first record follows the last. Each bad record is reported once on stderr and added to
    `Batches.bad_records`. The limit, see `tolerated_bad_records`, applies to the bad records that a host has met since it
    started: the first one beyond it ends the run.

    A record that the storage does not give (Unavailable, or OSError with an errno) is read again for retry_seconds before it
    counts as bad; a file that is missing while the next record can be read, for at most 10 s. If none of the 16 can be read then,
    the storage is away, and TemporaryFailure ends the run; UserError if no record has been read yet.

    Batches of several shapes, each from records of its own, take turns in a cycle (`buckets`). The seed of bucket k is drawn from
    (seed, k); each has epochs of its own, and an unreadable record is replaced by the next of its bucket.

    Args:
        source: the data set; pickled if there are workers.
        transform: random_map(example, rng) -> arrays of equal shapes; rng depends on (seed, position in the stream).
        batch_size: B, global; a multiple of process_count.
        parts: for each bucket its transform, batch size, seed and records, in place of `transform` and `batch_size`; None for
            batches of one shape.
        cycle: the order of the parts.
        seed: in [0, 2**32).
        num_workers: worker processes of this host; 0 reads in threads of this process, which is sufficient if most of the work
            is decoding (which releases the interpreter lock).
        num_threads: threads of this host that read and transform; divided among the workers, at least one each. With workers,
            every thread holds a complete batch.
        max_bad_share: tolerated share of bad records in the source, in [0, 1); 0 tolerates none, any other share at least one.
        retry_seconds: time for which a read is repeated while the storage is away; also the time after which a worker process
            that reads nothing is killed. 0 reads once and never kills.
        process_index, process_count: this host and P.

    Raises:
        UserError: the batch size is not divisible, the source is empty, the number of workers or seconds is negative, there is
            no thread, or the share is out of range.
        ValueError: seed or process_index out of range.
    """

    def __init__(
        self,
        source: Source,
        transform: grain.transforms.RandomMap,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        num_threads: int = 16,
        max_bad_share: float = 0.001,
        retry_seconds: float = RETRY_SECONDS,
        process_index: int = 0,
        process_count: int = 1,
        parts: Sequence[Part] | None = None,
        cycle: Cycle | None = None,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} must be in [0, process_count={process_count})")
        self.parts = list(parts) if parts is not None else [Part(transform, batch_size, seed)]
        self.cycle = cycle or Cycle([1] * len(self.parts))
        for size in (part.batch_size for part in self.parts):
            if size < 1 or size % process_count:
                raise UserError(f"batch_size={size} must be a positive multiple of the {process_count} processes")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} must be in [0, 2**32)")
        if num_workers < 0:
            raise UserError(f"num_workers={num_workers} must be 0 (threads only) or the number of worker processes")
        if num_threads < 1:
            raise UserError(f"num_threads={num_threads} must be at least 1")
        if not 0 <= max_bad_share < 1:
            raise UserError(f"max_bad_share={max_bad_share} must lie in [0, 1); 0 tolerates no unreadable record")
        check_retry_seconds(retry_seconds)
        if not len(source):
            raise UserError("the data set is empty: check its path and split")
        self.source, self.transform, self.batch_size, self.seed = source, transform, batch_size, seed
        self.num_workers, self.num_threads, self.max_bad_share = num_workers, num_threads, max_bad_share
        self.retry_seconds = retry_seconds
        self.process_index, self.process_count = process_index, process_count

    def check_small(self) -> None:
        """Reads every record of a data set of at most SMALL records once, so that too many bad ones are found before training.

        Raises:
            UserError: more records are bad than max_bad_share tolerates.
        """
        if len(self.source) > SMALL:
            return

        def problem(part: Part, number: int) -> list[BadRecord]:
            try:
                part.transform.random_map(read(self.source, int(number)), np.random.default_rng(self.seed))
            except UserError as error:
                return [(int(number), str(error))]
            return []

        numbers = range(len(self.source))
        wanted = [(part, number) for part in self.parts for number in (numbers if part.records is None else part.records)]
        with ThreadPoolExecutor(self.num_threads) as pool:
            bad = [record for found in pool.map(lambda pair: problem(*pair), wanted) for record in found]
        check_bad_records(dict(bad), len(self.source), self.max_bad_share)

    def batches(self, start_step: int = 0) -> "Batches":
        """An endless iterator over this host's batches from step start_step on; close it, or use it in a `with`.

        Each batch is {"image": uint8 [b, H, W, C], "label": int32 [b]}, or the stacked outputs of the transform.

        Raises:
            ValueError: start_step is negative.
            RuntimeError: workers are requested before absl flags were parsed; a worker process died (while iterating).
            TemporaryFailure: the storage is away, or a worker process hung (while iterating).
            UserError: more unreadable records than max_bad_share tolerates, or 16 consecutive ones (while iterating).
        """
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must be at least 0")
        heartbeats = Heartbeats(self.num_workers)
        retries = Retries(self.retry_seconds, heartbeats)
        host_sizes = [part.batch_size // self.process_count for part in self.parts]
        streams = [self._stream(part, retries) for part in self.parts]
        place = self.process_index, self.process_count
        blocks = _HostBlocks(streams, host_sizes, self.cycle, start_step, *place)
        if not self.num_workers:
            ahead = max(2 * blocks.largest, self.num_threads)
            options = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=ahead)
            iterator = iter(grain.MapDataset.source(blocks).to_iter_dataset(options))
            joined = _Joined(iterator, blocks, start_step)
            return Batches(joined, len(self.source), self.max_bad_share, heartbeats)
        if not flags.FLAGS.is_parsed():  # grain reads its own flags when it starts a worker
            raise RuntimeError(
                f"num_workers={self.num_workers} needs parsed absl flags: start with absl.app.run, or call "
                f"absl.flags.FLAGS.mark_as_parsed() in a notebook or test; or set num_workers to 0"
            )
        threads = math.ceil(self.num_threads / self.num_workers)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        # Batched before the distribution to workers, so that a batch does not depend on their number.
        batches = grain.MapDataset.source(_HostBatches(blocks, start_step))
        workers = grain.MultiprocessingOptions(num_workers=self.num_workers)
        dataset = batches.to_iter_dataset(options).mp_prefetch(workers, worker_start(heartbeats))
        return Batches(iter(dataset), len(self.source), self.max_bad_share, heartbeats, Monitor(heartbeats, self.retry_seconds))

    def _stream(self, part: Part, retries: Retries) -> grain.MapDataset:
        """The endless stream of rows of a part."""
        count = len(self.source if part.records is None else part.records)
        places = grain.MapDataset.range(count).seed(part.seed).shuffle().repeat()
        return places.random_map(_ReadAndTransform(self.source, part.records, part.transform, retries))


def tolerated_bad_records(num_records: int, max_bad_share: float) -> int:
    """The number of bad records that a share tolerates: floor(max_bad_share x num_records), at least 1 unless the share is 0.

    One bad file must not cost a small data set, of which it is a large share.
    """
    tolerated = math.floor(max_bad_share * num_records)
    tolerated += (tolerated + 1) / num_records <= max_bad_share  # 0.29 x 100 is less than 29
    return max(tolerated, 1) if max_bad_share else 0


def check_bad_records(bad: dict[int, str], num_records: int, max_bad_share: float) -> None:
    """Raises a UserError if more records are bad, {number: reason}, than the share tolerates."""
    count, tolerated = len(bad), tolerated_bad_records(num_records, max_bad_share)
    if count > tolerated:
        share, first = count / num_records, "; ".join(list(bad.values())[:3])
        more = next((limit for limit in (0.001, 0.01, 0.1) if share < limit), None)
        allow = f", or tolerate more of them with --config.loader.max_bad_share={more}" if more else ""
        raise UserError(
            f"{count} of the {num_records} records ({share:.2%}) cannot be read, but max_bad_share={max_bad_share:g} "
            f"tolerates {tolerated}: {first}. Restore them{allow}. Resuming a run needs the same data set; another set of "
            "files needs a new --workdir"
        )


class Batches:
    """Iterator over a host's batches; closing it stops its threads and processes.

    Args:
        iterator: over pairs (batch, bad records), with a method `close`.
        heartbeats: of the threads and workers that read.
        monitor: of the workers, if there are any; the iterator closes it.

    Fields:
        bad_records: maps the number of each unreadable record so far to the reason; they were replaced by other records.
    """

    def __init__(
        self,
        iterator: Any,
        num_records: int,
        max_bad_share: float,
        heartbeats: Heartbeats,
        monitor: Monitor | None = None,
    ):
        self._iterator = iterator
        self._num_records, self._max_bad_share = num_records, max_bad_share
        self._heartbeats, self._monitor, self._taken = heartbeats, monitor, 0
        self.bad_records: dict[int, str] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            if self._monitor is None:
                batch, bad = next(self._iterator)
            else:
                with self._monitor.waiting(self._taken % self._heartbeats.num_workers):  # they take turns
                    batch, bad = next(self._iterator)
            self._taken += 1
            # Copies: a worker's arrays occupy shared memory until the last reference is gone.
            batch = {key: np.array(value) if type(value) is not np.ndarray else value for key, value in batch.items()}
            self._count(bad)
        except Exception as error:
            lost = isinstance(error, RuntimeError) and "Worker process was terminated" in str(error)
            failure = self._lost_worker(error) if lost else None
            # First, because grain frees shared memory in a thread, which the end of the process would overtake.
            _clear_finished_frames(error)
            self.close()
            if failure is not None:
                raise failure from error
            raise
        return batch

    def _lost_worker(self, error: Exception) -> Exception:
        """The error to raise when grain reports that the worker whose turn it is has ended."""
        name = self._heartbeats.name(self._taken % self._heartbeats.num_workers)
        if self._monitor is not None and self._monitor.hung is not None:
            return TemporaryFailure(
                f"{name} read nothing for {self._monitor.seconds:g} s (loader.retry_seconds) and was ended: the storage does not "
                "answer, or the transform hangs"
            )
        return RuntimeError(
            f"data loading stopped: {name} has died. {error} The usual causes are lack of memory and a full /dev/shm: lower "
            f"num_workers or batch_size, or read with num_workers=0"
        )

    def on_wait(self, call: Callable[[], None]) -> None:
        """Has `call` called several times per second while reads wait for the storage, in any thread."""
        self._heartbeats.on_wait = call

    def stop_waiting(self) -> None:
        """Gives up on reads that wait for the storage: they end in TemporaryFailure. Safe in a signal handler."""
        self._heartbeats.stop()

    def status(self) -> str:
        """The worker that the next batch is waited for, with the time since it showed a sign of life; "" if there is none."""
        worker, seconds = self._monitor.silent() if self._monitor is not None else (-1, 0.0)
        return "" if worker < 0 else f"waiting for {self._heartbeats.name(worker)}, which read nothing for {seconds:.0f} s"

    def _count(self, bad: list[BadRecord]) -> None:
        """Reports new bad records.

        Raises:
            UserError: there are too many.
        """
        new = {number: reason for number, reason in bad if number not in self.bad_records}
        self.bad_records |= new
        check_bad_records(self.bad_records, self._num_records, self._max_bad_share)
        for number, reason in new.items():
            print(f"replacing bad record {number} by the next one: {reason}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends worker processes and threads; calling it again does nothing."""
        self._heartbeats.stop()  # threads that wait for the storage would keep the process
        if self._monitor is not None:
            self._monitor.close()
        self._iterator.close()
        self._heartbeats.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def read_in_order(
    source: Source,
    transform: Callable[[Example], Batch],
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    num_threads: int = 16,
    bad_records: list[tuple[int, str]] | None = None,
    retry_seconds: float = RETRY_SECONDS,
) -> Generator[Batch]:
    """Yields examples start..stop-1 once, in order, in batches (the last may be smaller), for statistics and encoding.

    Args:
        source: the data set.
        transform: example -> arrays; a call of an ImageTransform never mirrors.
        batch_size: rows per batch, at least 1; batches are not divided among hosts, so give each host its own range.
        start, stop: range of examples, 0 <= start <= stop <= len(source); None is the end.
        num_threads: threads that read and transform.
        bad_records: a list that collects (number, message) of each unreadable example, which is then skipped; without it the
            first one raises.
        retry_seconds: time for which a read is repeated while the storage is away. A record that stays away is bad if the one
            that was read first can still be read.

    Yields:
        The stacked outputs of the transform, plus "index": int64 [rows], the number of each example in the source, and
        "caption" and "caption_long": list of str or None [rows], in batches in which an example has one.

    Raises:
        UserError: an example cannot be read, and bad_records is None.
        TemporaryFailure: the storage is away.
        ValueError: batch size or range is out of bounds.
    """
    stop = len(source) if stop is None else stop
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 0 <= start <= stop <= len(source):
        raise ValueError(f"the range {start}..{stop} is not within the {len(source)} examples of the source")

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * batch_size, num_threads))
    reader = _ReadOrSayWhyNot(source, transform, retry_seconds)
    examples = grain.MapDataset.range(start, stop).map(reader).to_iter_dataset(options)
    return _batched(examples, batch_size, bad_records, reader.heartbeats)


class _ReadOrSayWhyNot:
    """Maps a record number to (number, the transformed example or the error that makes it unreadable, its texts by name).

    While the storage is away, reads are repeated. A record that stays away although the one that was read first can still be
    read is unreadable; if neither can be read, TemporaryFailure is raised.
    """

    def __init__(self, source: Source, transform: Callable[[Example], Batch], retry_seconds: float):
        self.heartbeats = Heartbeats()
        self._source, self._transform, self._retries = source, transform, Retries(retry_seconds, self.heartbeats)
        self._first: int | None = None  # a record that was readable

    def __call__(self, number: int) -> tuple[int, Batch | UserError, dict[str, str]]:
        try:
            example = self._retries(lambda: read(self._source, number), self._can_read_the_first)
            if self._first is None:
                self._first = number
            return number, self._transform(example), {name: str(x) for name, x in example.items() if name in TEXTS}
        except Unavailable as error:
            if self._first is not None and not self._can_read_the_first():
                raise given_up(error, self._retries.seconds) from error
            return number, error, {}
        except UserError as error:
            return number, error, {}

    def _can_read_the_first(self) -> bool:
        try:
            return self._first is not None and bool(read(self._source, self._first))
        except UserError:
            return False


def _batched(
    examples: grain.IterDataset, batch_size: int, bad_records: list[BadRecord] | None, heartbeats: Heartbeats
) -> Generator[Batch]:
    """Stacks what `_ReadOrSayWhyNot` gives; stops its threads at the end."""
    iterator = iter(examples)
    rows, texts = [], []
    try:
        for number, example, own in iterator:
            if not isinstance(example, UserError):
                rows.append(example | {"index": np.int64(number)})
                texts.append(own)
            elif bad_records is None:
                raise example
            else:
                bad_records.append((number, str(example)))
            if len(rows) == batch_size:
                yield _stack(rows) | _columns(texts)
                rows, texts = [], []
        if rows:
            yield _stack(rows) | _columns(texts)
    finally:
        heartbeats.stop()
        iterator.close()


def _clear_finished_frames(error: Exception) -> None:
    """Clears the local variables in the frames of an error, in which grain would otherwise keep a batch in shared memory.

    grain omits its own frames from the traceback, so they are reached through the frames that they called.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for caller, _ in traceback.walk_stack(frame):
            with contextlib.suppress(RuntimeError):  # it is still running
                caller.clear()


def _join(blocks: list[list[tuple[Batch, list[BadRecord]]]]) -> tuple[Batch, list[BadRecord]]:
    rows = [row for block in blocks for row in block]
    return _stack([example for example, _ in rows]), [record for _, bad in rows for record in bad]


def _stack(rows: list[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _columns(texts: list[dict[str, str]]) -> Batch:
    return {name: [own.get(name) for own in texts] for name in TEXTS if any(name in own for own in texts)}
