"""Writes a latent cache; implements `python -m dit_jax.encode`.

`data.latents` reads the cache, `data.latent_files` names its files, and `cache_folder` handles the folder before the first shard
and after the last.

Shard k contains records [k * S, (k + 1) * S) of the source and starts with a new batch, which every device processes in chunks of
`chunk_size` images. XLA's rounding of a row depends on the batch size. With chunks, it depends only on the row's shard and the
chunk size: not on previous work, the batch size, or the number of devices and hosts.
"""

import contextlib
import functools
import json
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dit_jax.codecs.codec import moments_shape
from dit_jax.codecs.kl_vae import LOG_VARIANCE_RANGE, Autoencoder
from dit_jax.data.clip_transform import ClipTransform
from dit_jax.data.latent_files import FORMAT, MANIFEST, SUFFIXES, shard_file
from dit_jax.data.latents import codec_fields
from dit_jax.data.loader import read_in_order
from dit_jax.data.sources import Source
from dit_jax.data.sources.source import Example, fingerprint
from dit_jax.data.transforms import ImageTransform
from dit_jax.encode.cache_folder import check_bad, claimed, differences, finish, intact_shards
from dit_jax.errors import UserError
from dit_jax.interop.vae import weights_sha256
from dit_jax.pixels import to_float
from dit_jax.runtime.console import Progress, say
from dit_jax.runtime.versions import arithmetic, version, versions
from dit_jax.storage.atomic import npy, remove_leftovers
from dit_jax.storage.paths import local_path
from dit_jax.storage.sealed import digest, write_listed, write_sealed

SHARD_BYTES = 2**29
SHARD_MULTIPLE = 8  # records per shard are a multiple of this: complete chunks on every platform
STATISTICS_ROWS = 64  # rows per step of the statistics, so that their float64 copies stay small


def chunk_size() -> int:
    """Images per chunk: enough to fill an accelerator; 1 on a CPU.

    On a CPU, XLA's matrix library Eigen splits the sum of a convolution with few output channels over all threads of the process,
    of which there are at least as many as simulated devices. One image is too little work to be split.
    """
    return 1 if jax.default_backend() == "cpu" else 8


class Members:
    """Some examples of a data set, as a data set of their own.

    Args:
        numbers: of the examples, int [n].
    """

    def __init__(self, source: Source, numbers: np.ndarray):
        self.source, self.numbers = source, numbers
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.fingerprint = fingerprint(of=source.fingerprint, numbers=digest({"numbers": numbers.tolist()}))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.numbers[index])]


@dataclass(frozen=True)
class Job:
    """The data set to encode and all settings that determine the bytes of the cache.

    Fields:
        params: of the codec.
        size: (height, width) of the images in pixels.
        frames: encode the middle frames of each clip, that many; None for images. Moments are then [f, h, w, 2c].
        fps: frames per second of the clips; None for frames as they are stored.
        mirror: encode every image's mirror image too.
        upright: turn photographs as their EXIF orientation asks.
        device_batch_size: images per device and call, whole chunks of `images_at_once`; no byte depends on it.
        shard_records: S; None takes the most whose moments fit in SHARD_BYTES.

    Raises:
        UserError: a size that does not suit the codec; a number below 1; a batch that is no multiple of a chunk; an
            empty data set.
    """

    source: Source
    codec: Autoencoder
    params: Any
    size: tuple[int, int]
    mirror: bool = True
    upright: bool = False
    device_batch_size: int = 16
    shard_records: int | None = None
    frames: int | None = None
    fps: float | None = None

    def __post_init__(self):
        if self.frames is None and self.fps is not None:
            raise UserError(f"fps is {self.fps}, which is of clips, and images are encoded; give frames too")
        if self.frames is not None and self.upright:
            raise UserError("upright is of photographs, and clips are encoded; leave it out")
        self.codec.latent_shape(self.transform.shape)
        for name in ("device_batch_size", "shard_records"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.device_batch_size % chunk_size():
            raise UserError(
                f"device_batch_size is {self.device_batch_size}; on a {jax.default_backend()} it must be a multiple "
                f"of {chunk_size()}"
            )
        if not len(self.source):
            raise UserError("the data set is empty: check its path and split")

    @property
    def transform(self) -> ImageTransform | ClipTransform:
        if self.frames is not None:
            return ClipTransform(self.frames, self.size[0], self.codec.image_channels, flip=False, fps=self.fps, size=self.size)
        return ImageTransform(self.size[0], self.codec.image_channels, flip=False, upright=self.upright, size=self.size)

    @property
    def views(self) -> int:
        return 2 if self.mirror else 1

    @property
    def moments_shape(self) -> tuple[int, ...]:
        return moments_shape(self.codec, self.codec.latent_shape(self.transform.shape))

    @property
    def latent_channels(self) -> int:
        return self.codec.latent_shape(self.transform.shape)[-1]

    @property
    def records_per_shard(self) -> int:
        if self.shard_records is not None:
            return self.shard_records
        fitting = SHARD_BYTES // (2 * self.views * math.prod(self.moments_shape))
        return max(fitting - fitting % SHARD_MULTIPLE, SHARD_MULTIPLE)

    @property
    def num_shards(self) -> int:
        return -(-len(self.source) // self.records_per_shard)

    @functools.cached_property
    def settings(self) -> dict:
        """The content of `settings.json`. To resume, "encoding" must be equal; "made_with" too while shards are missing."""
        source, codec = self.source, self.codec
        return json.loads(
            json.dumps(
                {
                    "format": FORMAT,
                    "encoding": {
                        "codec": {
                            **codec_fields(codec),
                            "dtype": jnp.dtype(codec.dtype).name,
                            "weights_sha256": weights_sha256(self.params),
                        },
                        "transform": self.transform.describe(),
                        "views": self.views,
                        "moments": {"shape": self.moments_shape, "dtype": "float16"},
                        "source": {"fingerprint": source.fingerprint, "records": len(source)},
                        "num_classes": source.num_classes,
                        "class_names": source.class_names,
                        "shard_records": self.records_per_shard,
                    },
                    "scale": codec.scale,  # of the codec at the first start; the moments do not depend on scale and shift
                    "shift": codec.shift,
                    "made_with": {
                        **versions("jax", "numpy"),
                        "images_at_once": chunk_size(),
                        "pillow": version("pillow"),
                        **arithmetic(),
                    },
                }
            )
        )


def encode(job: Job, folder: str | os.PathLike, max_bad_share: float = 0.001, num_threads: int = 16) -> tuple[dict, float | None]:
    """Writes the latent cache of a job, or resumes it; returns its manifest and images/s of this process.

    Finished shards are verified by their hashes; damaged ones are encoded again. Each of several processes encodes its own
    shards, and all must see the same folder.

    Args:
        max_bad_share: unreadable records are skipped and listed; more than this share of the data set is an error.
        num_threads: threads that read and decode images.

    Raises:
        UserError: the folder contains a cache of another job, or is being written; too many bad records; moments exceed the
            range of float16.
    """
    folder = local_path(folder)
    if not 0 <= max_bad_share < 1:
        raise UserError(f"max_bad_share is {max_bad_share}; it must lie in [0, 1)")
    rate = encode_shards(job, folder, max_bad_share, num_threads, jax.process_index(), jax.process_count())
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("latent cache: every shard is written")
    return finish(folder, max_bad_share, jax.process_index() == 0), rate


def encode_shards(
    job: Job, folder: Path, max_bad_share: float, num_threads: int, process_index: int, process_count: int
) -> float | None:
    """Encodes the shards k with k % process_count == process_index that are missing or damaged; returns images/s."""
    with claimed(folder, job.settings, process_index) as settings:
        mine = range(process_index, job.num_shards, process_count)
        facts = intact_shards(folder, mine, job.num_shards, digest(settings))
        missing = [k for k in mine if k not in facts]
        if not missing:
            say(f"{folder}: all {len(mine)} shards of this process exist, and every hash matches")
            return None
        if lines := differences(settings["made_with"], job.settings["made_with"]):
            raise UserError(
                f"{folder} was started with other versions, which may give different bits: use those versions, or encode "
                "into another folder:\n  " + "\n  ".join(lines)
            )
        if facts:
            say(f"{folder}: {len(facts)} of {len(mine)} shards of this process are intact; encoding the others")
        (folder / MANIFEST).unlink(missing_ok=True)  # a folder with a manifest is a complete cache
        remove_leftovers(folder, *(shard_file(k, job.num_shards, kind) for k in missing for kind in SUFFIXES))

        size = job.records_per_shard
        images = sum(min(len(job.source), (k + 1) * size) - k * size for k in missing)
        encoder, progress, start = DeviceEncoder(job), Progress("images", images), time.monotonic()
        bad = [record for k in facts for record in facts[k]["bad_records"]]
        done, writing = 0, None
        with ThreadPoolExecutor(1) as writer:  # hashes and writes a shard while the next is encoded
            for k in missing:
                shard = Shard(job, k)
                for seen in shard.encode(encoder, num_threads):
                    progress.update(done + seen)
                    check_bad([*bad, *shard.bad_records], len(job.source), max_bad_share)
                bad += shard.bad_records
                check_bad(bad, len(job.source), max_bad_share)
                done += shard.stop - shard.start
                settled(writing)
                writing = writer.submit(shard.write, folder, digest(settings))
            settled(writing)
        return round(images / (time.monotonic() - start), 2)


def settled(writing: Future | None) -> None:
    if writing is not None:
        writing.result()


class DeviceEncoder:
    """Encodes any number of images to moments, in calls of one shape on all devices of this process."""

    def __init__(self, job: Job):
        self.views = job.views
        devices = jax.local_devices()
        self.batch_size = len(devices) * job.device_batch_size
        mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
        self._rows = NamedSharding(mesh, PartitionSpec("rows"))
        self._params = jax.device_put({"encoder": job.params["encoder"]}, NamedSharding(mesh, PartitionSpec()))

        def chunk(params, images):
            images = to_float(images)
            if job.mirror:
                images = jnp.stack([images, images[..., ::-1, :]], axis=1).reshape(-1, *images.shape[1:])
            return job.codec.encode(params, images)

        def moments(params, images):
            chunks = images.reshape(-1, chunk_size(), *images.shape[1:])
            return jax.lax.map(lambda x: chunk(params, x), chunks).reshape(-1, *job.moments_shape)

        # shard_map: the program of a device does not depend on the number of devices.
        self._program = jax.jit(
            jax.shard_map(
                moments,
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec("rows")),
                out_specs=PartitionSpec("rows"),
                check_vma=False,
            )
        )

    def start(self, images: np.ndarray) -> jax.Array:
        """uint8 [n, H, W, C], n at most the batch size -> moments that are being computed, rows past n * views padding."""
        padding = [(0, self.batch_size - len(images))] + [(0, 0)] * (images.ndim - 1)
        return self._program(self._params, jax.device_put(np.pad(images, padding), self._rows))

    def __call__(self, batches: Iterator[dict]) -> Iterator[tuple[dict, np.ndarray]]:
        """Yields (batch, float32 [n * views, h, w, 2c]) for each batch, while the devices encode the next one."""
        previous = None
        for batch in batches:
            started = batch, self.start(batch["image"])
            if previous is not None:
                yield self._fetched(*previous)
            previous = started
        if previous is not None:
            yield self._fetched(*previous)

    def _fetched(self, batch: dict, moments: jax.Array) -> tuple[dict, np.ndarray]:
        return batch, np.asarray(moments)[: self.views * len(batch["index"])]


@dataclass
class Shard:
    """One shard of a job in memory: encoded, then written."""

    job: Job
    number: int

    def __post_init__(self):
        job, size = self.job, self.job.records_per_shard
        self.start, self.stop = self.number * size, min((self.number + 1) * size, len(job.source))
        self.count, self.bad_records = 0, []
        self.moments = np.empty(((self.stop - self.start) * job.views, *job.moments_shape), np.float16)
        self.labels = np.empty(self.stop - self.start, np.int32)
        self.index = np.empty(self.stop - self.start, np.int64)
        self.captions: list[str | None] = []

    def encode(self, encoder: DeviceEncoder, num_threads: int) -> Iterator[int]:
        """Fills the arrays; yields the number of processed records of the shard after each batch."""
        batches = read_in_order(
            self.job.source,
            self.job.transform,
            encoder.batch_size,
            start=self.start,
            stop=self.stop,
            num_threads=num_threads,
            bad_records=self.bad_records,
        )
        with contextlib.closing(batches):
            for batch, moments in encoder(batches):
                self._add(batch, moments)
                yield int(batch["index"][-1]) + 1 - self.start

    def _add(self, batch: dict, moments: np.ndarray):
        rows = slice(self.count, self.count + len(batch["index"]))
        views = self.job.views
        with np.errstate(over="ignore"):  # overflow becomes infinity and is reported below
            half = moments.astype(np.float16)
        lost = np.flatnonzero(~np.isfinite(half).reshape(len(half), -1).all(axis=1))
        if lost.size:
            worst, record = moments[lost[0]], int(batch["index"][lost[0] // views])
            what = f"moments from {worst.min():.4g} to {worst.max():.4g}, which exceed the range of float16"
            what = what if np.isfinite(worst).all() else "moments that are NaN or infinite"
            raise UserError(
                f"{record_name(self.job.source, record)} has {what}: check the codec's weights; if they are right, use "
                "--dtype=float32"
            )
        self.moments[rows.start * views : rows.stop * views] = half
        self.labels[rows], self.index[rows] = batch["label"], batch["index"]
        self.captions += batch.get("caption", [None] * len(batch["index"]))
        self.count = rows.stop

    def write(self, folder: Path, settings_digest: str) -> None:
        """Writes the files, the facts last."""
        moments, labels, index = self.moments[: self.count * self.job.views], self.labels[: self.count], self.index[: self.count]
        parts = {"moments": npy(moments), "labels": npy(labels), "index": npy(index)}
        if any(caption is not None for caption in self.captions):
            parts["captions"] = [json.dumps(self.captions).encode()]

        def path(kind: str) -> Path:
            return folder / shard_file(self.number, self.job.num_shards, kind)

        path("facts").unlink(missing_ok=True)  # facts of a damaged shard are invalid while its files are replaced
        files = {kind: write_listed(path(kind), content) for kind, content in parts.items()}
        # An error of Pillow names the address of an object, which is another in every process.
        bad = [(index, re.sub(r" at 0x[0-9a-f]+", "", reason)) for index, reason in sorted(self.bad_records)]
        write_sealed(
            path("facts"),
            {
                "settings": settings_digest,
                "count": self.count,
                "bad_records": bad,
                "captions": sum(caption is not None for caption in self.captions),
                "sums": sums(moments, self.job.latent_channels),
                "files": files,
            },
        )


def record_name(source: Source, index: int) -> str:
    return f"record {index} ({source[index].get('name', 'without a name')})"


def sums(moments: np.ndarray, channels: int) -> dict[str, list[float]]:
    """Sums per channel over all rows and pixels, float64: posterior mean, its square, and posterior variance.

    moments: float16 [rows, ..., 2c], or [rows, ..., c] of a codec without a posterior, whose variance is 0; c = channels.
    """
    total = np.zeros((3, channels))
    for start in range(0, len(moments), STATISTICS_ROWS):
        rows = moments[start : start + STATISTICS_ROWS].astype(np.float64)
        mean, log_variance = rows[..., :channels], rows[..., channels:]
        variance = np.exp(np.clip(log_variance, *LOG_VARIANCE_RANGE)) if log_variance.size else np.zeros_like(mean)
        parts = (mean, mean**2, variance)
        total += [part.sum(axis=tuple(range(part.ndim - 1))) for part in parts]
    return dict(zip(("mean", "square", "variance"), total.tolist(), strict=True))
