"""Times repeated pieces of work and computes their rates."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from dit_jax.runtime.console import say

MIN_STEPS = 3


@dataclass(frozen=True)
class Work:
    """A repeatable piece of work, such as one training step.

    Fields:
        call: starts it and returns arrays to wait for, or a finished result.
        images: number of images per call.
        facts: further fields of the result.
    """

    call: Callable[[], Any]
    images: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls.

    Fields:
        seconds: float64[n], wall time of each call, from its start to the end of its work; for queued calls, the mean.
        images: number of images per call.
        cpu_seconds: CPU time of this process over all calls.
    """

    seconds: np.ndarray
    images: int
    cpu_seconds: float

    @property
    def cpu_seconds_per_step(self) -> float:
        return self.cpu_seconds / len(self.seconds)

    @property
    def images_per_second(self) -> float:
        return self.images * len(self.seconds) / float(self.seconds.sum())

    def rates(self) -> dict:
        """Counts, seconds and images per second; images = images_per_second x measured_seconds."""
        return {
            "images_per_second": self.images_per_second,
            "images": self.images * len(self.seconds),
            "measured_seconds": float(self.seconds.sum()),
            "steps": len(self.seconds),
        }

    def quantiles(self) -> dict:
        """Median and 99th percentile of a call, interpolated between the two nearest calls."""
        p50, p99 = np.percentile(self.seconds, [50, 99])
        return {"step_seconds_p50": float(p50), "step_seconds_p99": float(p99)}


def warm_up(work: Work, steps: int):
    """Makes calls that are not measured, to compile, fill queues, and warm up clocks and caches."""
    for _ in range(steps):
        jax.block_until_ready(work.call())


def measure(work: Work, seconds: float) -> Timing:
    """Measures sequential calls, with a wait after each, for `seconds` and at least MIN_STEPS calls."""
    measured, total = [], 0.0
    cpu = time.process_time()
    while total < seconds or len(measured) < MIN_STEPS:
        start = time.perf_counter()
        jax.block_until_ready(work.call())
        measured.append(time.perf_counter() - start)
        total += measured[-1]
    return Timing(np.array(measured), work.images, time.process_time() - cpu)


def measure_queued(work: Work, steps: int) -> Timing:
    """Measures `steps` calls with a single wait after the last one, so that the host's work overlaps, as in a training loop."""
    cpu, start = time.process_time(), time.perf_counter()
    for _ in range(steps):
        out = work.call()
    jax.block_until_ready(out)
    wall = time.perf_counter() - start
    return Timing(np.full(steps, wall / steps), work.images, time.process_time() - cpu)


def report(name: str, timing: Timing):
    say(
        f"{name}: {timing.images_per_second:,.1f} images/s, {timing.seconds.mean() * 1e3:,.2f} ms a call, {len(timing.seconds)} "
        "calls"
    )


def compare(ours: Work, peers: Mapping[str, Work], seconds: float, warm_up_steps: int, rounds: int = 2) -> dict:
    """Measures ours and the peers alternately, A B A B, so that drift of the machine affects all equally.

    Each is measured for `seconds` in total, divided among the rounds.

    Returns:
        The fields of our `Timing`, "peers": {name: its fields and facts}, and "ratio": {name: our median seconds per call
        divided by the peer's}, below 1 if ours is faster. cpu_seconds_per_step include all threads; on a shared machine they
        are more informative than wall time.
    """
    works = {"dit_jax": ours, **peers}
    for name, work in works.items():
        say(f"warming up {name}")
        warm_up(work, warm_up_steps)
    timings = {name: [] for name in works}
    for turn in range(rounds):
        for name, work in works.items():
            timings[name].append(measure(work, seconds / rounds))
            report(f"round {turn + 1}, {name}", timings[name][-1])
    joined = {
        name: Timing(np.concatenate([t.seconds for t in parts]), parts[0].images, sum(t.cpu_seconds for t in parts))
        for name, parts in timings.items()
    }
    medians = {name: t.quantiles()["step_seconds_p50"] for name, t in joined.items()}
    results = {name: {**t.rates(), **t.quantiles(), "cpu_seconds_per_step": t.cpu_seconds_per_step} for name, t in joined.items()}
    return {
        **results["dit_jax"],
        "ratio": {name: medians["dit_jax"] / medians[name] for name in peers},
        "peers": {name: {**results[name], **peers[name].facts} for name in peers},
    }
