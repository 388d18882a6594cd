"""The metrics of an interval of training: means over its steps, speed, and stalls."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.errors import Failure, UserError
from dit_jax.programs import chips
from dit_jax.runtime.console import duration, progress_bar, say
from dit_jax.runtime.step_clock import KINDS, Finished, StepClock
from dit_jax.tasks.task import Task
from dit_jax.training.records import Records

MAX_SKIPPED_STEPS = 10


class Diverged(Failure):
    """Many steps in a row, or the last ones of a run, were skipped because they are not finite.

    Fields:
        step: the last of them.
        first_skipped: the first of them.
    """

    def __init__(self, message: str, step: int, first_skipped: int):
        super().__init__(message)
        self.step, self.first_skipped = step, first_skipped


def skipped_at_the_end(finished: Sequence[Finished]) -> int:
    """Number of steps at the end that were skipped; the output of each step is the sum of "skipped" since the first of them."""
    sums = [0.0, *(float(x.output[0]) for x in finished)]
    count = 0
    while count < len(finished) and sums[-1 - count] > sums[-2 - count]:
        count += 1
    return count


def peak_flops(mesh: Mesh) -> float | None:
    """Dense bfloat16 FLOP/s of all devices of the mesh; None if the table of chips has no value (CPU, an unlisted chip)."""
    try:
        chip = chips.of_device(mesh.devices.flat[0])
    except UserError:
        return None
    return None if chip is None or chip.peak_flops is None else chip.peak_flops * mesh.devices.size


def peak_bytes() -> int | None:
    """The most memory that a device of this process has held since it started; None if devices do not report it (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((device["peak_bytes_in_use"] for device in stats if "peak_bytes_in_use" in device), default=None)


class Meter:
    """Turns the sums of an interval into a record and a line of progress.

    Fields:
        work_of: step -> (images, FLOPs of three forward passes) of its batch; the same for all steps unless it is set.

    Sums are read one step late: while the host waits for the numbers of step n, the devices compute step n + 1.

    A record has the means of the task's sums, each example counting the same, and:
        images_per_second: over the time from the end of the last interval to the end of this one, without previews and scores.
        mfu: images_per_second x 6 x `Task.macs` / `peak_flops`: three forward passes at two FLOPs per multiply-add.
            Recomputation, frozen networks and the optimizer are not counted. Stalls lower it.
        step_seconds_p50, step_seconds_p99: device time of a step, see `StepClock`.
        data_wait_seconds: the loop waited for batches. The devices stall only if they run out of dispatched steps.
        checkpoint_seconds: the loop was blocked by saving (files are written in the background).
        peak_device_bytes: see `peak_bytes`.
        learning_rate: of the last step of the interval, if the optimizer knows it.
        skipped, bad_records: steps that were not finite, see `Task.step`; unreadable records of the data set.
    """

    def __init__(
        self,
        records: Records,
        clock: StepClock,
        task: Task,
        mesh: Mesh,
        batch_size: int,
        num_steps: int,
        first_step: int,
        rate: Callable[[int], float] | None = None,
    ):
        self.records, self.clock, self.batch_size, self.num_steps = records, clock, batch_size, num_steps
        self.flops_per_image, self.peak_flops = 6 * task.macs(), peak_flops(mesh)  # a step costs three forward passes
        self.work_of: Callable[[int], tuple[int, int]] = lambda step: (batch_size, batch_size * self.flops_per_image)
        self.first_step = self.last_step = first_step
        self.first_time: float | None = None
        self.last_time: float | None = None
        self.loss: float | None = None
        self.images_per_second: float | None = None
        self.rate = rate
        self._skipped_before = 0  # steps in a row, up to the last report
        self.pending: tuple[int, Any] | None = None
        self.bad_records = 0
        self.bar = progress_bar("training", num_steps, first_step, " steps")  # None where stderr is no terminal

    def passed(self, step: int) -> None:
        """Moves the bar to this step."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Ends the bar; it stays on the screen."""
        if self.bar is not None:
            self.bar.close()

    def defer(self, step: int, sums: dict[str, jax.Array]) -> None:
        self.pending = (step, sums)

    def skipped_in_a_row(self, step: int) -> int:
        """Number of steps in a row that were skipped, up to this one, which it waits for; the state is that before them."""
        return self._in_a_row(self.clock.peek(step))

    def _in_a_row(self, finished: Sequence[Finished]) -> int:
        count = skipped_at_the_end(finished)
        return count + (self._skipped_before if count == len(finished) else 0)

    def report(self) -> None:
        """Records the interval that `defer` gave, if there is one.

        Raises:
            Diverged: MAX_SKIPPED_STEPS steps in a row were skipped, or the last ones of the run.
        """
        if self.pending is None:
            return
        (step, sums), self.pending = self.pending, None
        sums = jax.device_get(sums)
        values = {name: float(total / count) if count else float("nan") for name, (total, count) in sums.items()}
        steps, skipped = step - self.last_step, int(sums["skipped"][0])
        finished = self.clock.take(step)
        values |= {"skipped": skipped, "bad_records": self.bad_records} | self.speed(finished)
        if self.rate is not None:
            values["learning_rate"] = self.rate(step - 1)
        self.loss = self.loss if np.isnan(values["loss"]) else values["loss"]
        self.records.scalars(step, {name: v for name, v in values.items() if not np.isnan(v)})
        facts = f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s"
        facts += f"  {values['mfu']:.1%} MFU" if "mfu" in values else ""
        bad = f"{skipped} OF {steps} STEPS SKIPPED: not finite" if skipped else ""
        if self.bar is not None:
            self.bar.set_postfix_str(facts)
            if bad:
                say(f"step {step}/{self.num_steps}  {bad}")
        else:
            assert self.first_time is not None and self.last_time is not None  # set by `speed`
            left = (self.last_time - self.first_time) / (step - self.first_step) * (self.num_steps - step)
            say("  ".join(filter(None, (f"step {step}/{self.num_steps}", facts, f"{duration(left)} left", bad))))
        self.last_step = step
        count = self._skipped_before = self._in_a_row(finished)
        if count >= MAX_SKIPPED_STEPS or (count and step == self.num_steps):
            raise Diverged(
                f"the loss, its gradient or the new parameters were not finite for the last {count} steps, up to step {step}",
                step,
                step - count + 1,
            )

    def speed(self, finished: Sequence[Any]) -> dict[str, float]:
        """The fields of a record that the clock gives."""
        if self.first_time is None or self.last_time is None:
            self.first_time = self.last_time = finished[0].dispatched
        # Stalls of the first step lie before first_time; they contain no preview or score.
        previews_and_scores = sum(x.idle["preview"] + x.idle["scoring"] for x in finished)
        seconds = finished[-1].at - self.last_time - previews_and_scores
        self.last_time = finished[-1].at
        images, flops = map(sum, zip(*(self.work_of(x.step - 1) for x in finished), strict=True))
        self.images_per_second = images / seconds
        p50, p99 = np.quantile([x.seconds for x in finished], (0.5, 0.99))
        values: dict[str, float] = {
            "images_per_second": self.images_per_second,
            "step_seconds_p50": float(p50),
            "step_seconds_p99": float(p99),
            "data_wait_seconds": sum(x.waited["data"] for x in finished),
            "checkpoint_seconds": sum(x.waited["checkpoint"] for x in finished),
        }
        if self.peak_flops is not None:
            values["mfu"] = flops / seconds / self.peak_flops
        if (peak := peak_bytes()) is not None:
            values["peak_device_bytes"] = peak
        return values

    def finish(self, step: int) -> None:
        """Ends the bar; records and reports where the time of the run went."""
        self.close()
        times = self.clock.summary()
        self.records.scalars(step, times)
        parts = ", ".join(f"{kind} {times[f'idle_{kind}_seconds']:.1f} s" for kind in KINDS)
        say(f"goodput {times['goodput']:.1%} of {duration(times['wall_seconds'])}; the devices had no steps during {parts}")
