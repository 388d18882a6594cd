"""Two real processes, one of which hangs in a preview: both end with their stacks and status 75."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow

CONFIG = """
import os, signal, sys, time
import tiny
from dit_jax.runtime import watchdog
from dit_jax.training import samples


def hangs_in_a_preview(*args):
    {how}
    return 0.0


if "--process_id=1" in sys.argv:
    samples.Samples.preview = hangs_in_a_preview
watchdog.LIMITS = {{name: (1.0 if name in ("preview", "step") else 10.0, text) for name, (_, text) in watchdog.LIMITS.items()}}


def get_config():
    return tiny.config(preview__every_steps=2, preview__num_images=4, log__watchdog_seconds=6.0, loader__retry_seconds=0.0)
"""


def run(folder, how, grace):
    """(status, stderr of process 0, of process 1) of two processes, the second of which does this in its first preview."""
    (folder / "config.py").write_text(CONFIG.format(how=how))
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "dit_jax.main", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"]
    launcher = [sys.executable, "launch/local.py", "--devices=1", f"--grace={grace}", f"--logs={folder}", "--", *command]
    process = subprocess.run(launcher, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    return process.returncode, process.stderr, (folder / "process_1.log").read_text()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("time.sleep(1000)", id="sleeps"),
        pytest.param("os.kill(os.getpid(), signal.SIGSTOP)", id="is_stopped", marks=pytest.mark.exhaustive),
    ],
)
def test_a_process_that_hangs_ends_with_its_peer(tmp_path, how):
    """Processes that wait for ever for one another; one that ends with a status that no supervisor restarts, or without saying
    which process it waited for; a launcher that waits for a process that is stopped."""
    status, first, second = run(tmp_path, how, grace=5)
    assert status == 75, first + second
    assert "watchdog: process 0 of 2: " in first and "for 6 s" in first and "hangs_in_a_preview" in second, first + second
    if "sleep" in how:
        assert "watchdog: process 1 of 2: " in second
    assert "process 1 was heard of" in first or "process 0 was heard of" in second


@pytest.mark.exhaustive
def test_a_process_that_is_killed_is_named(tmp_path):
    """A process that ends with an error of a collective, and does not say which peer died."""
    status, first, second = run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", grace=30)
    assert status == 137 and "Traceback" in first, first + second
    assert "process 0 of 2: process 1 of 2 does not respond any more" in first, first
