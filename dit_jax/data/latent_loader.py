"""Training batches from a latent cache; the batch of a step is a function of (seed, step), and a thread gathers in advance.

N records; B is the global batch size, P the number of processes (hosts), b = B / P the rows per host.
"""

import functools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.data.buckets import Cycle
from dit_jax.data.heartbeats import Heartbeats
from dit_jax.data.latents import LatentCache
from dit_jax.data.retries import RETRY_SECONDS, Retries, check_retry_seconds, given_up
from dit_jax.errors import Unavailable, UserError

Batch = dict[str, np.ndarray]

AHEAD = 3  # batches gathered in advance
# Independent random streams of one seed.
ORDER, FLIPS, CAPTIONS = 0, 1, 2


class LatentLoader:
    """Shuffled training batches of a cache, with the interface of `Loader`.

    Every record occurs once per epoch, and every epoch has another order; batches may span two epochs. The mirror image is chosen
    with probability 1/2, independently each time.

    Args:
        cache: contains the moments.
        batch_size: B, global; a multiple of process_count.
        seed: in [0, 2**32).
        flip: use the mirror image with probability 1/2.
        process_index, process_count: this host and P.
        resident: yield row numbers for indexing `resident_moments` on the device, instead of moments.
        retry_seconds: time for which a read is repeated while the storage is away; 0 reads once.
        entries: (example {"label", "name", "caption" if it has one}, rng) -> further entries of it; rng depends on (seed, step,
            row). None for none.

    Raises:
        UserError: the batch size is not divisible, the cache has no mirror images for flips, or the seconds are negative.
        ValueError: seed or process_index out of range.
    """

    def __init__(
        self,
        cache: LatentCache,
        batch_size: int,
        seed: int,
        flip: bool,
        process_index: int = 0,
        process_count: int = 1,
        resident: bool = False,
        retry_seconds: float = RETRY_SECONDS,
        entries: Callable[[Mapping[str, Any], np.random.Generator], Batch] | None = None,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} must be in [0, process_count={process_count})")
        if batch_size < 1 or batch_size % process_count:
            raise UserError(f"batch_size={batch_size} must be a positive multiple of the {process_count} processes")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} must be in [0, 2**32)")
        if flip and cache.views == 1:
            raise UserError(
                f"{cache.path} has no mirror images (it was encoded with --nomirror): set flip to False, or encode it "
                "again with --mirror"
            )
        if resident and cache.views * len(cache) >= 2**31:
            raise UserError(f"{cache.path} has {cache.views * len(cache)} rows, more than int32 can index: set resident to False")
        check_retry_seconds(retry_seconds)
        self.retry_seconds = retry_seconds
        self.source, self.batch_size, self.seed, self.flip = cache, batch_size, seed, flip
        self.process_index, self.process_count, self.resident = process_index, process_count, resident
        self.entries = entries
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def batches(self, start_step: int = 0) -> "LatentBatches":
        """An endless iterator over this host's batches from step start_step on; close it, or use it in a `with`.

        Each batch is {"moments": float16 [b, h, w, 2c], "label": int32 [b]}, or {"row": int32 [b], "label": int32 [b]} if the
        moments are resident.

        Raises:
            ValueError: start_step is negative.
            TemporaryFailure: the storage is away (while iterating).
        """
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must be at least 0")
        return LatentBatches(self.batch, start_step, self.retry_seconds)

    def batch(self, step: int) -> Batch:
        """This host's rows of a step's batch. Raises: Unavailable if the cache cannot be read."""
        records, rows = self.rows(step)
        batch = {"label": self.source.labels[records], **self._text(step, records)}
        if self.resident:
            return {"row": rows.astype(np.int32), **batch}
        return {"moments": self.source.gather(rows), **batch}

    def _text(self, step: int, records: np.ndarray) -> Batch:
        if self.entries is None:
            return {}
        entries, first = self.entries, self.process_index * len(records)
        return self.source.with_captions(records, lambda example, i: entries(example, self._random(CAPTIONS, step, first + i)))

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(records [b] in [0, N), rows [b] of the cache) of this host at a step, int64."""
        per_host = self.batch_size // self.process_count
        mine = slice(self.process_index * per_host, (self.process_index + 1) * per_host)
        epochs, places = np.divmod(step * self.batch_size + np.arange(mine.start, mine.stop), len(self.source))
        records = np.empty(per_host, np.int64)
        for epoch in np.unique(epochs):
            records[epochs == epoch] = self._order(int(epoch))[places[epochs == epoch]]
        mirror = self._random(FLIPS, step).random(self.batch_size)[mine] < 0.5 if self.flip else 0
        return records, self.source.views * records + mirror

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                kept = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
                self._orders = {**kept, epoch: self._random(ORDER, epoch).permutation(len(self.source))}
            return self._orders[epoch]

    def _random(self, stream: int, *number: int) -> np.random.Generator:
        # A spawn key keeps the streams independent: SeedSequence([a, b]) would give both the same numbers if epoch = step.
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(stream, *number))))


class LatentBuckets:
    """Batches of several shapes, each from a cache of its own, which take turns in a cycle; with the interface of `LatentLoader`.

    Args:
        loaders: for each bucket.
        cycle: the order of the buckets.
        source: the caches together.
    """

    def __init__(self, loaders: Sequence[LatentLoader], cycle: Cycle, source: Any):
        self.loaders, self.cycle, self.source = tuple(loaders), cycle, source

    def batches(self, start_step: int = 0) -> "LatentBatches":
        """As `LatentLoader.batches`."""
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must be at least 0")
        return LatentBatches(self.batch, start_step, self.loaders[0].retry_seconds)

    def batch(self, step: int) -> Batch:
        """As `LatentLoader.batch`."""
        bucket, ordinal = self.cycle.at(step)
        return self.loaders[bucket].batch(ordinal)


class LatentBatches:
    """Iterator over the batches of consecutive steps; a thread computes them in advance until the iterator is closed."""

    bad_records: Mapping[int, str] = MappingProxyType({})  # as in `loader.Batches`; the encoder has already skipped them

    def __init__(self, batch: Callable[[int], Batch], start_step: int, retry_seconds: float):
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._heartbeats = Heartbeats()
        self._retries = Retries(retry_seconds, self._heartbeats)
        self._thread = threading.Thread(target=self._work, args=(batch, start_step), name="latent batches", daemon=True)
        self._thread.start()

    def _work(self, batch: Callable[[int], Batch], step: int) -> None:
        try:
            while not self._closed.is_set():
                self._ready.put(self._retries(functools.partial(batch, step)))
                self._heartbeats.read()
                step += 1
        except Unavailable as error:
            self._ready.put(given_up(error, self._retries.seconds) if self._heartbeats.has_read() else error)
        except Exception as error:
            self._ready.put(error)

    def on_wait(self, call: Callable[[], None]) -> None:
        """As `loader.Batches.on_wait`."""
        self._heartbeats.on_wait = call

    def stop_waiting(self) -> None:
        """As `loader.Batches.stop_waiting`."""
        self._heartbeats.stop()

    def status(self) -> str:
        """As `loader.Batches.status`; there are no workers."""
        return ""

    def __iter__(self) -> "LatentBatches":
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise RuntimeError("this iterator is closed: get a new one from the loader")
        item = self._ready.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Ends the thread; calling it again does nothing."""
        self._closed.set()
        self._heartbeats.stop()
        while not self._ready.empty():  # makes room for the batch that the thread may be waiting to put
            self._ready.get_nowait()
        self._thread.join()

    def __enter__(self) -> "LatentBatches":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def resident_moments(cache: LatentCache, mesh: Mesh) -> jax.Array:
    """Loads all moments onto the devices: float16 [R, h, w, 2c], with rows split over the mesh axes data and fsdp.

    R is V * N rounded up to a multiple of the number of shards; rows past V * N are zeros, and no loader uses them. Every host
    reads only the rows of its devices.

    Raises:
        UserError: a device that reports its free memory has too little.
    """
    axes = ("data", "fsdp")
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = cache.views * len(cache)
    per_device = -(-rows // ways)
    shape = (per_device * ways, *cache.moments_shape)
    size = per_device * int(np.prod(cache.moments_shape)) * 2
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
        if "bytes_limit" in stats and size > free:
            raise UserError(
                f"{cache.path}: the moments take {size / 2**30:.1f} GiB on each of {ways} devices, but {device} has only "
                f"{free / 2**30:.1f} GiB free: use more devices on mesh.data or mesh.fsdp, or set loader.resident to "
                "False"
            )

    def part(index) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        block = np.zeros((stop - start, *cache.moments_shape), np.float16)
        if start < rows:
            stored = cache.slice(start, min(stop, rows))
            block[: len(stored)] = stored
        return block

    return jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec(axes)), part)
