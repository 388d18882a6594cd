"""runtime/watchdog.py: a process that hangs ends by itself and says where; one that works is left alone."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT

from dit_jax.errors import UserError
from dit_jax.runtime import console, phases, watchdog
from dit_jax.runtime.watchdog import LIMITS, Watchdog

HANG = """
import multiprocessing, sys, threading, time
from pathlib import Path
from dit_jax.runtime import phases, watchdog
from dit_jax.runtime.step_clock import StepClock

class Output:
    def block_until_ready(self):
        if self.hangs:
            threading.Event().wait()

def collective_that_waits_for_a_dead_peer(output):
    output.block_until_ready()

watchdog.LEAVE_SECONDS = 1.0
output, clock = Output(), StepClock()
output.hangs = False
with clock, watchdog.Watchdog(0.8, Path(sys.argv[1])), phases.phase("step"):
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
@pytest.mark.parametrize("disk", ["works", "hangs"])
def test_a_hanging_run_ends(tmp_path, disk):
    """A process that waits for a dead peer for ever, without a trace of where; a long preview taken for a hang; a watchdog that
    hangs itself, because it writes to the disk that does."""
    if disk == "hangs":
        os.mkfifo(tmp_path / "stacks.txt")  # opening it waits for a reader
    process = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path / "stacks.txt")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 75, process.stderr
    said, worker = process.stdout.splitlines()
    assert said == "still here" and not running(int(worker))
    for text in (process.stderr, *([(tmp_path / "stacks.txt").read_text()] if disk == "works" else [])):
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


@pytest.fixture
def ended(monkeypatch):
    """Reasons for which watchdogs have ended the process, in place of its end; `wait` waits for the first."""

    class Reasons(list):
        def wait(self):
            deadline = time.monotonic() + 10
            while not self and time.monotonic() < deadline:
                time.sleep(0.001)
            return self[0]

    reasons = Reasons()
    monkeypatch.setattr(Watchdog, "_end", lambda self, told, reason: reasons.append(reason))
    return reasons


@pytest.mark.parametrize("name", LIMITS)
def test_every_phase_has_a_limit(ended, name):
    """A phase in which a hang lasts for ever, or that ends before its own limit."""
    start = time.monotonic()
    with Watchdog(0.02) as watching, phases.phase(name):
        assert ended.wait().startswith(f"{LIMITS[name][1]} for ")
    assert time.monotonic() - start >= watching.limit(name) >= 0.02


def test_what_advances_is_left_alone(ended):
    """A sampler that is ended although images come; a process that is ended outside of every phase, or after a phase for what
    it took before."""
    with Watchdog(0.1) as watching:
        time.sleep(0.15)
        with phases.phase("sampling"), phases.phase("step"):
            progress = console.Progress("images", 1_000)
            for done in range(12):
                time.sleep(0.02)
                progress.update(done)
        time.sleep(0.15)
    assert not ended and watching.limit("sampling") > 0.1


def test_signs_of_life_of_another_phase_do_not_count(ended):
    """A loader that waits for its data, and so hides that the step hangs."""
    with Watchdog(0.05), phases.phase("step"):
        while not ended:
            phases.beat("data")
            time.sleep(0.001)
    assert "no step" in ended[0]


def test_retried_data_has_more_time():
    """A run that is ended while its loader waits for a storage that may come back."""
    watching = Watchdog(10.0, more={"data": 300.0})
    assert watching.limit("data") == 310 and watching.limit("step") == 10


def test_a_stopped_process_gets_its_time_again(ended, monkeypatch):
    """A run that is ended because the user pressed Ctrl-Z and went to lunch."""
    late = threading.Event()
    real = time.monotonic

    class Clock:
        sleep = staticmethod(time.sleep)

        @staticmethod
        def monotonic():
            return real() + (1_000 if late.is_set() else 0)

    for module in (watchdog, phases):
        monkeypatch.setattr(module, "time", Clock)
    with Watchdog(1.0), phases.phase("step"):
        time.sleep(0.1)
        late.set()
        time.sleep(0.6)  # two looks
    assert not ended


class Service:
    """Stands for JAX's coordination service."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite):
        self.values[key] = value

    def key_value_try_get(self, key):
        return self.values[key]

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


def test_a_process_that_hangs_tells_the_others():
    """Processes that wait for ever for one that has ended, or that end without a word about which it was."""
    service, leaving, told = Service(), threading.Event(), []
    with phases.phase("preview"):
        peers = [watchdog.Peers(service, i, 2, 0.01, leaving, lambda *args, i=i: told.append((i, *args))) for i in range(2)]
        deadline = time.monotonic() + 10
        while len(service.values) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not told
        assert peers[0].busy() == ["preview"]
        assert "process 1 was heard of 0 s ago (preview)" in peers[0].tell("process 0 of 2: no step has finished")
        while not any(i == 1 for i, *_ in told) and time.monotonic() < deadline:
            time.sleep(0.001)
    assert (1, True, "process 0 of 2: no step has finished") in told
    leaving.set()
    while not all(watchdog.GONE in value for key, value in service.values.items() if "alive" in key):
        assert time.monotonic() < deadline


def test_a_process_waits_for_another_one_at_work(ended):
    """Processes that end because one of them compiles, restores or draws for longer than a step may take."""
    watching = Watchdog(0.05)
    watching._peers = SimpleNamespace(busy=lambda: ["step", "compile"])
    start = time.monotonic()
    with watching, phases.phase("step"):
        assert "no step" in ended.wait()
    assert time.monotonic() - start >= watching.limit("compile") > watching.limit("step")


def test_a_process_that_died_is_named(monkeypatch):
    """A process that fails because its peer was killed, and names nobody; or that names one which has left in order."""
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(time=time.time, sleep=lambda seconds: None))
    service, leaving = Service(), threading.Event()
    leaving.set()
    peers = watchdog.Peers(service, 0, 4, 1.0, leaving, None)
    for index, name, age in ((1, "step", 30), (2, watchdog.GONE, 30), (3, "step", 0)):
        service.values[f"{watchdog.KEY}/alive/{index}"] = json.dumps([name, time.time() - age])
    assert peers.silent() == "process 1 of 4 does not respond any more"
    monkeypatch.setattr(service, "key_value_dir_get", lambda folder: 1 / 0)
    assert peers.silent() == "process 0 does not respond any more"


def test_negative_limit():
    """A limit that ends every run at once, or none."""
    with pytest.raises(UserError, match="at least 0"):
        Watchdog(-1.0)
