"""Measures the extraction of features and moments for FID, from images in memory."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.benchmark import machine
from dit_jax.benchmark.timing import Timing
from dit_jax.data.size import size_json
from dit_jax.errors import UserError
from dit_jax.evaluate.images import ArrayImages
from dit_jax.evaluate.statistics import CHUNK_IMAGES, Wanted, default_batch_size, extract
from dit_jax.metrics.inception import INPUT_SIZE, Inception, InceptionV3

BATCHES = 8  # if the number of images is not given


class Clocked(ArrayImages):
    """Images that record when a batch is requested and how many images are finished by then.

    Extraction reads one batch in advance and processes two.
    """

    def __init__(self, images: np.ndarray):
        super().__init__(images, "noise")
        self.asked = []

    def batches(self, start, stop, size):
        for number, batch in enumerate(super().batches(start, stop, size)):
            self.asked.append((time.perf_counter(), start + max(0, number - 2) * size))
            yield batch


def run(size: tuple[int, int], batch_size: int | None, records: int | None) -> dict:
    """Measures the work of `dit_jax.evaluate` for FID, sFID and the Inception Score: resize, Inception-v3, sums in float64.

    Weights and images are random, which does not affect the speed. Compilation and the first images do not count.

    Args:
        batch_size: of `extract`; None for its default.
        records: images of this (height, width); None for BATCHES batches.

    Raises:
        UserError: too few images to measure.
    """
    batch_size = batch_size or default_batch_size()
    records = BATCHES * batch_size if records is None else records
    fewest = min(4 * batch_size, CHUNK_IMAGES + 1)
    if records < fewest:
        raise UserError(f"--records={records} are too few to measure with a batch size of {batch_size}; give at least {fewest}")
    images = Clocked(np.random.default_rng(0).integers(0, 256, (records, *size, 3), np.uint8))
    params = jax.jit(InceptionV3().init)(jax.random.key(0), jnp.zeros((1, INPUT_SIZE, INPUT_SIZE, 3)))["params"]
    cpu, start = time.process_time(), time.perf_counter()
    extract(images, Inception(), params, Wanted(("features", "spatial"), classes=True), batch_size=batch_size, processes=(0, 1))
    end = time.perf_counter()
    begin, done = next((when, done) for when, done in images.asked if done)
    timing = Timing(np.diff([*(when for when, done in images.asked if done), end]), batch_size, time.process_time() - cpu)
    rate = (records - done) / (end - begin)
    return {
        "extractor": "Inception-v3",
        "dtype": "float32",
        "resolution": size_json(size),
        "batch_size": batch_size,
        "records": records,
        "images": records - done,
        "measured_seconds": end - begin,
        "images_per_second": rate,
        **timing.quantiles(),
        "images_per_second_per_device": rate / jax.local_device_count(),
        "compile_and_first_batches_seconds": begin - start,
        "total_seconds": end - start,
        "cpu_seconds": timing.cpu_seconds,
        "peak_bytes": machine.peak_bytes(),
    }
