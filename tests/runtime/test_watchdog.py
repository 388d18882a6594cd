"""training/watchdog.py: a run that hangs ends by itself and says where; one that works is left alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

from dit_jax.errors import UserError
from dit_jax.runtime.step_clock import StepClock
from dit_jax.runtime.watchdog import Watchdog

HANG = """
import multiprocessing, sys, threading, time
from pathlib import Path
from dit_jax.runtime.step_clock import StepClock
from dit_jax.runtime.watchdog import Watchdog

class Output:
    def block_until_ready(self):
        if self.hangs:
            threading.Event().wait()

def collective_that_waits_for_a_dead_peer(output):
    output.block_until_ready()

output, clock = Output(), StepClock()
output.hangs = False
with clock, Watchdog(0.8, Path(sys.argv[1]), clock):
    clock.dispatched(1, time.monotonic(), output)
    clock.wait(1)
    with clock.spend("preview"):
        time.sleep(1.6)
    print("still here", flush=True)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    print(worker.pid, flush=True)
    output.hangs = True
    collective_that_waits_for_a_dead_peer(output)
"""


@pytest.mark.slow
def test_a_hanging_run_ends(tmp_path):
    """A process that waits for a dead peer for ever, without a trace of where; a long preview taken for a hang."""
    process = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path / "stacks.txt")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 75, process.stderr
    said, worker = process.stdout.splitlines()
    assert said == "still here" and not running(int(worker))
    for text in (process.stderr, (tmp_path / "stacks.txt").read_text()):
        assert "collective_that_waits_for_a_dead_peer" in text
    assert "no step has finished for 0.8 s" in process.stderr


def running(pid):
    """Whether a process does more than wait to be buried."""
    for _ in range(50):
        try:
            if (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True


def test_negative_limit():
    """A limit that ends every run at once, or none."""
    with pytest.raises(UserError, match="at least 0"):
        Watchdog(-1.0, Path("x"), StepClock())
