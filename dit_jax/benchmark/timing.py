"""Measured time: repeated pieces of work, their seconds, and the rates that follow."""

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
    """A piece of work that can be done again and again, such as one training step.

    Fields:
        call: starts it and returns arrays to wait for, or what is ready already.
        images: how many images one call is for.
        facts: what the result says about it besides time.
    """

    call: Callable[[], Any]
    images: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls.

    Fields:
        seconds: float64[n], wall time of each call, from its start to the end of what it started; of a queue of calls, the mean.
        images: of one call.
        cpu_seconds: processor time of this process over all calls.
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
    """Calls that are not measured: they compile, fill queues, and let clocks and caches settle."""
    for _ in range(steps):
        jax.block_until_ready(work.call())


def measure(work: Work, seconds: float) -> Timing:
    """Calls one after another, each waited for, until `seconds` have been measured, at least MIN_STEPS."""
    measured, total = [], 0.0
    cpu = time.process_time()
    while total < seconds or len(measured) < MIN_STEPS:
        start = time.perf_counter()
        jax.block_until_ready(work.call())
        measured.append(time.perf_counter() - start)
        total += measured[-1]
    return Timing(np.array(measured), work.images, time.process_time() - cpu)


def measure_queued(work: Work, steps: int) -> Timing:
    """`steps` calls of which only the last is waited for, as a training loop runs: what the host does hides behind the device."""
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
    """Ours and the peers in turn, A B A B, so that a drift of the machine hits all alike.

    Each is measured for `seconds` in all, spread over the rounds.

    Returns:
        Ours as of `Timing`, "peers": {name: the same and its facts}, and "ratio": {name: median seconds of our call over
        the peer's}, below 1 where ours is faster. cpu_seconds_per_step are of all threads, and on a machine that others use
        tell more than wall time.
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
    found = {name: {**t.rates(), **t.quantiles(), "cpu_seconds_per_step": t.cpu_seconds_per_step} for name, t in joined.items()}
    return {
        **found["dit_jax"],
        "ratio": {name: medians["dit_jax"] / medians[name] for name in peers},
        "peers": {name: found[name] | peers[name].facts for name in peers},
    }
