"""How a process finds the others, or is told that it cannot."""

import os
import subprocess
import sys

import jax
import pytest
from paths import ROOT

from dit_jax.errors import UserError
from dit_jax.parallel import hosts

SLURM = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    "flags, text",
    [
        ((None, 2, 1), "--coordinator_address must be given too"),
        (("host:1", None, None), "--num_processes and --process_id must be given too"),
        (("host:1", 2, 2), "must lie in 0 to num_processes - 1"),
        (("host", 2, 0), "must be host:port"),
    ],
)
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


@pytest.mark.parametrize(
    "error, environment, text",
    [
        (ValueError("Number of processes must be defined."), {}, "Number of processes"),
        (ValueError("unsupported worker-network-endpoints: coordinator_address"), {}, "worker-network-endpoints"),
        (ValueError("coordinator_address should be defined."), SLURM, "start it with srun"),
    ],
)
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
    process = subprocess.run(
        [sys.executable, "-c", "from dit_jax.parallel import hosts; hosts.initialize()"],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stderr


TASK = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}


def test_one_task_keeps_all_gpus():
    """One GPU of eight used, without a word, by the only SLURM task of a node; an engine (Ray) that has joined the processes."""
    code = """
import jax
from dit_jax.parallel import hosts
hosts.initialize()
assert jax.distributed.is_initialized()
hosts.initialize()
print(jax.config.values["jax_cuda_visible_devices"])
"""
    environment = os.environ | TASK | {"SLURM_NTASKS": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0 and process.stdout.split() == ["all"], process.stderr


@pytest.mark.parametrize(
    "environment, gpus, kept, said",
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, "0,1,2,3", "all", ""),
        ({"SLURM_NTASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1"}, "0,1,2,3", "all", ""),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}, "0,1", "1", ""),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}, "3", "all", ""),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}, "0,1,2,3", "1", "uses GPU 1, 1 of 4, and the 2 tasks"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "0,1", "all", ""),
        ({"SLURM_NTASKS": "2", "JAX_LOCAL_DEVICE_IDS": "1"}, "0,1,2,3", "1", ""),
        ({}, "0,1,2,3", "1", ""),
    ],
)
def test_gpus_of_a_task(monkeypatch, capsys, environment, gpus, kept, said):
    """Tasks that take all GPUs from one another, or leave some without a word."""
    before = jax.config.values["jax_cuda_visible_devices"]

    def initialize(**_):  # as JAX does for the second task of a node
        jax.config.update("jax_cuda_visible_devices", "1")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_LOCAL"))]:
        monkeypatch.delenv(name)
    for name, value in (environment | {"CUDA_VISIBLE_DEVICES": gpus}).items():
        monkeypatch.setenv(name, value)
    try:
        hosts.initialize()
        assert jax.config.values["jax_cuda_visible_devices"] == kept
    finally:
        jax.config.update("jax_cuda_visible_devices", before)
    error = capsys.readouterr().err
    assert said in error if said else not error
