"""How a process finds the others, or is told that it cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_sample_verb import save_run

from dit_jax.errors import UserError
from dit_jax.parallel import hosts

ROOT = Path(__file__).parent.parent
SLURM = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize("flags, text", [
    ((None, 2, 1), "--coordinator_address must be given too"),
    (("host:1", None, None), "--num_processes and --process_id must be given too"),
    (("host:1", 2, 2), "must lie in 0 to num_processes - 1"),
    (("host", 2, 0), "must be host:port"),
])
def test_flags_that_do_not_fit(flags, text):
    """A process that trains alone, or waits for minutes, because a flag was forgotten."""
    with pytest.raises(UserError, match=text):
        hosts.initialize(*flags)


def detect(monkeypatch, error, environment):
    def initialize(**_):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.initialize()


@pytest.mark.parametrize("error, environment, text", [
    (ValueError("Number of processes must be defined."), {}, "Number of processes"),
    (ValueError("unsupported worker-network-endpoints: coordinator_address"), {}, "worker-network-endpoints"),
    (ValueError("coordinator_address should be defined."), SLURM, "start it with srun"),
])
def test_a_broken_cluster_is_an_error(monkeypatch, error, environment, text):
    """A cluster that is found but cannot be joined, taken for a single machine: every process would write the same folder."""
    with pytest.raises(UserError, match=text):
        detect(monkeypatch, error, environment)


def test_a_failing_detection_is_not_swallowed(monkeypatch):
    """An unreachable coordinator or metadata server taken for a single machine."""
    with pytest.raises(RuntimeError, match="metadata"):
        detect(monkeypatch, RuntimeError("Getting metadata failed"), {})


def test_jax_still_says_that_there_is_no_cluster():
    """A JAX that words it otherwise, after which no single machine could start."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "JAX_COORD"))}
    process = subprocess.run([sys.executable, "-c", "from dit_jax.parallel import hosts; hosts.initialize()"], cwd=ROOT,
                             env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr


def together(processes, folder, verb, *args):
    """stdout of a verb on 8 devices of so many processes."""
    command = [sys.executable, "launch/local.py", f"--processes={processes}", f"--devices={8 // processes}", f"--logs={folder}",
               "--", sys.executable, "-m", f"dit_jax.{verb}", *map(str, args)]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    process = subprocess.run(command, cwd=ROOT, env=environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}, capture_output=True,
                             text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_samples_do_not_depend_on_the_processes(tmp_path):
    """Processes that draw the same images, or whose images come back in another order; a score that is printed twice."""
    save_run(tmp_path / "run", tiny.config(), 0)
    images = []
    for processes in (2, 1):
        out = tmp_path / f"{processes}.npz"
        together(processes, tmp_path, "sample", f"--workdir={tmp_path / 'run'}", "--num_samples=200", "--batch_size=64",
                 f"--out={out}", *(["--fsdp=2"] if processes == 2 else []))
        images.append(np.load(out)["arr_0"].astype(int))
    assert images[0].shape == (200, 8, 8, 1) and images[0].std() > 10
    assert np.abs(images[0] - images[1]).max() <= 1
    said = together(2, tmp_path, "evaluate", f"--samples={out}", "--reference=digits")
    assert len(said.splitlines()) == 1 and json.loads(said)["num_samples"] == 200
    assert not [line for line in (tmp_path / "process_1.log").read_text().splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_restores_in_one(tmp_path):
    """Shards that only their own number of processes can read, in both directions: the losses that follow must agree."""
    fields = ("model.depth=2", "model.width=64", "log.every_steps=3", "checkpoint.every_steps=6", "mesh.fsdp=2",
              "mesh.tensor=4", "preview.every_steps=0", "evaluation.num_images=0")
    losses = []
    for first, second in ((2, 1), (1, 2)):
        workdir = tmp_path / str(first)
        for processes, steps in ((first, 6), (second, 12)):
            together(processes, tmp_path, "main", "--config=configs/digits.py", f"--workdir={workdir}",
                     f"--config.num_steps={steps}", *(f"--config.{field}" for field in fields))
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)
