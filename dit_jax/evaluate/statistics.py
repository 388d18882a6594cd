"""From images to what metrics need of their features: moments, class sums, and the features themselves where asked for.

Images are taken in chunks of 1,000 by their number, which fall to the processes in turn; a process works alone on its own
devices, and results are added up at the end. So a row's features never wait for another host, and sums are grouped by chunk,
whatever the batch size. The devices go from batch to batch and from chunk to chunk without a wait: the next batch is read by one
thread, and the sums of the chunk before are fetched by another. Features go into sums of float64 on the device that computed
them: sums in float32 leave noise of 1e-7 in directions that a few thousand images do not span, and the square root in the
Frechet distance makes 3e-4 of that.

N images, F features, K classes, S parts, D devices of this process, b rows of a batch.
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
from dit_jax.runtime.console import Progress

CHUNK_IMAGES = 1_000
ROWS, WHOLE = PartitionSpec("rows"), PartitionSpec()


class Wanted(NamedTuple):
    """moments: of which outputs, "features" and "spatial". features: keep them. classes: sums for the Inception Score."""

    moments: tuple[str, ...] = ("features",)
    features: bool = False
    classes: bool = False


class Extracted(NamedTuple):
    """Of N images: moments by output, class sums by partition, features float32 [N, F] or None, and the images' SHA-256.

    The SHA-256 is of the SHA-256s of the chunks' bytes, so that many processes can compute it.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    moments: dict[str, Moments]
    class_sums: dict[str, ClassSums]
    features: np.ndarray | None
    sha256: str


def default_batch_size() -> int:
    """Images at a time of this process: 128 for each of its accelerators, 64 in all on a CPU."""
    devices = jax.local_devices()
    return 64 if devices[0].platform == "cpu" else 128 * len(devices)


def output_shapes(extractor: Extractor, params, shape: tuple[int, ...]) -> dict[str, int]:
    """{name: width} of what an extractor gives for images of this shape; nothing is computed."""
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
    """Takes the features of all images, and of them what is wanted, whole on every process.

    Args:
        batch_size: images at a time of this process, over all its devices; `default_batch_size()` if None. Sums and features
            change by rounding alone, about 1e-7.
        snapshots: where work is kept, and gone on with after a kill, to the same bits; None keeps nothing.
        processes: (this process's number, their count); (0, 1) for one that works alone though it is one of several; None is
            all that there are. All must then see the same files.
        what: what progress calls them.
    Raises:
        UserError: an output that the extractor does not have; a batch size below 1; fewer than 2 images; features that are not
            finite; an image that cannot be read.
    """
    index, total = processes or (jax.process_index(), jax.process_count())
    widths = output_shapes(extractor, params, images.shape)
    needed = [*wanted.moments, *(["features"] if wanted.features else []), *(["probabilities"] if wanted.classes else [])]
    if missing := sorted(set(needed) - widths.keys()):
        raise UserError(f"the extractor {extractor.name} gives no {missing[0]} (it gives {', '.join(widths)})")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    parts = {name: partition(name, len(images)) for name in PARTITIONS} if wanted.classes else {}
    worker = _Worker(
        extractor,
        params,
        wanted,
        {name: int(p.max()) + 1 for name, p in parts.items()},
        widths,
        batch_size or default_batch_size(),
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
    found = {name: moments_of_sums(len(images), *totals["moments"][name]) for name in wanted.moments}
    class_sums = {name: ClassSums(np.bincount(parts[name]).astype(np.float64), *totals["classes"][name]) for name in parts}
    kept = np.concatenate(features) if wanted.features else None
    return Extracted(len(images), found, class_sums, kept, hashlib.sha256(b"".join(digests)).hexdigest())


def _size(images: Images, chunk: int) -> int:
    return min(len(images), (chunk + 1) * CHUNK_IMAGES) - chunk * CHUNK_IMAGES


class _Worker:
    """The programs of one process: features of a batch on its devices, and their sums there."""

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
            found = extractor(params, images)
            return {name: found[name] for name in outputs}

        # shard_map, so that the program of a device does not depend on how many there are, and nothing is sent between them.
        self._features = jax.jit(jax.shard_map(features, mesh=mesh, in_specs=(WHOLE, ROWS), out_specs=ROWS))
        self._add = jax.jit(jax.shard_map(self._sums, mesh=mesh, in_specs=ROWS, out_specs=ROWS), donate_argnums=0)

    def zeros(self) -> dict:
        """The sums of no images, on the host."""

        def moments(width):
            return np.zeros(width), np.zeros((width, width))

        def classes(count):
            return np.zeros((count, self._widths["probabilities"])), np.zeros(count)

        return {
            "moments": {name: moments(self._widths[name]) for name in self.wanted.moments},
            "classes": {name: classes(count) for name, count in self._parts.items()},
        }

    def _sums(self, state, outputs, real, parts):
        """The state [1, ...] of one device with its rows added; real [b] is 0 for padding. Traced in float64."""
        found = {"moments": {}, "classes": {}}
        for name, (sums, products) in state["moments"].items():
            x = jnp.where(real[:, None] > 0, outputs[name].astype(jnp.float64), 0)
            found["moments"][name] = sums + x.sum(0), products + x.T @ x
        if state["classes"]:
            p = outputs["probabilities"].astype(jnp.float64)
            entropies = jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), 1)
        for name, (sums, negative_entropies) in state["classes"].items():
            member = jax.nn.one_hot(parts[name], sums.shape[1], dtype=jnp.float64) * real[:, None]
            found["classes"][name] = sums + member.T @ p, negative_entropies + member.T @ entropies
        return found

    def chunks(self, images: Images, numbers: Iterable[int], parts: dict[str, np.ndarray]) -> Iterator[tuple]:
        """(number, (sums on the host, SHA-256 of the images, features [n, F] if they are wanted)) of each chunk, in order."""
        running, fetched, before = None, deque(), None
        with ThreadPoolExecutor(1) as fetcher:
            for chunk, batch in _ahead(_read(images, numbers, self.batch_size)):
                if running is not chunk:
                    if running is not None:
                        fetched.append((running.number, fetcher.submit(self._fetch, images, running)))
                    running, chunk.state = chunk, self._new_state()
                outputs = self._take(chunk, batch, parts)
                if before is not None:  # at most two batches are on the devices
                    jax.block_until_ready(before)
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
        """Hands the chunk's next batch to the devices; returns its outputs, which may not be ready."""
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
        """What is known of a chunk whose last batch was handed over, once it is; runs in a thread."""
        with jax.enable_x64(True):
            sums = jax.tree.map(lambda x: np.asarray(x).sum(0), chunk.state)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(sums)):
            raise UserError(
                f"features of the images {chunk.number * CHUNK_IMAGES} to {chunk.taken - 1} of {images.name} hold "
                "NaN or infinity: the extractor's weights are broken"
            )
        kept = np.concatenate([np.asarray(x)[:count] for x, count in chunk.features]) if self.wanted.features else None
        return sums, chunk.digest.digest(), kept

    def _put(self, x: np.ndarray) -> jax.Array:
        """[n, ...] padded with zeros to the one size that programs are compiled for, split over the devices."""
        return jax.device_put(np.pad(x, [(0, self.padded - len(x))] + [(0, 0)] * (x.ndim - 1)), self._rows)


@dataclass(eq=False)
class _Chunk:
    """A chunk of images at work.

    Fields:
        taken: number of the first image that was not handed to the devices.
        digest: SHA-256 of the images that were read.
        state: sums on the devices.
        features: (outputs of a batch, rows that are not padding), where features are wanted.
    """

    number: int
    taken: int
    digest: Any = field(default_factory=hashlib.sha256)
    state: Any = None
    features: list[tuple[jax.Array, int]] = field(default_factory=list)


def _read(images: Images, numbers: Iterable[int], batch_size: int) -> Iterator[tuple[_Chunk, np.ndarray]]:
    """The batches of chunks, each with its chunk, whose digest counts them."""
    for number in numbers:
        start = number * CHUNK_IMAGES
        chunk = _Chunk(number, start)
        for batch in images.batches(start, start + _size(images, number), batch_size):
            chunk.digest.update(np.ascontiguousarray(batch))
            yield chunk, batch


def _ahead(items: Iterator) -> Iterator:
    """The items, the next one made by a thread while one is at work."""
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = reader.submit(next, items, None)
            yield item


def _all_processes(x: np.ndarray) -> np.ndarray:
    """[P, ...]: an array of each process, bit for bit; without 64-bit types JAX would round float64."""
    from jax.experimental import multihost_utils

    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
    return np.asarray(multihost_utils.process_allgather(flat)).view(x.dtype).reshape(-1, *x.shape)


def _in_turn(images: Images, digests: list[bytes], features: list, width: int | None, total: int) -> tuple[list[bytes], list]:
    """Digests and features of all chunks in order, from those that each process holds."""
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
