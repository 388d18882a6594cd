"""Runs the verbs as a user does, in processes; returns exit status and output."""

import json
import os
import signal
import subprocess
import sys
import threading

from paths import ROOT

# Runs verbs and Python, each in a fork of one process that has imported the libraries: a start costs a second instead of six.
FORKED = """
import json, os, runpy, sys, traceback
import dit_jax.convert.formats, dit_jax.training.loop, sklearn.datasets

def run(call):
    if isinstance(call, str):
        exec(compile(call, "<text>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = call
        runpy.run_module(f"dit_jax.{call[0]}", run_name="__main__")

def forked(call, environment={}):
    child = os.fork()
    if not child:
        for number, file in ((1, "out"), (2, "err")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(environment)
        status = 0
        try:
            run(call)
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
    return status, open("out").read(), open("err").read()
"""
FORK = FORKED + "print(json.dumps([forked(call) for call in json.loads(sys.argv[1])]))"
SERVE = (
    FORKED
    + """
for line in sys.stdin:
    folder, *call = json.loads(line)
    os.chdir(folder)
    print(json.dumps(forked(*call)), flush=True)
"""
)


def quick_environment():
    """Compiles as conftest.py does: quickly rather than well, and what several processes compile alike only once."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def start(args, cwd):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=quick_environment(), capture_output=True, text=True, timeout=300
    )


class Forks:
    """Runs calls, one after another, in forks of one process; a context manager."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            env=quick_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *exc_info):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def __call__(self, folder, call, environment=None, timeout=300.0):
        """(exit status, stdout, stderr) of a call [verb, *args], or of Python as one string, in the folder."""
        timer = threading.Timer(timeout, os.killpg, (self._process.pid, signal.SIGKILL))
        timer.start()
        try:
            self._process.stdin.write(json.dumps([str(folder), call, environment or {}]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        assert line, f"{call} took more than {timeout:g} s, or ended the process that forks"
        return json.loads(line)


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
