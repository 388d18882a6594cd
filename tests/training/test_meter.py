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


class Clock:
    """A clock whose steps are finished; `skipped` has a 1 for each that was skipped."""

    def __init__(self, skipped):
        self.steps = []
        for number, flag in enumerate(skipped, 1):
            sums = np.float32([flag + (self.steps[-1].output[0] if self.steps else 0), number])
            self.steps.append(Finished(number, 1.0 * number, 1.0 * number, 1.0, Counter(), Counter(), sums))

    def peek(self, step):
        return [x for x in self.steps if x.step <= step]

    def take(self, step):
        taken = self.peek(step)
        self.steps = self.steps[len(taken) :]
        return taken


def metered(skipped, num_steps):
    """A meter with one interval of steps to report."""
    records = SimpleNamespace(scalars=lambda step, values: None)
    it = meter.Meter(records, Clock(skipped), build.Run(tiny.config()).task, mesh_of("cpu", "cpu", 1), 16, num_steps, 0)
    it.defer(len(skipped), {"loss": np.float32([1, 1]), "skipped": np.float32([sum(skipped), len(skipped)])})
    return it


@pytest.mark.parametrize(
    "skipped, num_steps, first",
    [
        ([0] + 29 * [1], 30, 2),  # in one interval with a good step
        ([0] + 29 * [1], 90, 2),
        ([0, 0, 1], 3, 3),  # at the very end
        (5 * [0] + 20 * [1] + [0], 26, None),  # it recovered
        ([0] + 9 * [1], 90, None),
    ],
)
def test_steps_that_are_skipped_at_the_end(skipped, num_steps, first):
    """A run of which 29 of 30 steps were skipped, and that ends with the loss of the first, because its interval had one."""
    it = metered(skipped, num_steps)
    assert it.skipped_in_a_row(len(skipped)) == (
        0 if skipped[-1] == 0 else len(skipped) - 1 - max(np.flatnonzero(np.equal(skipped, 0)))
    )
    if first is None:
        it.report()
        return
    with pytest.raises(meter.Diverged) as error:
        it.report()
    assert (error.value.step, error.value.first_skipped) == (len(skipped), first)


def test_skipped_steps_of_two_intervals():
    """Steps in a row that are forgotten at the end of an interval, or that count although a good one came between."""
    it = metered([0] + 6 * [1], 90)
    it.report()
    it.clock = Clock(5 * [1])
    assert it.skipped_in_a_row(3) == 9 and it.skipped_in_a_row(5) == 11
    it.clock = Clock([0, 1, 1])
    assert it.skipped_in_a_row(3) == 2


def test_autoencoder_flops():
    """A run of an autoencoder that fails, or counts the decoder alone."""
    task = build.Run(tiny.autoencoder()).task
    assert 6 * task.macs() == pytest.approx(6 * sum(task.codec.macs((8, 8, 1))))
