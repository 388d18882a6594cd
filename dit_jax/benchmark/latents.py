"""Measures the speed at which a host reads batches of a latent cache from the page cache."""

import tempfile
from pathlib import Path

import numpy as np

from dit_jax.benchmark.timing import Work, measure, report, warm_up
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.data.latent_files import SETTINGS
from dit_jax.data.latent_loader import AHEAD, LatentLoader
from dit_jax.data.latents import LatentCache
from dit_jax.encode.cache_folder import finish
from dit_jax.encode.writer import Job, Shard
from dit_jax.runtime.console import say
from dit_jax.storage.sealed import digest, write_sealed

CLASSES = 1000
NUM_SHARDS = 4


class Nothing:
    """A data set that has only a number of records; its moments are synthetic."""

    num_classes, class_names, fingerprint = CLASSES, tuple(map(str, range(CLASSES))), "made up by dit_jax.benchmark"

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        raise IndexError(f"record {index}: this data set has numbers only")


def write_cache(folder: Path, records: int, size: tuple[int, int]):
    """Writes a complete cache of normal random numbers, with mirror images, for Stable Diffusion's codec and this size."""
    job = Job(Nothing(records), KLVAE(), {}, size, shard_records=-(-records // NUM_SHARDS))
    write_sealed(folder / SETTINGS, job.settings)
    rng = np.random.default_rng(0)
    for number in range(job.num_shards):
        shard = Shard(job, number)
        shard.count = shard.stop - shard.start
        shard.moments[:] = rng.standard_normal(shard.moments.shape, np.float32)
        shard.labels[:] = rng.integers(0, CLASSES, shard.count)
        shard.index[:] = np.arange(shard.start, shard.stop)
        shard.texts = {kind: [None] * shard.count for kind in shard.texts}
        shard.write(folder, digest(job.settings))
    finish(folder, 0.0, first=True)


def run(data: str | None, size: tuple[int, int], records: int, batch_size: int, seconds: float) -> dict:
    """Measures shuffled training batches with flips of `LatentLoader`.

    Args:
        size: (height, width) of the images in pixels.
        data: folder of a cache; None generates one of `records` records of images of this size.
    """
    if data is not None:
        return {"data": data, **_measured(data, batch_size, seconds)}
    with tempfile.TemporaryDirectory(prefix="dit_jax_latents_") as folder:
        say(f"writing a cache of {records} records")
        write_cache(Path(folder), records, size)
        return {"data": "synthetic", **_measured(folder, batch_size, seconds)}


def _measured(folder: str, batch_size: int, seconds: float) -> dict:
    cache = LatentCache(folder, verify=True)  # hashing reads every byte into the page cache, if it fits
    flip = cache.views == 2
    with LatentLoader(cache, batch_size, 0, flip).batches() as batches:
        work = Work(lambda: next(batches), batch_size)
        warm_up(work, AHEAD + 2)
        timing = measure(work, seconds)
    report("latents", timing)
    row = 2 * int(np.prod(cache.moments_shape))
    return {
        "records": len(cache),
        "views": cache.views,
        "flip": flip,
        "moments_shape": cache.moments_shape,
        "cache_bytes": row * cache.views * len(cache),
        "batch_size": batch_size,
        **timing.rates(),
        **timing.quantiles(),
        "cpu_seconds": timing.cpu_seconds,
        "images_per_cpu_second": timing.images * len(timing.seconds) / timing.cpu_seconds,
        "bytes_per_second": row * timing.images_per_second,
    }
