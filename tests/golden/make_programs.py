"""Writes programs.json: what the compiled training step and sampler compute, move, send and hold, as `dit_jax.plan` counts it.

    PYTHONPATH=tests/support python tests/golden/make_programs.py [NAME ...]

Nothing is run: libtpu compiles for TPU slices on a machine without one (pip install 'dit_jax[plan]'). Named programs replace
their part of the file. The numbers hold for the versions of the compiler that the file names. Record again after an upgrade,
or when a change of the program is wanted, and say in the commit what it gains.
"""

import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path

from golden_runs import GOLDEN, overrides, run

FILE = GOLDEN / "programs.json"
CACHE = {"data.name": "latents"}
DIGITS = {
    "batch_size": 64,
    "model.patch_size": 2,
    "model.depth": 4,
    "model.width": 128,
    "model.heads": 4,
    "evaluation.batch_size": 64,
}
NOISE = DIGITS | {"process.prediction": "noise"}
VAE = {
    "batch_size": 64,
    "task.discriminator_weight": 0.5,
    "task.discriminator.base_features": 16,
    "task.discriminator.num_layers": 1,
    "task.discriminator.norm_groups": 8,
}
# name: (topology, config, fields).
PROGRAMS = {
    "digits, v5e:2x2, data=2 tensor=2": ("v5e:2x2", "digits.py:sampler=ddpm", NOISE | {"mesh.data": 2, "mesh.tensor": 2}),
    "XL/2, v5e:4x4, fsdp=16": ("v5e:4x4", "xl2_imagenet256.py", CACHE | {"mesh.fsdp": 16}),
    "S/2, v5e:2x2, data=4": ("v5e:2x2", "s2_imagenet256.py", CACHE | {"mesh.data": 4}),
    "S/2, v5e:2x2, data=2 tensor=2": ("v5e:2x2", "s2_imagenet256.py", CACHE | {"mesh.data": 2, "mesh.tensor": 2}),
    "digits, cpu:8, data=2 fsdp=2 tensor=2": (
        "cpu:8",
        "digits.py:sampler=ddpm",
        NOISE | {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    ),
    "digits, cpu:8, fsdp=4 sequence=2": (
        "cpu:8",
        "digits.py:sampler=ddpm",
        NOISE | {"mesh.data": 1, "mesh.fsdp": 4, "mesh.sequence": 2},
    ),
    "digits, cpu:8, zero1": ("cpu:8", "digits.py:sampler=ddpm", NOISE | {"mesh.data": 2, "mesh.fsdp": 4, "mesh.zero1": True}),
    "in-context flow, cpu:8, microbatches": (
        "cpu:8",
        "digits.py:process=flow,conditioning=in_context",
        DIGITS | {"mesh.data": 8, "microbatches": 2},
    ),
    "autoencoder, cpu:8, fsdp=4": ("cpu:8", "vae_digits.py", VAE | {"mesh.data": 2, "mesh.fsdp": 4}),
}
# Of the others the sampler is not compiled: for a TPU it takes minutes.
WITH_SAMPLER = ("digits, cpu:8, data=2 fsdp=2 tensor=2", "in-context flow, cpu:8, microbatches")
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_FLAGS": ""}
PACKAGES = ("jax", "jaxlib", "libtpu")
TRAINING = (
    "flops_per_step",
    "executed_flops",
    "hbm_traffic_bytes",
    "collective_bytes",
    "collectives",
    "memory",
    "bytes_per_device",
    "host_bytes_per_device",
    "unknown_loops",
    "remat",
    "fits",
)
SAMPLER = ("executed_flops", "collective_bytes", "bytes_per_device", "sampler", "evaluations", "batch_size", "fits")


def versions() -> dict[str, str | None]:
    """Installed versions of what compiles; None for what is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def numbers(names: list[str]) -> dict[str, dict]:
    """{name: {"training": ..., "sampler": ...}} of programs, from the last lines that the verb prints.

    Raises:
        AssertionError: it failed.
    """
    calls = []
    for name in names:
        topology, config, fields = PROGRAMS[name]
        sampler = f"--sampler={name in WITH_SAMPLER}"
        calls.append(["plan", f"--config=configs/{config}", f"--topology={topology}", "--traffic", sampler, *overrides(fields)])
    with tempfile.TemporaryDirectory() as folder:
        plans = run(Path(folder), calls, 3600, ENVIRONMENT)
    found = {}
    for name, plan in zip(names, plans, strict=True):
        found[name] = {"training": {key: plan[key] for key in TRAINING} | {"kernels": kernels(plan["traffic"])}}
        if plan["sampler"]:
            found[name]["sampler"] = {key: plan["sampler"][key] for key in SAMPLER}
    return found


def kernels(traffic: list[dict]) -> dict[str, dict[str, int]]:
    """{kind: how many run, and the bytes that they move}, without the places, which have the names of modules."""
    found = {}
    for row in traffic:
        kind = found.setdefault(row["kind"], {"kernels": 0, "bytes": 0})
        kind["kernels"] += row["kernels"]
        kind["bytes"] += row["bytes"]
    return dict(sorted(found.items()))


def main():
    golden = json.loads(FILE.read_text()) if FILE.exists() else {"versions": versions(), "programs": {}}
    if golden["versions"] != versions() and sys.argv[1:]:
        sys.exit(f"the file was recorded with {golden['versions']} and {versions()} is installed: record all of it")
    golden["versions"] = versions()
    names = sys.argv[1:] or PROGRAMS
    for name in names:
        start = time.monotonic()
        golden["programs"] |= numbers([name])
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        golden["programs"] = {name: golden["programs"][name] for name in PROGRAMS if name in golden["programs"]}
        FILE.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
