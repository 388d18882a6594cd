"""training/step_clock.py: times of steps that the devices, not the host, decide."""

import threading
import time

import pytest

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


def dispatch(clock, step):
    output = Output()
    clock.dispatched(step, time.monotonic(), output)
    return output


def test_devices_busy_and_idle():
    """Time between two calls taken for the time of a step; a wait that hides behind the devices' work counted as theirs."""
    clock = StepClock()
    with clock:
        with clock.spend("compile"):
            time.sleep(0.1)
        first = dispatch(clock, 11)
        with clock.spend("data"):
            time.sleep(0.05)
        second = dispatch(clock, 12)  # at once, while the first runs
        with clock.spend("data"):
            time.sleep(0.1)
            first.finish()
            clock.wait(11)
            time.sleep(0.1)
            second.finish()
            clock.wait(12)
            time.sleep(0.2)  # now there is nothing to do
        third = dispatch(clock, 13)
        time.sleep(0.05)
        third.finish()
        one, two, three = clock.take(13)
        assert (one.step, two.step, three.step) == (11, 12, 13) and clock.take(13) == []
        with clock.spend("checkpoint"):
            time.sleep(0.1)
        found = clock.summary()
    near = 0.04
    assert one.seconds == pytest.approx(0.15, abs=near) and two.seconds == pytest.approx(0.1, abs=near)
    assert three.seconds == pytest.approx(0.05, abs=near)
    assert two.waited["data"] == pytest.approx(0.05, abs=near) and two.idle["data"] == 0
    assert three.waited["data"] == pytest.approx(0.4, abs=near) and three.idle["data"] == pytest.approx(0.2, abs=near)
    assert found["idle_compile_seconds"] == pytest.approx(0.1, abs=near) and found["idle_init_seconds"] < near
    assert found["idle_checkpoint_seconds"] == pytest.approx(0.1, abs=near)
    idle = sum(seconds for name, seconds in found.items() if name.startswith("idle_"))
    assert idle + found["goodput"] * found["wall_seconds"] == pytest.approx(found["wall_seconds"], abs=1e-6)


def test_wait_holds_the_loop_back():
    """A loop that runs away from its devices and fills their memory with batches."""
    with StepClock() as clock:
        first = dispatch(clock, 1)
        threading.Timer(0.1, first.finish).start()
        start = time.monotonic()
        clock.wait(0)
        assert time.monotonic() - start < 0.05
        clock.wait(1)
        assert time.monotonic() - start > 0.09


def test_a_failed_step_is_raised_in_the_loop():
    """An error of the devices that ends a thread, and leaves the loop waiting for ever."""
    with StepClock() as clock:
        dispatch(clock, 1).finish(RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            clock.wait(1)
