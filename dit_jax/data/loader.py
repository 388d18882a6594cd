"""Batches of a source: shuffled for ever for training, or once in order.

Letters: B is the global batch size, P the number of processes (hosts), b = B / P the rows of one host.
"""

import math
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags

from dit_jax.data.sources import Example, Source
from dit_jax.errors import UserError

Batch = dict[str, np.ndarray]


class _HostBlocks:
    """Block i of one host out of the endless stream of blocks of which `per_step` make one global batch.

    A host reads consecutive blocks, so that the rows of all hosts side by side are the batch that a single host reads.
    """

    def __init__(self, stream: grain.MapDataset, start_step: int, per_step: int, index: int, count: int):
        self._stream = stream
        self._per_step, self._per_host = per_step, per_step // count
        self._first = start_step * per_step + index * self._per_host

    def __len__(self) -> int:
        return (len(self._stream) - self._first) // self._per_step * self._per_host

    def __getitem__(self, i: int) -> list[Batch]:
        step, block = divmod(int(i), self._per_host)
        return self._stream[self._first + step * self._per_step + block]


class Loader:
    """Shuffled training batches; the batch of a step is a function of (source, transform, batch_size, seed, step).

    The number of processes, workers and threads changes the speed only: there is no loader state to save. Every
    example comes once per epoch, in another order in every epoch; batches run across the border of two epochs.

    Args:
        source: the data set; pickled when there are workers.
        transform: random_map(example, rng) -> arrays of equal shapes; rng depends on (seed, position in the stream).
        batch_size: B, global; a multiple of process_count.
        seed: in [0, 2**32).
        num_workers: worker processes of this host; 0 reads in threads of this process, which is enough while decoding
            (it releases the interpreter lock) is most of the work.
        num_threads: threads of this host that read and transform; with workers they are shared out, at least one
            each, and every thread holds a whole batch.
        process_index, process_count: this host and P.

    Raises:
        UserError: a batch size that does not divide, an empty source, a negative number of workers, fewer than one thread.
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
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} must be in [0, process_count={process_count})")
        if batch_size < 1 or batch_size % process_count:
            raise UserError(f"batch_size={batch_size} must be a positive multiple of the {process_count} processes")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} must be in [0, 2**32)")
        if num_workers < 0:
            raise UserError(f"num_workers={num_workers} must be 0 (threads only) or the number of worker processes")
        if num_threads < 1:
            raise UserError(f"num_threads={num_threads} must be at least 1")
        if not len(source):
            raise UserError("the data set is empty: check its path and split")
        self.source, self.transform, self.batch_size, self.seed = source, transform, batch_size, seed
        self.num_workers, self.num_threads = num_workers, num_threads
        self.process_index, self.process_count = process_index, process_count

    def batches(self, start_step: int = 0) -> "Batches":
        """This host's batches of steps start_step, start_step + 1, ... without end; close it, or use it in a `with`.

        Each is {"image": uint8 [b, R, R, C], "label": int32 [b]}, or what the transform makes, stacked.

        Raises:
            ValueError: negative step.
            RuntimeError: workers asked for before absl flags were parsed; a worker process died (while iterating).
            UserError: an example that cannot be read (while iterating).
        """
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must be at least 0")
        stream = grain.MapDataset.source(self.source).seed(self.seed).shuffle().repeat().random_map(self.transform)
        host_batch_size = self.batch_size // self.process_count
        # A thread takes a few rows at a time: one by one costs 4 times the overhead on small images, whole batches
        # per thread would fill the memory and delay the first.
        block = math.gcd(host_batch_size, 8)
        blocks = grain.MapDataset.source(
            _HostBlocks(
                stream.batch(block, drop_remainder=True, batch_fn=list),
                start_step,
                self.batch_size // block,
                self.process_index,
                self.process_count,
            )
        )
        if not self.num_workers:
            ahead = max(2 * host_batch_size // block, self.num_threads)
            options = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=ahead)
            dataset = blocks.to_iter_dataset(options).batch(host_batch_size // block, drop_remainder=True, batch_fn=_join)
            return Batches(dataset)
        if not flags.FLAGS.is_parsed():  # grain reads its own flags on the way to a worker
            raise RuntimeError(
                f"num_workers={self.num_workers} needs parsed absl flags: start through absl.app.run, or call "
                f"absl.flags.FLAGS.mark_as_parsed() in a notebook or test; or set num_workers to 0"
            )
        threads = math.ceil(self.num_threads / self.num_workers)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        # Batched before the workers take turns, so that a batch does not depend on their number.
        batches = blocks.batch(host_batch_size // block, drop_remainder=True, batch_fn=_join)
        workers = grain.MultiprocessingOptions(num_workers=self.num_workers)
        return Batches(batches.to_iter_dataset(options).mp_prefetch(workers))


class Batches:
    """Iterator over the batches of a grain data set that stops its threads and processes when closed."""

    def __init__(self, dataset: grain.IterDataset):
        self._iterator = iter(dataset)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            self.close()
            if "Worker process was terminated" in str(error):
                raise RuntimeError(
                    f"data loading stopped: {error} Out of memory and a full /dev/shm are the usual causes: lower "
                    f"num_workers or batch_size, or read with num_workers=0"
                ) from error
            raise
        except Exception:
            self.close()
            raise
        # A worker's arrays live in shared memory until the last reference is gone; these are the caller's own.
        return {key: np.array(value) if type(value) is not np.ndarray else value for key, value in batch.items()}

    def close(self) -> None:
        """Ends worker processes and threads; calling it again does nothing."""
        self._iterator.close()

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
) -> Iterator[Batch]:
    """Examples start..stop-1 once, in order, as batches whose last may be shorter: for statistics and encoding.

    Args:
        source: the data set.
        transform: example -> arrays; a call of an ImageTransform never mirrors.
        batch_size: rows per batch, at least 1; nothing here is divided over hosts, give each its own range.
        start, stop: range of examples, 0 <= start <= stop <= len(source); None is the end.
        num_threads: threads that read and transform.
        bad_records: a list that takes (number, message) of each unreadable example, which is then left out; without
            it the first one raises.

    Yields:
        What the transform makes, stacked, plus "index": int64 [rows], the number of each example in the source.

    Raises:
        UserError: an example that cannot be read and no list to take it.
        ValueError: batch size or range out of bounds.
    """
    stop = len(source) if stop is None else stop
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 0 <= start <= stop <= len(source):
        raise ValueError(f"the range {start}..{stop} is not within the {len(source)} examples of the source")

    def read(index: int) -> tuple[int, Batch | UserError]:
        try:
            return index, transform(source[index])
        except UserError as error:
            return index, error

    def batches() -> Iterator[Batch]:
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * batch_size, num_threads))
        examples = iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options))
        rows = []
        try:
            for index, example in examples:
                if not isinstance(example, UserError):
                    rows.append(example | {"index": np.int64(index)})
                elif bad_records is None:
                    raise example
                else:
                    bad_records.append((index, str(example)))
                if len(rows) == batch_size:
                    yield _stack(rows)
                    rows = []
            if rows:
                yield _stack(rows)
        finally:
            examples.close()

    return batches()


def _join(blocks: list[list[Batch]]) -> Batch:
    return _stack([row for block in blocks for row in block])


def _stack(rows: list[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
