"""Runs the verbs as a user does, in processes; returns exit status and output."""

import json
import os
import subprocess
import sys

from paths import ROOT

# Runs many verbs, each in a fork of one process that has imported the libraries: a start costs a second instead of six.
FORK = """
import json, os, runpy, sys, traceback
import dit_jax.convert.formats, dit_jax.training.loop, sklearn.datasets
results = []
for name, *args in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        for number, file in ((1, "out"), (2, "err")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, status = [name, *args], 0
        try:
            runpy.run_module(f"dit_jax.{name}", run_name="__main__")
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            print(*[ended.code] if isinstance(ended.code, str) else [], end="", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # taking the interpreter down costs more than a verb that refuses
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append((status, open("out").read(), open("err").read()))
print(json.dumps(results))
"""


def start(args, cwd):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # as in conftest.py: compiling takes longer than running here
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def run_verbs(folder, calls):
    """[(exit status, stdout, stderr)] of calls [name, *args], run in the folder, where `configs/` is linked."""
    (folder / "configs").symlink_to(ROOT / "configs")
    process = start(["-c", FORK, json.dumps(calls)], folder)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def refused(outcome, text):
    status, _, stderr = outcome
    assert status not in (0, None) and text in stderr and "Traceback" not in stderr, stderr
    assert len(stderr.strip().splitlines()) <= 6


def command(verb, *args):
    return [sys.executable, "-m", f"dit_jax.{verb}", *map(str, args)]


def environment():
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}


def run(verb, *args):
    """(result, stderr) of a verb that succeeds, with XLA's optimizations as users have them."""
    process = subprocess.run(command(verb, *args), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), process.stderr
