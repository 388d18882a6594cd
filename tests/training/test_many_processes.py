"""Two real processes as one program, over Gloo: what one process with all devices does, bit for bit where that can be."""

import dataclasses
import importlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from latents import CODEC, params
from paths import ROOT
from runs import save_run
from verbs import quick_environment

from dit_jax import build
from dit_jax.data.sources import Digits
from dit_jax.encode.writer import Job, encode
from dit_jax.interop.vae import load_diffusers, read_codec, save_diffusers
from dit_jax.parallel.mesh import make_mesh
from dit_jax.pipeline import load
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.tasks.state import abstract_state
from dit_jax.training import loop


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
    environment = quick_environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


# Adam divides by the root of the second moment: a large eps keeps it from blowing rounding up.
RUNS = {
    "diffusion": (
        "config",
        {
            "num_steps": 4,
            "model__depth": 1,
            "log__every_steps": 1,
            "checkpoint__every_steps": 2,
            "optimizer__eps": 1e-3,
            "mesh__fsdp": 2,
            "mesh__tensor": 2,
            "microbatches": 2,
            "scoring__every_steps": 2,
            "scoring__num_images": 70,
            "scoring__sampler__num_steps": 2,
        },
    ),
    "autoencoder": ("autoencoder", {"optimizer__eps": 1e-3, "mesh__fsdp": 4}),
    "buckets": ("bucketed.config", {"optimizer__eps": 1e-3, "mesh__fsdp": 2, "log__every_steps": 1}),
}


def config_of(name, **more):
    make, fields = RUNS[name]
    module, _, function = make.rpartition(".")
    return getattr(importlib.import_module(module or "tiny"), function)(**fields | more)


def trained(folder, name, processes, workdir, **more):
    """Trains a tiny run on 8 devices: of two processes, or of this one."""
    make, fields = RUNS[name]
    fields = fields | more
    if processes == 1:
        loop.train(build.Run(config_of(name, **more)), workdir)
        return
    module, _, function = make.rpartition(".")
    (folder / "config.py").write_text(
        f"import {module or 'tiny'} as made\n\n\ndef get_config():\n    return made.{function}(**{fields})\n"
    )
    together(processes, folder, "main", f"--config={folder / 'config.py'}", f"--workdir={workdir}")


def last_state(name, workdir):
    """The last state of a run, on one device of this process."""
    task = build.Run(config_of(name)).task
    with Checkpointer(workdir / "checkpoints", every_steps=1) as checkpointer:
        state, _ = checkpointer.restore(abstract_state(task, make_mesh(1, 1, 1, jax.devices()[:1])))
    return state


def compare(name, one, two):
    assert two.step == one.step >= 4
    for field in ("params", "ema_params", "opt_state"):
        found, wanted = getattr(two, field), getattr(one, field)
        # Biases before a norm have no gradient: what their moments hold is rounding.
        assert tiny.distance(found, wanted, floor=1e-4 if name == "autoencoder" else 1e-6) < 1e-5, field


@pytest.mark.exhaustive
def test_two_processes_train_an_autoencoder_as_one_does(tmp_path):
    """Hosts that draw the same noise of the posterior, or reduce the discriminator over their own devices alone."""
    for processes in (1, 2):
        trained(tmp_path, "autoencoder", processes, tmp_path / str(processes))
    compare("autoencoder", *(last_state("autoencoder", tmp_path / name) for name in "12"))


@pytest.mark.slow
def test_two_processes_take_the_buckets_of_one(tmp_path):
    """Processes that wait for each other with steps of different buckets, or whose rows together are not the batch."""
    for processes in (1, 2):
        trained(tmp_path, "buckets", processes, tmp_path / str(processes))
    compare("buckets", *(last_state("buckets", tmp_path / folder) for folder in "12"))


@pytest.mark.parametrize(
    "first, second",
    [pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.exhaustive)],
)
def test_two_processes_train_what_one_does(tmp_path, first, second):
    """Hosts that read the same rows, draw the same noise or reduce over their own devices alone, in one half of a run,
    compared array by array; a checkpoint that only their number can restore."""
    trained(tmp_path, "diffusion", 1, tmp_path / "one")
    trained(tmp_path, "diffusion", first, tmp_path / "halves", num_steps=2)
    trained(tmp_path, "diffusion", second, tmp_path / "halves")
    compare("diffusion", *(last_state("diffusion", tmp_path / folder) for folder in ("one", "halves")))
    rows = []
    for folder in ("one", "halves"):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        rows.append([[line[name] for line in lines if name in line] for name in ("loss", "fid")])
    assert [len(values) for values in rows[0]] == [4, 2]
    np.testing.assert_allclose(rows[0][0], rows[1][0], rtol=1e-5)
    np.testing.assert_allclose(rows[0][1], rows[1][1], rtol=1e-3)  # scored while training, each process drawing its share


@pytest.mark.slow
def test_two_processes_write_the_cache_of_one(tmp_path):
    """Processes that encode with another program, write a shard that another one has, or round by the number of their threads,
    which grows with the simulated devices, or by the batch: compared byte for byte."""
    codec = dataclasses.replace(CODEC, image_channels=1)
    save_diffusers(tmp_path / "run" / "codec", codec, params(codec))
    flags = ("--data=digits", "--split=test", f"--codec={tmp_path / 'run'}", "--resolution=8", "--shard_records=50")
    together(2, tmp_path, "encode", *flags, "--device_batch_size=16", f"--out={tmp_path / 'two'}")
    # One process, this one: its 8 devices have twice the threads of those above.
    folder = tmp_path / "run" / "codec"
    stored = read_codec(folder)
    encode(Job(Digits(split="test"), stored, load_diffusers(folder, stored), (8, 8), True, False, 5, 50), tmp_path / "one")
    two, one = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("two", "one"))
    assert len(two) > 6 and two.keys() == one.keys() and [name for name in two if two[name] != one[name]] == []


@pytest.mark.slow
def test_samples_do_not_depend_on_the_processes(tmp_path):
    """Processes that draw the same images, or whose images come back in another order."""
    save_run(tmp_path / "run", tiny.config(), 0)
    flags = (f"--workdir={tmp_path / 'run'}", "--num_samples=200", "--batch_size=64", "--fsdp=2", f"--out={tmp_path / 'x.npz'}")
    together(2, tmp_path, "sample", *flags)
    two = np.load(tmp_path / "x.npz")["arr_0"].astype(int)
    one = load(tmp_path / "run")(num_samples=200, batch_size=64, seed=0).images.astype(int)
    assert two.shape == (200, 8, 8, 1) and two.std() > 10
    assert np.abs(two - one).max() <= 1
