"""Training on batches of several shapes: every step has its bucket's shape, and a resume or another number of hosts no effect."""

import dataclasses
import subprocess
import time
from types import SimpleNamespace

import bucketed
import jax
import numpy as np
import pytest
import tiny
from bucketed import SHAPES
from paths import ROOT
from verbs import command, quick_environment

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.parallel.mesh import make_mesh
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.tasks.state import abstract_state
from dit_jax.training import batches, setup
from dit_jax.training.loop import train


def config(**overrides):
    return bucketed.config(**overrides)


def leaves(result):
    return [np.asarray(x) for x in jax.tree.leaves((result.state.params, result.state.ema_params, result.state.opt_state))]


def test_every_step_has_its_bucket(tmp_path, monkeypatch):
    """Batches of one shape only; steps that take another bucket after a resume; parameters that differ from one long run."""
    shapes, real, compiled = [], batches.shard_batch, []

    def sharded(mesh, batch):
        shapes.append(batch["image"].shape)
        return real(mesh, batch)

    def compile_once(*args):
        compiled[:] = compiled or [compile_in_background(*args)]
        return compiled[0]

    compile_in_background = setup.compile_in_background
    monkeypatch.setattr(batches, "shard_batch", sharded)
    monkeypatch.setattr(setup, "compile_in_background", compile_once)
    whole = train(tiny.run_on_one_device(config()), tmp_path / "whole")
    order = whole.run.buckets.cycle
    wanted = [SHAPES[order.at(step)[0]] for step in range(6)]
    wanted = [(batch, height, width, 1) for _, height, width, batch, _ in wanted]
    assert shapes == wanted and len(set(shapes)) == 2
    shapes.clear()
    for steps in (2, 6):
        resumed = train(tiny.run_on_one_device(config(num_steps=steps)), tmp_path / "run")
    assert shapes == wanted
    for a, b in zip(leaves(resumed), leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_of_a_bucket_is_the_step_of_its_own_run():
    """A bucket whose step is compiled with the shape, the noise or the batch size of another."""
    run = tiny.run_on_one_device(config())
    for part, (_, height, width, size, _) in zip(run.parts, SHAPES, strict=True):
        assert part.image_shape == (height, width, 1) and part.abstract_batch["image"].shape == (size, height, width, 1)
        assert part.task == dataclasses.replace(run.task, image_shape=part.image_shape, latent_shape=part.latent_shape)


def test_speed_counts_the_examples_of_each_step():
    """Images per second, or MFU, of one bucket for all."""
    run = tiny.run_on_one_device(config())
    work = setup.Training.work_of(SimpleNamespace(run=run), run.buckets)
    assert [work(step)[0] for step in range(3)] == [16, 8, 16]
    assert [work(step)[1] for step in range(2)] == [6 * part.config.batch_size * part.task.macs() for part in run.parts]


TWO = ((1, 8, 8, 16), (1, 8, 12, 4))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"transform__resolution": 6}, "transform makes 6x6, which is none of buckets.classes"),
        ({"batch_size": 12}, "batch_size is 12, and the bucket of the transform's size, 1x8x8, has batches of 16"),
        ({"buckets__classes": ((1, 8, 8, 16), (1, 8, 9, 4))}, "bucket 1x8x9: "),
        ({"buckets__classes": TWO, "microbatches": 8}, "bucket 1x8x12: batch_size 4 is not a multiple"),
        ({"buckets__classes": ((1, 8, 8, 16), (4, 8, 8, 4))}, "the field frames.*set transform.name to clip"),
        ({"buckets__classes": (*TWO, (1, 16, 8, 4))}, "none of the 60 examples belongs to the bucket 1x16x8"),
    ],
)
def test_buckets_that_do_not_fit(overrides, message):
    """A bucket that fails when its first step comes, hours later."""
    with pytest.raises(UserError, match=message):
        tiny.run_on_one_device(config(**overrides)).loader


@pytest.mark.slow
@pytest.mark.faults
def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    """Buckets that begin again after a kill -9 in the middle of a cycle."""
    (tmp_path / "config.py").write_text("import bucketed\n\n\ndef get_config():\n    return bucketed.config()\n")
    fields = ("num_steps=40", "checkpoint.every_steps=7", "log.every_steps=10", "evaluation.num_images=0")
    environment = quick_environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    final = []
    for name, kills in (("whole", 0), ("killed", 2)):
        workdir = tmp_path / name
        saves = workdir / "checkpoints"
        start = command("main", f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}", *(f"--config.{x}" for x in fields))
        for life in range(kills + 1):
            with open(tmp_path / "log", "w") as log:
                process = subprocess.Popen(start, cwd=ROOT, env=environment, stdout=log, stderr=log)
            while process.poll() is None and life < kills and not (saves / str(7 * (2 * life + 1))).exists():
                time.sleep(0.01)
            if life < kills:
                process.kill()
            process.wait(200)
        assert process.returncode == 0, (tmp_path / "log").read_text()
        state = state_of(tmp_path / name)
        final.append([np.asarray(x) for x in jax.tree.leaves((state.params, state.ema_params, state.opt_state))])
    for a, b in zip(*final, strict=True):
        np.testing.assert_array_equal(a, b)


def state_of(workdir):
    """The last state of a run."""
    with Checkpointer(workdir / "checkpoints", every_steps=1) as checkpointer:
        state, _ = checkpointer.restore(abstract_state(build.Run(config()).task, make_mesh(1, 1, 1, jax.devices()[:1])))
    assert int(state.step) == 40
    return state
