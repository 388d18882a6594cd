"""Sampling as commands: killed, stopped, on two processes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from paths import ROOT
from runs import save_run

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def begin(folder, out, processes=1, devices=2, steps=50, more=()):
    """`sample` of 400 images on so many processes, whose output goes to files."""
    launcher = ["launch/local.py", f"--processes={processes}", f"--logs={folder}", "--", sys.executable]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "dit_jax.sample",
        f"--workdir={folder / 'run'}",
        "--num_samples=400",
        "--batch_size=32",
        "--chunk_size=8",  # many calls, between which a signal can stop it
        f"--num_steps={steps}",
        f"--out={out}",
        *more,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with open(folder / "out", "w") as stdout, open(folder / "err", "w") as stderr:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)


def finish(folder, *args, status=0, **kwargs):
    process = begin(folder, *args, **kwargs)
    assert process.wait(300) == status, (folder / "err").read_text()


def wait_for_a_shard(process, shards, beyond):
    while process.poll() is None and len(list(shards.glob("*.json"))) <= beyond:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a folder with a run, the bytes of its samples drawn at once by one process on two devices)."""
    folder = tmp_path_factory.mktemp("sampling")
    save_run(folder / "run", tiny.config(model__depth=6, model__width=128), 0)
    finish(folder, folder / "whole.npz")
    return folder, (folder / "whole.npz").read_bytes()


def test_killed_at_random(whole):
    """A half-written shard that is taken for whole, or an npz with other bytes after kills at any moment."""
    folder, expected = whole
    out, rng, kills = folder / "killed.npz", np.random.default_rng(int(time.time())), 0
    for _ in range(3):
        process = begin(folder, out)
        wait_for_a_shard(process, folder / "killed.shards" / "shards", kills)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            process.kill()
            process.wait()
            kills += 1
    assert kills
    finish(folder, out)
    assert out.read_bytes() == expected


@pytest.mark.parametrize("more", [(), ("--fsdp=2", "--num_steps=4")])
def test_two_processes(whole, more):
    """Processes that draw the same images or write each other's shards; a SIGTERM to one that leaves the other at work."""
    folder, expected = whole
    out = folder / f"two{len(more)}.npz"
    shards = folder / f"two{len(more)}.shards" / "shards"
    process = begin(folder, out, 2, 2, more=more)
    wait_for_a_shard(process, shards, 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, (folder / "err").read_text()
    assert json.loads((folder / "out").read_text().splitlines()[-1])["stopped"]
    kept = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.npy")}
    assert 0 < len(kept) < 7 and not out.exists()
    finish(folder, out, 2, 2, more=more)
    if not more:
        assert out.read_bytes() == expected
    else:  # rounded otherwise
        finish(folder, folder / "few.npz", more=more[1:])
        images = [np.load(path)["arr_0"].astype(int) for path in (out, folder / "few.npz")]
        assert np.abs(images[0] - images[1]).mean() < 0.01 and images[0].std() > 10
