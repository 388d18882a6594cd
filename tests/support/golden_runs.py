"""Runs verbs for the golden tests: by the command line alone, on one simulated device, with fixed compiler options.

Nothing here imports dit_jax: golden values must outlive its modules.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

# Each verb runs in a fork of one process that has imported the libraries. No fork changes what another one computes.
FORK = """
import importlib, json, os, runpy, sys
for name in ("jax", "flax.linen", "optax", "orbax.checkpoint", "grain", "ml_collections", "tensorboardX", "sklearn.datasets",
             "PIL.Image", "matplotlib"):
    importlib.import_module(name)
results = []
for name, *args in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        for number, file in ((1, "out"), (2, "err")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = [name, *args]
        runpy.run_module(f"dit_jax.{name}", run_name="__main__")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append((status, open("out").read(), open("err").read()))
    if status:
        break
print(json.dumps(results))
"""


def run(folder: Path, calls, timeout: int = 1800, environment: dict[str, str] | None = None) -> list[dict]:
    """The JSON results of the calls [verb, *flags], run in sequence in the folder, where `configs/` is linked.

    environment: variables in addition.

    Raises:
        AssertionError: a verb failed; with its command and its stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    # Golden numbers are compared closely, so the compiler's options and the number of devices are always the same.
    # GOLDEN_XLA_FLAGS=--xla_cpu_max_isa=AVX2 shows how much a number depends on the machine's rounding.
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": os.environ.get("GOLDEN_XLA_FLAGS", ""),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    env |= environment or {}
    calls = [[str(word) for word in call] for call in calls]
    process = subprocess.run(
        [sys.executable, "-c", FORK, json.dumps(calls)], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert process.returncode == 0, process.stderr
    outcomes = json.loads(process.stdout.splitlines()[-1])
    for call, (status, _, stderr) in zip(calls, outcomes, strict=False):
        assert status == 0, f"exit status {status}: python -m dit_jax.{' '.join(call)}\n{stderr[-4000:]}"
    return [json.loads(stdout.splitlines()[-1]) for _, stdout, _ in outcomes]


def overrides(fields: dict) -> list[str]:
    """{"model.width": 32} -> ["--config.model.width=32"]."""
    return [f"--config.{path}={value}" for path, value in fields.items()]


def records(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl that hold a loss."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]
