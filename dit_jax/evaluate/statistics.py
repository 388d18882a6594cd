"""Extracts features of images and accumulates what metrics need: moments, class sums, and optionally the features.

Images are processed in chunks of 1,000, assigned to the processes in turn. Each process works on its own devices, and the results
are added at the end. No process therefore waits for another host, and sums are grouped by chunk for any batch size. The devices
never wait between batches or chunks: one thread reads the next batch, another fetches the sums of the previous chunk. Features
are summed in float64 on the device that computed them. Sums in float32 would leave noise of 1e-7 in directions that a few
thousand images do not span, and the square root in the Frechet distance would amplify it to 3e-4.

N images, F features, K classes, S splits, D devices of this process, b rows of a batch.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dit_jax.errors import UserError
from dit_jax.evaluate.images import Images
from dit_jax.evaluate.snapshots import Snapshots
from dit_jax.metrics.features import Extractor
from dit_jax.metrics.frechet import Moments, moments_of_sums
from dit_jax.metrics.inception_score import PARTITIONS, ClassSums, partition
from dit_jax.runtime import phases
from dit_jax.runtime.console import Progress

CHUNK_IMAGES = 1_000
ROWS, WHOLE = PartitionSpec("rows"), PartitionSpec()


class Wanted(NamedTuple):
    """What to extract.

    Fields:
        moments: names of outputs, "features" or "spatial", whose moments to compute.
        features: whether to keep the features.
        classes: whether to compute class sums for the Inception Score.
    """

    moments: tuple[str, ...] = ("features",)
    features: bool = False
    classes: bool = False


class Extracted(NamedTuple):
    """Results for N images: moments by output, class sums by partition, features float32 [N, F] or None, the images' SHA-256.

    The latter is the SHA-256 of the SHA-256s of the chunks' bytes, so that several processes can compute it.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    moments: dict[str, Moments]
    class_sums: dict[str, ClassSums]
    features: np.ndarray | None
    sha256: str


def default_batch_size(extractor: Extractor | None = None) -> int:
    """Batch size of this process: 128 per accelerator, or 64 in total on a CPU; of clips, what their extractor asks for."""
    devices = jax.local_devices()
    if (at_once := getattr(extractor, "clips_at_once", None)) is not None:
        return at_once * len(devices)
    return 64 if devices[0].platform == "cpu" else 128 * len(devices)


def output_shapes(extractor: Extractor, params: Any, shape: tuple[int, ...]) -> dict[str, int]:
    """{name: width} of an extractor's outputs for images of this shape, without computing them."""
    image = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
    return {name: x.shape[1] for name, x in jax.eval_shape(extractor, params, image).items()}


def extract(
    images: Images,
    extractor: Extractor,
    params: Any,
    wanted: Wanted,
    *,
    batch_size: int | None = None,
    snapshots: Snapshots | None = None,
    processes: tuple[int, int] | None = None,
    what: str = "images",
) -> Extracted:
    """Extracts the features of all images; returns what is wanted, complete on every process.

    Args:
        batch_size: images per batch of this process, over all its devices; `default_batch_size()` if None. It changes sums and
            features only by rounding, about 1e-7.
        snapshots: an interrupted extraction resumes from them, with bitwise equal results; None writes none.
        processes: (index of this process, number of processes); (0, 1) for a process that works alone although it is one of
            several; None means all of the run's processes. Several processes must see the same files.
        what: name of the images in progress messages.
    Raises:
        UserError: the extractor lacks an output; the batch size is below 1; there are fewer than 2 images; features are not
            finite; an image cannot be read.
    """
    index, total = processes or (jax.process_index(), jax.process_count())
    widths = output_shapes(extractor, params, images.shape)
    needed = [*wanted.moments, *(["features"] if wanted.features else []), *(["probabilities"] if wanted.classes else [])]
    if missing := sorted(set(needed) - widths.keys()):
        raise UserError(f"the extractor {extractor.name} has no output {missing[0]} (it has {', '.join(widths)})")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    parts = {name: partition(name, len(images)) for name in PARTITIONS} if wanted.classes else {}
    worker = _Worker(
        extractor,
        params,
        wanted,
        {name: int(p.max()) + 1 for name, p in parts.items()},
        widths,
        batch_size or default_batch_size(extractor),
    )
    chunks = range(index, -(-len(images) // CHUNK_IMAGES), total)
    totals, digests, features = worker.zeros(), [], []
    if snapshots is not None:
        totals, digests, features = snapshots.read(totals)
    progress = Progress(f"features of {what}", sum(_size(images, k) for k in chunks))
    done = sum(_size(images, k) for k in chunks[: len(digests)])
    for k, (sums, digest, kept) in worker.chunks(images, chunks[len(digests) :], parts):
        totals = jax.tree.map(np.add, totals, sums)
        digests.append(digest)
        features.append(kept)
        done += _size(images, k)
        progress.update(done)
        if snapshots is not None:
            snapshots.write(totals, digests, features)
    if total > 1:
        totals = jax.tree.map(lambda x: _all_processes(x).sum(0), totals)
        digests, features = _in_turn(images, digests, features, widths["features"] if wanted.features else None, total)
    return _finished(images, wanted, parts, totals, digests, features)


def _finished(images: Images, wanted: Wanted, parts, totals, digests, features) -> Extracted:
    moments = {name: moments_of_sums(len(images), *totals["moments"][name]) for name in wanted.moments}
    class_sums = {name: ClassSums(np.bincount(parts[name]).astype(np.float64), *totals["classes"][name]) for name in parts}
    kept = np.concatenate(features) if wanted.features else None
    return Extracted(len(images), moments, class_sums, kept, hashlib.sha256(b"".join(digests)).hexdigest())


def _size(images: Images, chunk: int) -> int:
    return min(len(images), (chunk + 1) * CHUNK_IMAGES) - chunk * CHUNK_IMAGES


class _Worker:
    """The compiled programs of one process: features of a batch, and their sums, on its devices."""

    def __init__(
        self, extractor: Extractor, params, wanted: Wanted, parts: dict[str, int], widths: dict[str, int], batch_size: int
    ):
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
        self._rows, self._whole = NamedSharding(mesh, ROWS), NamedSharding(mesh, WHOLE)
        self.wanted, self.batch_size, self.padded = wanted, batch_size, -(-batch_size // len(devices)) * len(devices)
        self._parts, self._widths, self._devices = parts, widths, len(devices)
        self._params = jax.device_put(params, self._whole)
        outputs = {*wanted.moments, *(["features"] if wanted.features else []), *(["probabilities"] if wanted.classes else [])}

        def features(params, images):
            available = extractor(params, images)
            return {name: available[name] for name in outputs}

        # shard_map: the program of a device does not depend on the number of devices, and there is no communication.
        self._features = jax.jit(jax.shard_map(features, mesh=mesh, in_specs=(WHOLE, ROWS), out_specs=ROWS))
        self._add = jax.jit(jax.shard_map(self._sums, mesh=mesh, in_specs=ROWS, out_specs=ROWS), donate_argnums=0)

    def zeros(self) -> dict:
        """Zero sums, on the host."""

        def moments(width):
            return np.zeros(width), np.zeros((width, width))

        def classes(count):
            return np.zeros((count, self._widths["probabilities"])), np.zeros(count)

        return {
            "moments": {name: moments(self._widths[name]) for name in self.wanted.moments},
            "classes": {name: classes(count) for name, count in self._parts.items()},
        }

    def _sums(self, state, outputs, real, parts):
        """Adds a device's rows to its state [1, ...]; real [b] is 0 for padding. Traced in float64."""
        updated = {"moments": {}, "classes": {}}
        for name, (sums, products) in state["moments"].items():
            x = jnp.where(real[:, None] > 0, outputs[name].astype(jnp.float64), 0)
            updated["moments"][name] = sums + x.sum(0), products + x.T @ x
        if state["classes"]:
            p = outputs["probabilities"].astype(jnp.float64)
            entropies = jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), 1)
        for name, (sums, negative_entropies) in state["classes"].items():
            member = jax.nn.one_hot(parts[name], sums.shape[1], dtype=jnp.float64) * real[:, None]
            updated["classes"][name] = sums + member.T @ p, negative_entropies + member.T @ entropies
        return updated

    def chunks(self, images: Images, numbers: Iterable[int], parts: dict[str, np.ndarray]) -> Iterator[tuple]:
        """Yields (number, (sums on the host, SHA-256 of the images, features [n, F] or None)) of each chunk, in order."""
        running, fetched, before = None, deque(), None
        with ThreadPoolExecutor(1) as fetcher:
            for chunk, batch in _ahead(_read(images, numbers, self.batch_size)):
                if running is not chunk:
                    if running is not None:
                        fetched.append((running.number, fetcher.submit(self._fetch, images, running)))
                    running, chunk.state = chunk, self._new_state()
                outputs = self._take(chunk, batch, parts)
                if before is not None:  # keeps at most two batches on the devices
                    jax.block_until_ready(before)
                    phases.beat()
                before = outputs
                while fetched and (len(fetched) > 1 or fetched[0][1].done()):
                    number, future = fetched.popleft()
                    yield number, future.result()
            if running is not None:
                fetched.append((running.number, fetcher.submit(self._fetch, images, running)))
            for number, future in fetched:
                yield number, future.result()

    def _new_state(self):
        with jax.enable_x64(True):
            return jax.tree.map(lambda x: jax.device_put(np.zeros((self._devices, *x.shape)), self._rows), self.zeros())

    def _take(self, chunk: "_Chunk", batch: np.ndarray, parts: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Dispatches the chunk's next batch; returns its outputs, which may not be ready."""
        rows = np.arange(chunk.taken, chunk.taken + len(batch))
        outputs = self._features(self._params, self._put(batch))
        with jax.enable_x64(True):
            chunk.state = self._add(
                chunk.state,
                outputs,
                self._put(np.ones(len(batch))),
                {name: self._put(part[rows]) for name, part in parts.items()},
            )
        chunk.taken += len(batch)
        if self.wanted.features:
            chunk.features.append((outputs["features"], len(batch)))
        return outputs

    def _fetch(self, images: Images, chunk: "_Chunk") -> tuple[dict, bytes, np.ndarray | None]:
        """Fetches the results of a chunk whose last batch was dispatched; runs in a thread."""
        with jax.enable_x64(True):
            sums = jax.tree.map(lambda x: np.asarray(x).sum(0), chunk.state)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(sums)):
            bad = self._not_finite(images, chunk)
            raise UserError(
                f"features of {len(bad)} of the images {chunk.number * CHUNK_IMAGES} to {chunk.taken - 1} of {images.name} "
                f"contain NaN or infinity, the first are {', '.join(map(str, bad[:5]))}: the extractor's weights are broken"
            )
        kept = np.concatenate([np.asarray(x)[:count] for x, count in chunk.features]) if self.wanted.features else None
        return sums, chunk.digest.digest(), kept

    def _not_finite(self, images: Images, chunk: "_Chunk") -> list[int]:
        """The images of a chunk whose features are not finite; computes them again."""
        bad, start = [], chunk.number * CHUNK_IMAGES
        for batch in images.batches(start, chunk.taken, self.batch_size):
            outputs = self._features(self._params, self._put(batch))
            finite = np.all([np.isfinite(np.asarray(x)).reshape(len(x), -1).all(1) for x in jax.tree.leaves(outputs)], 0)
            bad += [start + int(k) for k in np.flatnonzero(~finite[: len(batch)])]
            start += len(batch)
        return bad

    def _put(self, x: np.ndarray) -> jax.Array:
        """Pads [n, ...] with zeros to the size that the programs are compiled for, and splits it over the devices."""
        return jax.device_put(np.pad(x, [(0, self.padded - len(x))] + [(0, 0)] * (x.ndim - 1)), self._rows)


@dataclass(eq=False)
class _Chunk:
    """A chunk of images in progress.

    Fields:
        taken: index of the first image that was not dispatched.
        digest: SHA-256 of the images read so far.
        state: sums on the devices.
        features: (outputs of a batch, number of rows that are not padding), if features are wanted.
    """

    number: int
    taken: int
    digest: Any = field(default_factory=hashlib.sha256)
    state: Any = None
    features: list[tuple[jax.Array, int]] = field(default_factory=list)


def _read(images: Images, numbers: Iterable[int], batch_size: int) -> Iterator[tuple[_Chunk, np.ndarray]]:
    """Yields (chunk, batch) for all batches of the chunks and updates the chunks' digests."""
    for number in numbers:
        start = number * CHUNK_IMAGES
        chunk = _Chunk(number, start)
        for batch in images.batches(start, start + _size(images, number), batch_size):
            chunk.digest.update(np.ascontiguousarray(batch))
            yield chunk, batch


def _ahead(items: Iterator) -> Iterator:
    """Yields the items; a thread computes the next item in advance."""
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = reader.submit(next, items, None)
            yield item


def _all_processes(x: np.ndarray) -> np.ndarray:
    """Gathers an array from each process, [P, ...], bit for bit; without 64-bit types JAX would round float64."""
    from jax.experimental import multihost_utils

    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
    return np.asarray(multihost_utils.process_allgather(flat)).view(x.dtype).reshape(-1, *x.shape)


def _in_turn(images: Images, digests: list[bytes], features: list, width: int | None, total: int) -> tuple[list[bytes], list]:
    """Gathers the digests and features of all chunks in order, from those of each process."""
    chunks = -(-len(images) // CHUNK_IMAGES)
    most = math.ceil(chunks / total)
    padded = np.frombuffer(b"".join(digests).ljust(32 * most, b"\0"), np.uint8)
    hashes = _all_processes(padded).reshape(total, most, 32)
    ordered = [hashes[k % total, k // total].tobytes() for k in range(chunks)]
    if width is None:
        return ordered, features
    rows = np.zeros((most * CHUNK_IMAGES, width), np.float32)
    if features:
        mine = np.concatenate(features)
        rows[: len(mine)] = mine
    parts = _all_processes(rows).reshape(total, most, CHUNK_IMAGES, width)
    return ordered, [parts[k % total, k // total, : _size(images, k)] for k in range(chunks)]
