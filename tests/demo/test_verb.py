"""The verb as a user starts and stops it."""

import contextlib
import json
import re
import signal
import subprocess
import sys

import pytest
import tiny
from demo_client import Client
from runs import save_run
from verbs import ROOT, command, environment

from dit_jax import recipes

pytestmark = pytest.mark.slow
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling takes longer than drawing
# As the verb is started, in an environment without the package.
WITHOUT = """
import runpy, sys
sys.modules["starlette"] = None
sys.argv[0] = "dit_jax/demo/__main__.py"
runpy.run_module("dit_jax.demo", run_name="__main__")
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "run"
    save_run(path, tiny.config(model__depth=1, process=recipes.flow(), sampler=recipes.default_sampler("euler")), 0)
    return path


@contextlib.contextmanager
def started(workdir):
    """(process, client) of a demo that is open."""
    args = command("demo", f"--workdir={workdir}", "--port=0")
    process = subprocess.Popen(
        args, cwd=ROOT, env=environment() | QUICK, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"open http://127\.0\.0\.1:(\d+)/", line):
                break
        else:
            pytest.fail("".join(lines))
        yield process, Client(int(found[1]))
    finally:
        process.kill()
        process.communicate()


def test_the_demo_stops(workdir):
    """Catches a server that ends by the signal, that waits for a long drawing, or that crashes while the device still draws; a
    taken port that is told after the weights were read."""
    with started(workdir) as (process, client):
        other = call(command("demo", f"--workdir={workdir}", f"--port={client.port}"))
        assert other.returncode == 2 and "give another --port, or --port=0" in other.stderr and "warning" not in other.stderr
        assert len(client.draw(num_images=3, num_steps=2)) == 3
        _, job = client.ask(sampler="sde", num_steps=1000, num_images=64)
        client.until(job["id"], "drawing")
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1]) == {"url": f"http://127.0.0.1:{client.port}/", "images": 3, "step": 1}
    assert "Traceback" not in stderr and "Fatal" not in stderr


def test_a_missing_package():
    """Catches a stack trace where the extra is not installed."""
    process = call([sys.executable, "-c", WITHOUT, "--workdir=none"])
    assert process.returncode == 2 and "needs the package starlette: pip install 'dit_jax[demo]'" in process.stderr
    assert "Traceback" not in process.stderr


def call(args):
    return subprocess.run(args, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
