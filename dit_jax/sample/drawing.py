"""Drawing many samples into shards, on any number of processes, and going on where an earlier start was ended.

Part p of P draws the shards p, p + P, ...: a part is a process, or the processes that hold the same rows of a batch.
"""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import shard_batch
from dit_jax.runtime.console import Progress, say
from dit_jax.runtime.signals import StopSignal
from dit_jax.runtime.versions import arithmetic, versions
from dit_jax.sample import samples_file, shards
from dit_jax.sample.generator import Generator, has_whole_params
from dit_jax.sample.grid import write_image_grid
from dit_jax.sample.shards import SHARD_IMAGES, Shards
from dit_jax.storage.atomic import check_writable


@dataclass(frozen=True)
class Drawn:
    """What `draw` has done.

    Fields:
        samples: the npz or folder.
        grid: a picture of the first 100.
        new_images: drawn by this process now, not earlier.
        stopped: a signal ended it early, with finished shards kept.
    """

    samples: Path
    grid: Path
    new_images: int
    seconds: float
    stopped: bool


def made_with(generator: Generator) -> dict:
    """Versions, kind of device and what else the last bits of an image depend on."""
    found = {**versions("jax"), **arithmetic(), "rows_at_once": generator.chunk_size}
    if not has_whole_params(generator.mesh):
        found["mesh"] = dict(generator.mesh.shape)
    return found


def folder_of(out: Path) -> Path:
    """Where the shards of --out lie: the folder itself, or x.shards beside x.npz, which goes when the npz is there."""
    return out.with_suffix(".shards") if out.suffix == ".npz" else out


def check_out(out: Path) -> None:
    """Raises a UserError if samples could not be written there: before hours of sampling, not after."""
    if out.suffix not in ("", ".npz") and not out.is_dir():
        raise UserError(f"{out} must end in .npz, or be a folder, whose name has no dot")
    if out.suffix == ".npz" and out.is_dir():
        raise UserError(f"{out} is a folder; give the name of a file")
    if out.suffix != ".npz" and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; a folder, or a name that ends in .npz, is needed")
    try:
        check_writable(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give another place") from None


def draw(
    out: Path,
    generator: Generator,
    params: Any,
    constants: Mapping[str, Any],
    requests: Requests,
    num_images: int,
    made_by: dict,
    weak_params: Any = None,
    replace: bool = False,
) -> Drawn:
    """Draws image k for request k, k = 0, 1, ..., into an npz or a folder of shards; finished shards are not drawn again.

    All processes call this alike, and see the same files. Killed at any time and called again, it continues.

    Args:
        generator: on the `drawing_mesh`, as are params, constants and weak_params.
        params, weak_params: of `weights.cast_for_inference`.
        requests: host arrays [num_images, ...], as `Conditioner.from_requests` returns them. The labels are stored with the
            images; zeros are where there are none.
        made_by: everything else that the images depend on, the weights' fingerprints too, JSON values.
        replace: samples that were drawn with other settings are replaced. False refuses them.

    Raises:
        UserError: see `check_out`, `shards.claimed`; the npz exists and was drawn with other settings; a full disk.
    """
    if SHARD_IMAGES % generator.chunk_size:
        raise UserError(f"chunk_size is {generator.chunk_size}; it must divide {SHARD_IMAGES}, the images of a shard")
    start = time.monotonic()
    check_out(out)
    labels = requests.get("label", np.zeros(num_images, np.int32))
    settings = shards.settings_of(labels, generator.image_shape, made_by, made_with(generator), requests)
    wanted = Shards(folder_of(out), settings, labels)
    grid = out.with_suffix(".png") if out.suffix == ".npz" else out / shards.GRID
    done = out.suffix == ".npz" and hosts.is_first() and _is_done(out, wanted, replace)
    if _greatest(int(done)):
        return Drawn(out, grid, 0, time.monotonic() - start, False)
    if not hosts.is_first():
        return _draw_folder(out, grid, generator, (params, constants, weak_params), requests, wanted.path, start)
    with shards.claimed(wanted, replace):
        return _draw_folder(out, grid, generator, (params, constants, weak_params), requests, wanted.path, start)


def _is_done(out: Path, wanted: Shards, replace: bool) -> bool:
    """Whether the npz is there and holds the wanted samples.

    Raises:
        UserError: it holds others, or something else.
    """
    if not out.exists():
        return False
    found = samples_file.made_by_of(out) or {}
    settings = shards.settings_in(found)
    if settings is None and not replace:
        raise UserError(f"{out} exists and does not say how its images were drawn; give another --out, or remove it")
    lines = shards.changes(settings, wanted.settings, same_versions=False) if settings else ["all"]
    if lines and not replace:
        raise UserError(
            f"{out} holds samples that were drawn otherwise; give another --out, or remove it. Different:\n  "
            + "\n  ".join(lines)
        )
    if lines or not samples_file.is_sound(out, found):
        say(f"{out} {'holds samples that were drawn otherwise' if lines else 'is damaged'}: drawn again")
        return False
    say(f"{out} is there, and its hash holds: nothing to draw")
    return True


def _draw_folder(out, grid, generator, arrays, requests, path, start) -> Drawn:
    hosts.wait_for_all("the folder of samples is claimed")
    found = shards.opened(path)
    if found is None:
        raise UserError(f"{path} is not seen by every process: all need the same --out, in a file system that they share")
    share = generator.share
    mine = range(share.part, found.total, share.parts)
    missing = found.missing(mine)
    hosts.wait_for_all("the shards are looked through")  # before one of a part writes what another still reads
    if len(missing) < len(mine):
        whose = "of this process " if share.parts > 1 else ""
        say(f"{path}: {len(mine) - len(missing)} of {len(mine)} shards {whose}are there and whole")
    with StopSignal() as stop, ShardWriter(found, missing, share.is_writer) as writer:
        stopped = _draw_shards(generator, arrays, requests, writer, stop)
    hosts.wait_for_all("every shard of the samples is written")
    if not stopped and hosts.is_first():
        _finish(out, grid, found)
    return Drawn(out, grid, writer.done, time.monotonic() - start, stopped)


def _greatest(number: int) -> int:
    """The greatest number of all processes."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def _draw_shards(generator: Generator, arrays, requests: Requests, writer: "ShardWriter", stop: StopSignal) -> bool:
    """Draws what the writer waits for; whether a signal ended it early.

    Every process makes as many calls, so that they may communicate in them, and stops after the same one.
    """
    params, constants, weak_params = arrays
    parts, size = generator.share.parts, generator.share.rows
    indices = writer.indices(generator.chunk_size)
    calls = _greatest(-(-len(indices) // size))
    indices = np.append(indices, np.zeros(calls * size - len(indices), np.int32))
    requests = {name: x[np.minimum(indices, len(writer.shards) - 1)] for name, x in requests.items()}
    progress = Progress("sampling" if parts == 1 else f"sampling, part 1 of {parts}", writer.waiting)
    waiting: deque[jax.Array] = deque()
    stopped = False

    def take(images):
        before = writer.done
        writer.add(local_rows(images))
        if writer.done > before:  # this process may have less to draw than others
            progress.update(writer.done)

    for call in range(calls):
        rows = slice(call * size, (call + 1) * size)
        batch = (indices[rows], {name: x[rows] for name, x in requests.items()})
        call_indices, call_requests = shard_batch(generator.mesh, batch)
        waiting.append(generator.start(params, constants, call_indices, call_requests, weak_params))
        waiting[-1].copy_to_host_async()
        if len(waiting) == generator.calls_in_flight:
            take(waiting.popleft())
        stopped = stop.requested(call + 1) and call + 1 < calls
        if stopped:
            break
    for images in waiting:
        take(images)
    return stopped


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a global array that this process holds, in order, each once."""
    found = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(found[start]) for start in sorted(found)])


class ShardWriter:
    """Takes images in the order of `indices` and writes each shard as soon as it is full, while others are drawn.

    A context manager that waits for what is being written; a shard that is not full then is lost.

    Fields:
        waiting: how many images are to be drawn.
        done: how many were taken.
    """

    def __init__(self, found: Shards, missing: list[int], writes: bool):
        self.shards, self.writes = found, writes
        self.waiting, self.done = sum(map(found.count, missing)), 0
        self._missing = deque(missing)
        self._images: list[np.ndarray] = []
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[Any] | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc_info):
        with self._pool:
            if kind is None:
                self._settle()

    def indices(self, chunk_size: int) -> np.ndarray:
        """int32 indices of the images to draw; each shard is filled up to whole chunks, so that those begin alike always."""
        self._rows = {k: -(-self.shards.count(k) // chunk_size) * chunk_size for k in self._missing}
        return np.concatenate(
            [np.arange(k * SHARD_IMAGES, k * SHARD_IMAGES + rows, dtype=np.int32) for k, rows in self._rows.items()]
            or [np.zeros(0, np.int32)]
        )

    def add(self, images: np.ndarray) -> None:
        """Takes the next images, uint8 [n, H, W, C]; those after the last that is waited for are left."""
        while len(images) and self._missing:
            shard, kept = self._missing[0], sum(map(len, self._images))
            count, taken = self.shards.count(shard), min(self._rows[shard] - kept, len(images))
            self._images.append(images[:taken])
            images = images[taken:]
            self.done += min(kept + taken, count) - min(kept, count)
            if kept + taken == self._rows[shard]:
                self._write(self._missing.popleft())

    def _write(self, shard: int):
        images = np.concatenate(self._images)[: self.shards.count(shard)]
        self._images = []
        self._settle()
        if self.writes:
            self._writing = self._pool.submit(self.shards.write, shard, images)

    def _settle(self):
        """Waits for the last shard, so that a full disk is told at once and two shards at most are in memory."""
        if self._writing is not None:
            self._writing.result()


def _finish(out: Path, grid: Path, found: Shards):
    """Makes the npz, if that is wanted, and the picture, of a folder whose shards are all there."""
    found = shards.read(found.path)
    first = next(found.batches(0, min(len(found), 100), 100))
    try:
        if out.suffix == ".npz":
            samples_file.write_stream(
                out, (len(found), *found.shape), (images for _, images, _ in found.rows()), found.labels, found.made_by
            )
        write_image_grid(grid, first, columns=10 if len(first) >= 10 else None)
    except OSError as error:
        raise shards.unwritable(out, error) from None
    if out.suffix == ".npz":
        shards.remove(found.path)
