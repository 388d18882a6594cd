"""Times of steps that the devices, not the host, decide."""

import threading
from types import SimpleNamespace

import pytest

from dit_jax.runtime import step_clock
from dit_jax.runtime.step_clock import StepClock


class Output:
    """Stands for an array of a step; `finish` is the device."""

    def __init__(self):
        self.done, self.error = threading.Event(), None

    def block_until_ready(self):
        assert self.done.wait(10)
        if self.error is not None:
            raise self.error
        return self

    def finish(self, error=None):
        self.error = error
        self.done.set()


def dispatch(clock, step, when=0.0):
    output = Output()
    clock.dispatched(step, when, output)
    return output


def test_devices_busy_and_idle(monkeypatch):
    """Time between two calls taken for the time of a step; a wait that hides behind the devices' work counted as theirs."""
    now = [0.0]
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def after(seconds):
        now[0] += seconds

    clock = StepClock()
    with clock:
        with clock.spend("compile"):
            after(1)
        first = dispatch(clock, 11, now[0])
        with clock.spend("data"):
            after(0.5)
        second = dispatch(clock, 12, now[0])  # at once, while the first runs
        with clock.spend("data"):
            after(1)
            first.finish()
            clock.wait(11)
            after(1)
            second.finish()
            clock.wait(12)
            after(2)  # now there is nothing to do
        third = dispatch(clock, 13, now[0])
        after(0.5)
        third.finish()
        one, two, three = clock.take(13)
        assert (one.step, two.step, three.step) == (11, 12, 13) and clock.take(13) == []
        with clock.spend("checkpoint"):
            after(1)
        summary = clock.summary()
    assert (one.seconds, two.seconds, three.seconds) == pytest.approx((1.5, 1, 0.5))
    assert two.waited["data"] == pytest.approx(0.5) and two.idle["data"] == 0
    assert three.waited["data"] == pytest.approx(4) and three.idle["data"] == pytest.approx(2)
    assert summary["idle_compile_seconds"] == pytest.approx(1) and summary["idle_init_seconds"] == 0
    assert summary["idle_checkpoint_seconds"] == pytest.approx(1)
    idle = sum(seconds for name, seconds in summary.items() if name.startswith("idle_"))
    assert idle + summary["goodput"] * summary["wall_seconds"] == pytest.approx(summary["wall_seconds"]) == pytest.approx(7)


def test_wait_holds_the_loop_back():
    """A loop that runs away from its devices and fills their memory with batches."""
    with StepClock() as clock:
        first = dispatch(clock, 1)
        clock.wait(0)  # does not wait for the first step
        assert not first.done.is_set()
        threading.Timer(0.1, first.finish).start()
        clock.wait(1)
        assert first.done.is_set()


def test_a_failed_step_is_raised_in_the_loop():
    """An error of the devices that ends a thread, and leaves the loop waiting for ever."""
    with StepClock() as clock:
        dispatch(clock, 1).finish(RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            clock.wait(1)
