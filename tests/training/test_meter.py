"""training/meter.py: speed and use of the hardware, by hand."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from dit_jax import build, recipes
from dit_jax.runtime.step_clock import Finished
from dit_jax.training import meter


def mesh_of(kind, platform, count):
    return SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind, platform=platform)] * count, object))


def test_speed_and_utilization():
    """MACs taken for FLOPs, one device's peak for all, a preview or a late first step counted as training."""
    task = build.Run(recipes.dit("XL/2", 256)).task
    it = meter.Meter(None, None, task, mesh_of("TPU v5p", "tpu", 4), 256, 400_000, 10)
    assert it.peak_flops == 4 * 459e12 and it.flops_per_image == pytest.approx(6 * 118.64e9, rel=1e-3)

    def step(number, dispatched, at, seconds, **idle):
        return Finished(number, at, dispatched, seconds, Counter(idle) + Counter({"data": 0.25}), Counter(idle))

    first = it.speed([step(11, 100.0, 101.0, 1.0, compile=50.0), step(12, 100.1, 102.0, 1.0)])
    assert first["images_per_second"] == pytest.approx(256) and first["data_wait_seconds"] == 0.5
    assert first["mfu"] == pytest.approx(256 * 6 * 118.64e9 / (4 * 459e12), rel=1e-3)
    second = it.speed([step(13, 107.0, 108.0, 1.0, preview=5.0), step(14, 107.1, 110.0, 2.0, checkpoint=0.5)])
    assert second["images_per_second"] == pytest.approx(2 * 256 / 3) and second["checkpoint_seconds"] == 0.5
    assert second["step_seconds_p50"] == 1.5 and second["step_seconds_p99"] == pytest.approx(1.99)


@pytest.mark.parametrize("kind, platform", [("cpu", "cpu"), ("Toaster 9", "gpu")])
def test_no_figure_no_mfu(kind, platform):
    """A made-up utilization, or a run that ends because its chip is not in a table."""
    assert meter.peak_flops(mesh_of(kind, platform, 2)) is None


def test_autoencoder_flops():
    """A run of an autoencoder that fails, or counts the decoder alone."""
    task = build.Run(tiny.autoencoder()).task
    assert 6 * task.macs() == pytest.approx(6 * sum(task.codec.macs((8, 8, 1))))
