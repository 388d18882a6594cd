"""Measures what the training loop's checks, watchdog and records cost per step."""

import contextlib
import io
import tempfile
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.benchmark import timing
from dit_jax.benchmark.subject import Subject
from dit_jax.programs import hlo
from dit_jax.programs.traffic import hbm_traffic
from dit_jax.runtime import phases, watchdog
from dit_jax.runtime.console import say
from dit_jax.runtime.signals import StopSignal
from dit_jax.runtime.step_clock import IN_FLIGHT, StepClock
from dit_jax.tasks.compiled_step import compile_step
from dit_jax.tasks.state import abstract_state, create_sharded
from dit_jax.training.events import Log
from dit_jax.training.meter import Meter
from dit_jax.training.records import Records

STEPS = 200
WARM_UP_STEPS = 3


def run(subject: Subject, seconds: float) -> dict[str, Any]:
    """The cost beside the time, FLOPs and bytes of the training step.

      step_seconds             median of the compiled step alone
      host_seconds             median of 200 steps of the loop around a step that takes no time
      recorded_host_seconds    the same where each step is recorded and printed, not every `log.every_steps`-th
      added_flops              of the compiled step over one without its checks for finite numbers, by XLA's count
      added_bytes              the same by `traffic`, an upper bound
      host_share, flops_share, bytes_share   of the step; of its matrix products for FLOPs

    seconds: to measure the step for.
    """
    task, mesh = subject.task, subject.mesh
    args = (task, mesh, subject.seed, abstract_state(task, mesh), subject.constants, subject.batch())
    with mock.patch.object(jnp, "isfinite", lambda x: jnp.ones(jnp.shape(x), bool)):  # the checks are folded away
        unchecked = _costs(compile_step(*args)[0])
    compiled, zeros, _ = compile_step(*args)
    checked = _costs(compiled)
    say("compiled the training step with and without its checks")
    host, recorded = (float(np.median(host_seconds(subject, zeros, every))) for every in (STEPS, 1))
    work = _work(subject, compiled, zeros)
    timing.warm_up(work, WARM_UP_STEPS)
    step = float(np.median(timing.measure(work, seconds).seconds))
    added = {name: checked[name] - unchecked[name] for name in checked}
    products = None if subject.macs is None else 6 * subject.macs * subject.batch_size
    return {
        "step_seconds": step,
        "host_seconds": host,
        "recorded_host_seconds": recorded,
        "host_share": host / step,
        **{f"added_{name}": value for name, value in added.items()},
        "flops_share": products and added["flops"] / products,
        "bytes_share": added["bytes"] / unchecked["bytes"],
    }


def _work(subject: Subject, compiled: Any, zeros: Any) -> timing.Work:
    state = create_sharded(subject.task, jax.random.key(subject.seed), subject.mesh)
    sums, batch = zeros(), subject.batch()

    def call():
        nonlocal state, sums
        state, sums = compiled(state, sums, subject.constants, batch)
        return sums

    return timing.Work(call, subject.batch_size, {})


def _costs(compiled: Any) -> dict[str, float]:
    return {"flops": compiled.cost_analysis()["flops"], "bytes": sum(hbm_traffic(hlo.parse(compiled.as_text())))}


def host_seconds(subject: Subject, zeros: Any, log_every_steps: int) -> list[float]:
    """Seconds of each of STEPS steps of the loop, without the step, the batch, saves, previews and scores."""
    seconds, output = [], jax.block_until_ready(jnp.zeros(2))
    stepper = SimpleNamespace(take_sums=zeros)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        clock = stack.enter_context(StepClock())
        stack.enter_context(watchdog.Watchdog(watchdog.DEFAULT_SECONDS))
        records = stack.enter_context(Records(stack.enter_context(tempfile.TemporaryDirectory())))
        stop = stack.enter_context(StopSignal(unsaved=False))
        meter = Meter(records, clock, subject.task, subject.mesh, subject.batch_size, STEPS, 0)
        log = Log(meter, stepper, SimpleNamespace(bad_records=()), every_steps=log_every_steps, num_steps=STEPS)
        stack.enter_context(phases.phase("step"))
        for step in range(1, STEPS + 1):
            start = time.perf_counter()
            clock.wait(step - IN_FLIGHT)
            clock.dispatched(step, time.monotonic(), output)
            stop.requested(step)
            if log.due(step, False):
                with clock.spend(log.kind):
                    log(step, None)  # type: ignore[arg-type]  # it reads no state
            seconds.append(time.perf_counter() - start)
    return seconds
