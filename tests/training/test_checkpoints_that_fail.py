"""Real runs whose disk fills up for good: they end by themselves, at once, and keep the last good step."""

import os
import subprocess
import sys
import time

import pytest
import tiny
from paths import ROOT

from dit_jax import build
from dit_jax.storage.checkpoints import Checkpointer

pytestmark = pytest.mark.slow

# The disk is full from step 4 on: for new folders (no inodes), or for files of more than 2 KB.
RUN = """
import errno, os, resource, runpy, signal, sys, time
full, workdir = sys.argv[1:3]
make = os.mkdir

def mkdir(path, *args, **kwargs):
    if full == "folders" and "orbax-checkpoint-tmp" in os.fspath(path) and os.path.exists(f"{workdir}/checkpoints/2"):
        raise OSError(errno.ENOSPC, "No space left on device", os.fspath(path))
    make(path, *args, **kwargs)

def requested(self, step):
    while step == 3 and not os.path.exists(f"{workdir}/checkpoints/2"):
        time.sleep(0.01)
    if full == "files" and step == 3:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    return False

os.mkdir = mkdir
from dit_jax.runtime import signals
signals.StopSignal.requested = requested
sys.argv = ["dit_jax/main.py", f"--config={workdir}.py", f"--workdir={workdir}"]
runpy.run_module("dit_jax.main", run_name="__main__")
"""


@pytest.mark.parametrize("full", ["folders", pytest.param("files", marks=pytest.mark.exhaustive)])
def test_three_failed_checkpoints_end_the_run_at_once(tmp_path, full):
    """A process that lingers for 300 s after its error, while threads of Orbax wait for a folder; a good step that is lost."""
    (tmp_path / "run.py").write_text(
        "import tiny\n\n\ndef get_config():\n    return tiny.config(num_steps=1000, checkpoint__every_steps=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, full, tmp_path / "run"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        lines, said = [], None
        for line in process.stderr:
            lines.append(line)
            if "3 checkpoints in a row could not be saved" in line and said is None:
                said = time.monotonic()
        assert process.wait(timeout=30) == 1 and said is not None, "".join(lines)
    finally:
        process.kill()
    assert time.monotonic() - said < 8
    with Checkpointer(tmp_path / "run" / "checkpoints", every_steps=1) as checkpointer:
        state, _ = checkpointer.restore(build.Run(tiny.config(num_steps=1000, checkpoint__every_steps=2)).abstract_state)
    assert int(state.step) == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
