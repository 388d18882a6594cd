"""A run and its data: worker processes that outlive it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from paths import ROOT
from verbs import command, environment

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def below(pid):
    """The processes that a process has started, and theirs."""
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += map(int, task.read_text().split())
    return children + [other for child in children for other in below(child)]


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_a_killed_run(tmp_path):
    """Workers of the data loader that live on after kill -9 of their run, and hold its memory and files in /dev/shm."""
    args = ["--config=digits", f"--workdir={tmp_path / 'run'}", "--config.loader.num_workers=2", "--config.num_steps=100000"]
    args += ["--config.model.depth=1", "--config.model.width=64", "--config.preview.every_steps=0", "--config.log.every_steps=5"]
    shared, log = set(os.listdir("/dev/shm")), tmp_path / "log"
    with log.open("w") as stderr:
        run = subprocess.Popen(command("main", *args), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists() or "loss" not in (tmp_path / "run" / "metrics.jsonl").read_text():
            assert run.poll() is None, log.read_text()
            time.sleep(0.1)
        children = below(run.pid)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert len(children) >= 2
    made = set(os.listdir("/dev/shm")) - shared
    end = time.monotonic() + 10
    while (any(map(lives, children)) or made & set(os.listdir("/dev/shm"))) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [child for child in children if lives(child)]
    assert not made & set(os.listdir("/dev/shm"))
