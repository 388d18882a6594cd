"""Measures the speed at which a host's cores decode JPEG files and crop them."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_jax.benchmark import machine
from dit_jax.benchmark.timing import Work, measure, report, warm_up
from dit_jax.data.loader import Loader
from dit_jax.data.size import size_json
from dit_jax.data.sources import ImageFolder, Source
from dit_jax.data.transforms import ImageTransform

SYNTHETIC_IMAGES, SYNTHETIC_SIZE, SYNTHETIC_QUALITY = 64, (500, 375), 95  # about 100 KB each, as in ImageNet
WARM_UP_BATCHES = 4  # more than the loader computes in advance


def write_photographs(folder: Path):
    """Writes JPEGs that compress similarly to photographs: smooth shapes of 60 pixels, finer ones, and noise."""
    rng = np.random.default_rng(0)
    width, height = SYNTHETIC_SIZE
    for number in range(SYNTHETIC_IMAGES):
        picture = np.zeros((height, width, 3), np.float32)
        for cells, weight in ((8, 0.6), (40, 0.3)):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            picture += weight * np.asarray(coarse.resize(SYNTHETIC_SIZE, Image.Resampling.BICUBIC), np.float32)
        picture += rng.normal(0, 8, picture.shape)
        image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
        image.save(folder / f"{number:03d}.jpg", quality=SYNTHETIC_QUALITY)


def run(data: str | None, size: tuple[int, int], batch_size: int, seconds: float, threads: list[int]) -> dict:
    """Measures shuffled, mirrored training batches of `data.loader.Loader`, once per number of threads.

    Args:
        data: folder of images as for `ImageFolder`; None generates SYNTHETIC_IMAGES files.
    """
    if data is not None:
        return {"data": data, **_measured(ImageFolder(data), size, batch_size, seconds, threads)}
    with tempfile.TemporaryDirectory(prefix="dit_jax_images_") as folder:
        write_photographs(Path(folder))
        made = f"{SYNTHETIC_IMAGES} synthetic JPEGs of {SYNTHETIC_SIZE[0]} x {SYNTHETIC_SIZE[1]}"
        return {"data": made, **_measured(ImageFolder(folder), size, batch_size, seconds, threads)}


def by_threads(source: Source, transform: Any, batch_size: int, seconds: float, threads: list[int]) -> list[dict]:
    """The speed of training batches, for each number of threads."""
    rows = []
    for count in threads:
        loader = Loader(source, transform, batch_size, seed=0, num_threads=count)
        with loader.batches() as batches:
            work = Work(functools.partial(next, batches), batch_size)
            warm_up(work, WARM_UP_BATCHES)
            timing = measure(work, seconds)
        report(f"{count} threads", timing)
        rows.append(
            {
                "threads": count,
                **timing.rates(),
                **timing.quantiles(),
                "cpu_seconds": timing.cpu_seconds,
                "images_per_cpu_second": timing.images * len(timing.seconds) / timing.cpu_seconds,
            }
        )
    return rows


def _measured(source: ImageFolder, size: tuple[int, int], batch_size: int, seconds: float, threads: list[int]) -> dict:
    rows = by_threads(source, ImageTransform(size[0], 3, flip=True, size=size), batch_size, seconds, threads)
    best = max(rows, key=lambda row: row["images_per_second"])
    files = [Path(source[i]["name"]).stat().st_size for i in range(min(len(source), 64))]
    return {
        "num_images": len(source),
        "mean_file_bytes": float(np.mean(files)),
        "resolution": size_json(size),
        "batch_size": batch_size,
        "cores": machine.cores(),
        **best,
        "by_threads": rows,
    }
