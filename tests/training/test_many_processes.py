"""Two real processes as one program, over Gloo: what one process with all devices does, bit for bit where that can be."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from latents import CODEC, params
from paths import ROOT
from runs import save_run

from dit_jax import build
from dit_jax.interop.vae import save_diffusers
from dit_jax.parallel.mesh import make_mesh
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.tasks.state import abstract_state

pytestmark = pytest.mark.slow


def together(processes, folder, verb, *args, devices=8):
    """stdout of a verb on the devices of so many processes, devices in all."""
    command = [
        sys.executable,
        "launch/local.py",
        f"--processes={processes}",
        f"--devices={devices // processes}",
        f"--logs={folder}",
        "--",
        sys.executable,
        "-m",
        f"dit_jax.{verb}",
        *map(str, args),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT / "tests" / "support")}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


# Adam divides by the root of the second moment: a large eps keeps it from blowing rounding up.
RUNS = {
    "diffusion": (
        "config",
        {
            "optimizer__eps": 1e-3,
            "mesh__fsdp": 2,
            "mesh__tensor": 2,
            "microbatches": 2,
            "scoring__every_steps": 3,
            "scoring__num_images": 70,
            "scoring__sampler__num_steps": 2,
        },
    ),
    "autoencoder": ("autoencoder", {"optimizer__eps": 1e-3, "mesh__fsdp": 4}),
}


def trained(folder, name, processes):
    """The last state of a tiny run, on one device of this process."""
    make, fields = RUNS[name]
    (folder / "config.py").write_text(f"import tiny\n\n\ndef get_config():\n    return tiny.{make}(**{fields})\n")
    workdir = folder / str(processes)
    together(processes, folder, "main", f"--config={folder / 'config.py'}", f"--workdir={workdir}")
    task = build.Run(getattr(tiny, make)(**fields)).task
    with Checkpointer(workdir / "checkpoints", every_steps=1) as checkpointer:
        state, _ = checkpointer.restore(abstract_state(task, make_mesh(1, 1, 1, jax.devices()[:1])))
    return state


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(tmp_path, name):
    """Hosts that read the same rows, draw the same noise or reduce over their own devices alone: compared array by array."""
    two, one = trained(tmp_path, name, 2), trained(tmp_path, name, 1)
    assert two.step == one.step >= 4
    for field in ("params", "ema_params", "opt_state"):
        found, wanted = getattr(two, field), getattr(one, field)
        # Biases before a norm have no gradient: what their moments hold is rounding.
        assert tiny.distance(found, wanted, floor=1e-4 if name == "autoencoder" else 1e-6) < 1e-5, field
    if name == "diffusion":  # scored while training, each process drawing its share
        scores = [json.loads((tmp_path / processes / "scores" / "best.json").read_text()) for processes in "21"]
        assert scores[0]["step"] == scores[1]["step"] and scores[0]["num_samples"] == 70
        assert scores[0]["fid"] == pytest.approx(scores[1]["fid"], rel=1e-3)


def test_two_processes_write_the_cache_of_one(tmp_path):
    """Processes that encode with another program, write a shard that another one has, or round by the number of their threads,
    which grows with the simulated devices, or by the batch: compared byte for byte."""
    codec = dataclasses.replace(CODEC, image_channels=1)
    save_diffusers(tmp_path / "run" / "codec", codec, params(codec))
    caches = []
    for processes, devices, batch in ((2, 8, 16), (1, 4, 16), (1, 8, 5)):
        cache = tmp_path / f"cache{len(caches)}"
        together(
            processes,
            tmp_path,
            "encode",
            "--data=digits",
            "--split=test",
            f"--codec={tmp_path / 'run'}",
            "--resolution=8",
            "--shard_records=50",
            f"--device_batch_size={batch}",
            f"--out={cache}",
            devices=devices,
        )
        caches.append({file.name: file.read_bytes() for file in sorted(cache.iterdir())})
    assert len(caches[0]) > 6
    for other in caches[1:]:
        assert caches[0].keys() == other.keys() and [name for name in other if caches[0][name] != other[name]] == []


def test_samples_do_not_depend_on_the_processes(tmp_path):
    """Processes that draw the same images, or whose images come back in another order; a score that is printed twice."""
    save_run(tmp_path / "run", tiny.config(), 0)
    images = []
    for processes in (2, 1):
        out = tmp_path / f"{processes}.npz"
        together(
            processes,
            tmp_path,
            "sample",
            f"--workdir={tmp_path / 'run'}",
            "--num_samples=200",
            "--batch_size=64",
            f"--out={out}",
            *(["--fsdp=2"] if processes == 2 else []),
        )
        images.append(np.load(out)["arr_0"].astype(int))
    assert images[0].shape == (200, 8, 8, 1) and images[0].std() > 10
    assert np.abs(images[0] - images[1]).max() <= 1
    said = together(2, tmp_path, "evaluate", f"--samples={out}", "--reference=digits")
    results = [line for line in said.splitlines() if line.startswith("{")]  # Gloo writes to stdout too
    assert len(results) == 1 and said.splitlines()[-1] == results[0] and json.loads(results[0])["num_samples"] == 200
    assert not [line for line in (tmp_path / "process_1.log").read_text().splitlines() if line.startswith("{")]


def test_a_checkpoint_of_two_processes_restores_in_one(tmp_path):
    """Shards that only their own number of processes can read, in both directions: the losses that follow must agree."""
    fields = (
        "model.depth=2",
        "model.width=64",
        "log.every_steps=3",
        "checkpoint.every_steps=6",
        "mesh.fsdp=2",
        "mesh.tensor=4",
        "preview.every_steps=0",
        "evaluation.num_images=0",
    )
    losses = []
    for first, second in ((2, 1), (1, 2)):
        workdir = tmp_path / str(first)
        for processes, steps in ((first, 6), (second, 12)):
            together(
                processes,
                tmp_path,
                "main",
                "--config=configs/digits.py",
                f"--workdir={workdir}",
                f"--config.num_steps={steps}",
                *(f"--config.{field}" for field in fields),
            )
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)
