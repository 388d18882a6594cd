"""Samples images into shards, on any number of processes, and continues after an interruption.

Part p of P draws the shards p, p + P, .... A part is a process, or all processes that hold the same rows of a batch.
"""

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
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
from dit_jax.sample.clip_files import write_clips
from dit_jax.sample.generator import Generator, check_images, has_replicated_params, rows_of
from dit_jax.sample.grid import write_image_grid
from dit_jax.sample.shards import SHARD_IMAGES, Shards
from dit_jax.storage.atomic import check_writable, remove_leftovers
from dit_jax.storage.paths import local_path

GRID_IMAGES = 100


@dataclass(frozen=True)
class Drawn:
    """The result of `draw`.

    Fields:
        samples: the npz or folder.
        grid: a picture of the first 100 images.
        new_images: number of images that this call drew on this process.
        stopped: a signal ended sampling early; finished shards are kept.
    """

    samples: Path
    grid: Path
    new_images: int
    seconds: float
    stopped: bool


def made_with(generator: Generator) -> dict:
    """Versions, kind of device and all other settings that the last bits of an image depend on."""
    facts = {**versions("jax"), **arithmetic(), "rows_at_once": generator.chunk_size}
    if not has_replicated_params(generator.mesh):
        facts["mesh"] = dict(generator.mesh.shape)
    return facts


def folder_of(out: Path) -> Path:
    """The folder of the shards: --out itself, or x.shards for x.npz, which is removed when the npz is complete."""
    return out.with_suffix(".shards") if out.suffix == ".npz" else out


def check_out(out: str | os.PathLike) -> None:
    """Raises a UserError if samples cannot be written to `out`, before any sampling."""
    out = local_path(out)
    if out.suffix not in ("", ".npz") and not out.is_dir():
        raise UserError(f"{out} must end in .npz, or be a folder whose name has no dot")
    if out.suffix == ".npz" and out.is_dir():
        raise UserError(f"{out} is a folder; give a file name")
    if out.suffix != ".npz" and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder, or a name that ends in .npz")
    try:
        check_writable(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give another --out") from None


def draw(
    out: str | os.PathLike,
    generator: Generator,
    params: Any,
    constants: Mapping[str, Any],
    requests: Requests,
    num_images: int,
    made_by: dict,
    weak_params: Any = None,
    replace: bool = False,
    names: Sequence[str] = (),
    caption: str = "",
    given: Mapping[str, np.ndarray] | None = None,
    rows: Sequence[str] = (),
    texts: Mapping[str, Sequence[str]] | None = None,
) -> Drawn:
    """Draws image k for request k, k = 0, 1, ..., into an npz or a folder of shards; finished shards are not drawn again.

    All processes make the same call and see the same files. Called again after a kill, it continues.

    Args:
        generator: on the `drawing_mesh`, as are params, constants and weak_params.
        params, weak_params: of `weights.cast_for_inference`.
        requests: host arrays [num_images, ...], as `DiffusionTask.requests` returns them. The labels are stored with the
            images, as zeros if there are none.
        made_by: all other settings that the images depend on, including the weights' fingerprints; JSON values.
        replace: replaces samples that were drawn with other settings; False refuses them.
        names, caption: texts of the grid, which shows the first GRID_IMAGES images, see `write_image_grid`.
        given: host arrays of the generator's job, [num_images, ...], or [1, ...] for all images.
        rows: names of the grid's rows, each with as many images; the grid then shows all images, and `names` are not written.
        texts: as of `samples_file.Samples`; stored with the images.

    Raises:
        UserError: see `check_out`, `shards.claimed`; the npz exists and was drawn with other settings; a full disk; a request is
            out of range.
        NotFinite: an image is not finite; finished shards are kept.
    """
    out, requests = local_path(out), generator.task.requests(requests)
    if SHARD_IMAGES % generator.chunk_size:
        raise UserError(f"chunk_size is {generator.chunk_size}; it must divide {SHARD_IMAGES}, the images of a shard")
    start = time.monotonic()
    check_out(out)
    labels = requests.get("label", np.zeros(num_images, np.int32))
    settings = shards.settings_of(labels, generator.image_shape, made_by, made_with(generator), requests, texts)
    wanted = Shards(folder_of(out), settings, labels, texts)
    grid = out.with_suffix(".png") if out.suffix == ".npz" else out / shards.GRID
    of_grid = (names[:GRID_IMAGES], caption, rows)
    done = out.suffix == ".npz" and hosts.is_first() and _is_done(out, wanted, replace)
    if hosts.greatest(int(done)):
        if hosts.is_first():
            shards.remove_finished(wanted.path)
            remove_leftovers(out.parent, out.name, grid.name)
        return Drawn(out, grid, 0, time.monotonic() - start, False)
    if not hosts.is_first():
        return _draw_folder(
            out, grid, of_grid, generator, (params, constants, weak_params, given or {}), requests, wanted.path, start
        )
    with shards.claimed(wanted, replace):
        remove_leftovers(out.parent, out.name, grid.name)
        return _draw_folder(
            out, grid, of_grid, generator, (params, constants, weak_params, given or {}), requests, wanted.path, start
        )


def _is_done(out: Path, wanted: Shards, replace: bool) -> bool:
    """Whether the npz exists and holds the wanted samples.

    Raises:
        UserError: it holds other samples, or something else.
    """
    if not out.exists():
        return False
    made_by = samples_file.made_by_of(out) or {}
    settings = shards.settings_in(made_by)
    if settings is None and not replace:
        raise UserError(f"{out} exists and does not say how its images were drawn; give another --out, or remove it")
    lines = shards.changes(settings, wanted.settings, same_versions=False) if settings else ["all"]
    if lines and not replace:
        raise UserError(
            f"{out} holds samples that were drawn with other settings; give another --out, or remove it. Differences:\n  "
            + "\n  ".join(lines)
        )
    if lines or not samples_file.is_sound(out, made_by):
        say(f"{out} {'holds samples that were drawn with other settings' if lines else 'is damaged'}: drawing again")
        return False
    say(f"{out} exists and its hash matches: nothing to draw")
    return True


def _draw_folder(out, grid, of_grid, generator, arrays, requests, path, start) -> Drawn:
    hosts.wait_for_all("the folder of samples is claimed")
    samples = shards.opened(path)
    if samples is None:
        raise UserError(f"{path} is not visible to every process; give all of them the same --out on a shared file system")
    share = generator.share
    mine = range(share.part, samples.total, share.parts)
    missing = samples.missing(mine)
    hosts.wait_for_all("the shards are checked")  # before a process writes a shard that another still reads
    if len(missing) < len(mine):
        whose = "of this process " if share.parts > 1 else ""
        say(f"{path}: {len(mine) - len(missing)} of {len(mine)} shards {whose}are intact")
    with StopSignal() as stop, ShardWriter(samples, missing, share.is_writer) as writer:
        stopped = _draw_shards(generator, arrays, requests, writer, stop)
    hosts.wait_for_all("every shard of the samples is written")
    if not stopped and hosts.is_first():
        _finish(out, grid, of_grid, samples)
    return Drawn(out, grid, writer.done, time.monotonic() - start, stopped)


def _draw_shards(generator: Generator, arrays, requests: Requests, writer: "ShardWriter", stop: StopSignal) -> bool:
    """Draws the shards that the writer needs; returns whether a signal ended it early.

    All processes make the same number of calls, in which they may communicate, and stop after the same call.
    """
    params, constants, weak_params, given = arrays
    parts, size = generator.share.parts, generator.share.rows
    indices = writer.indices(generator.chunk_size)
    calls = hosts.greatest(-(-len(indices) // size))
    if calls:
        say("compiling the sampler")
    indices = np.append(indices, np.zeros(calls * size - len(indices), np.int32))
    all_requests, images_of = requests, np.minimum(indices, len(writer.shards) - 1)
    requests = {name: x[images_of] for name, x in requests.items()}
    progress = Progress("sampling" if parts == 1 else f"sampling, part 1 of {parts}", writer.waiting)
    waiting: deque[tuple[np.ndarray, tuple[jax.Array, jax.Array]]] = deque()
    stopped = False

    def take(drawn):
        of_call, (images, finite) = drawn
        check_images(local_rows(finite), of_call, all_requests)
        before = writer.done
        writer.add(local_rows(images))
        if writer.done > before:  # this process may have fewer images to draw than others
            progress.update(writer.done)

    for call in range(calls):
        rows = slice(call * size, (call + 1) * size)
        batch = (indices[rows], {name: x[rows] for name, x in requests.items()}, rows_of(given, images_of[rows]))
        call_indices, call_requests, call_given = shard_batch(generator.mesh, batch)
        started = generator.start(params, constants, call_indices, call_requests, weak_params, call_given)
        waiting.append((indices[rows], started))
        jax.copy_to_host_async(waiting[-1][1])
        if len(waiting) == generator.calls_in_flight:
            take(waiting.popleft())
        stopped = stop.requested(call + 1) and call + 1 < calls
        if stopped:
            break
    for drawn in waiting:
        take(drawn)
    return stopped


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a global array that this process holds, in order, each once."""
    rows = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


class ShardWriter:
    """Takes images in the order of `indices` and writes each full shard in the background.

    A context manager; its exit waits for the shard that is being written, and discards an unfinished one.

    Fields:
        waiting: number of images to draw.
        done: number of images taken.
    """

    def __init__(self, samples: Shards, missing: list[int], writes: bool):
        self.shards, self.writes = samples, writes
        self.waiting, self.done = sum(map(samples.count, missing)), 0
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
        """int32 indices of the images to draw; shards are padded to full chunks, so that places in chunks are fixed."""
        self._rows = {k: -(-self.shards.count(k) // chunk_size) * chunk_size for k in self._missing}
        return np.concatenate(
            [np.arange(k * SHARD_IMAGES, k * SHARD_IMAGES + rows, dtype=np.int32) for k, rows in self._rows.items()]
            or [np.zeros(0, np.int32)]
        )

    def add(self, images: np.ndarray) -> None:
        """Takes the next images, uint8 [n, H, W, C]; those after the last needed image are ignored."""
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
        """Waits for the last shard: a full disk is reported at once, and at most two shards are in memory."""
        if self._writing is not None:
            self._writing.result()


def _finish(out: Path, grid: Path, of_grid: tuple[Sequence[str], str, Sequence[str]], samples: Shards):
    """Writes the npz, if one is wanted, and the grid, from a folder with all its shards."""
    samples = shards.read(samples.path)
    names, caption, rows = of_grid
    shown = len(samples) if rows else min(len(samples), GRID_IMAGES)
    first = next(samples.batches(0, shown, shown))
    is_clip = first.ndim == 5
    columns = len(first) // len(rows) if rows else 10 if len(first) >= 10 else None
    try:
        write_image_grid(grid, first, columns, names=() if rows else names, caption=caption, rows=rows)
        if is_clip:
            across = columns if rows else 10 if len(first) >= 10 else None
            write_clips(grid.with_suffix(".webp"), first, samples.made_by.get("fps"), across)
        if out.suffix == ".npz":  # last: a later start takes it for the sign that all is done
            blocks = (images for _, images, _ in samples.rows())
            shape = (len(samples), *samples.shape)
            samples_file.write_stream(out, shape, blocks, samples.labels, samples.made_by, samples.texts)
    except OSError as error:
        raise shards.unwritable(out, error) from None
    if out.suffix == ".npz":
        shards.remove(samples.path)
