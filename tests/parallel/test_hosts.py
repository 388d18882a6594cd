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
