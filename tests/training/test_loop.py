import errno
import gc
import importlib.util
import json
import shutil
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import dit_jax
from dit_jax import build
from dit_jax.config_file import plain
from dit_jax.data.sources import Digits
from dit_jax.errors import NotFinite, TemporaryFailure, UserError
from dit_jax.storage import divergences
from dit_jax.storage.atomic import write_json
from dit_jax.storage.run_folder import Workdir
from dit_jax.tasks.diffusion import DiffusionTask
from dit_jax.training import batches, setup
from dit_jax.training.events import Preview
from dit_jax.training.loop import train
from dit_jax.training.meter import Diverged
from dit_jax.training.records import Records
from dit_jax.training.stepper import Stepper


def leaves(run):
    return [np.asarray(x) for x in jax.tree.leaves(run.state)]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps without a break."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return train(build.Run(tiny.config(num_steps=6)), workdir), workdir


def test_six_steps_are_three_and_three(whole, tmp_path):
    """State that a checkpoint forgets, a batch or key that depends on how often the run was started; bit for bit."""
    first = train(build.Run(tiny.config(num_steps=3)), tmp_path / "run")
    assert int(first.state.step) == 3 and not first.stopped
    second = train(build.Run(tiny.config(num_steps=6)), tmp_path / "run")
    for a, b in zip(leaves(second), leaves(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(tmp_path / "run")[-1] == losses(whole[1])[-1]
    steps = [step for step, _ in losses(tmp_path / "run")]
    assert steps == sorted(set(steps))


def test_compiles_while_the_state_is_made(tmp_path, monkeypatch):
    """A step that is compiled only once the state is there, so that a start takes the sum of both times."""
    compiled, background, create = threading.Event(), setup.compile_in_background, setup.Training.restore_or_create

    def compiling(*args):
        program = background(*args)
        program.add_done_callback(lambda _: compiled.set())
        return program

    def creating(*args):
        assert compiled.wait(120)
        return create(*args)

    monkeypatch.setattr(setup, "compile_in_background", compiling)
    monkeypatch.setattr(setup.Training, "restore_or_create", creating)
    assert int(train(build.Run(tiny.config(num_steps=1)), tmp_path / "run").state.step) == 1


def test_nothing_to_train_compiles_nothing(whole, monkeypatch):
    """A finished run that compiles its step again at every start."""
    compiled = []
    monkeypatch.setattr(setup, "compile_in_background", lambda *args: compiled.append(args))
    assert int(train(build.Run(tiny.config(num_steps=6)), whole[1]).state.step) == 6 and not compiled


@pytest.mark.slow
def test_goes_on_from_a_crash(whole, tmp_path, monkeypatch):
    """Records of lost steps that stay in the curve; a crash that leaves the folder locked or unusable."""
    real, calls = batches.shard_batch, []

    def crash(mesh, batch):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("power cut")
        return real(mesh, batch)

    monkeypatch.setattr(batches, "shard_batch", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(build.Run(tiny.config(num_steps=6, log__every_steps=1)), tmp_path / "run")
    run = train(build.Run(tiny.config(num_steps=6, log__every_steps=1)), tmp_path / "run")
    for a, b in zip(leaves(run), leaves(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.exhaustive
def test_goes_on_on_another_mesh(whole, tmp_path):
    """A checkpoint that can only be restored onto the mesh that wrote it."""
    train(build.Run(tiny.config(num_steps=3, mesh__fsdp=4, mesh__tensor=2)), tmp_path / "run")
    run = train(build.Run(tiny.config(num_steps=6, mesh__fsdp=2)), tmp_path / "run")
    assert tiny.distance(run.state.ema_params, whole[0].state.ema_params) < 1e-3


@pytest.mark.slow
def test_stop_signal_saves(tmp_path, monkeypatch):
    """SIGTERM that loses steps: the state must be saved at the step that was reached, and the run must say it stopped."""
    monkeypatch.setattr(setup.StopSignal, "requested", lambda self, step: step == 2)
    run = train(build.Run(tiny.config(num_steps=6)), tmp_path / "run")
    assert run.stopped and (tmp_path / "run" / "checkpoints" / "2").is_dir()
    monkeypatch.undo()
    assert int(train(build.Run(tiny.config(num_steps=4)), tmp_path / "run").state.step) == 4


def test_finished_run_trains_no_more(whole):
    """A second call of a finished run that trains on, or fails."""
    run = train(build.Run(tiny.config(num_steps=6)), whole[1])
    for a, b in zip(leaves(run), leaves(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_keeps_its_records(whole):
    """A second call of a finished run that loses the loss; a call with fewer steps that rewrites the config."""
    again = train(build.Run(tiny.config(num_steps=6)), whole[1])
    assert again.loss == pytest.approx(whole[0].loss) and again.images_per_second == pytest.approx(whole[0].images_per_second)
    with pytest.raises(UserError, match="has 6 steps and num_steps is 5; give --config"):
        train(build.Run(tiny.config(num_steps=5)), whole[1])
    assert json.loads((whole[1] / "config.json").read_text())["num_steps"] == 6


@pytest.mark.slow
def test_a_longer_decay_when_resuming(whole, tmp_path, capsys):
    """Steps with a learning rate of 0 that change nothing; a finished decay that can never be extended."""
    shutil.copytree(whole[1], tmp_path / "run")
    fixed = {"optimizer__warmup_steps": 2, "optimizer__decay_steps": 6}
    with pytest.raises(UserError, match=r"decay_steps is 6 and num_steps is 7: the learning rate would be 0 after step 6; set"):
        train(build.Run(tiny.config(num_steps=7, **fixed)), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_steps"] == 6
    train(build.Run(tiny.config(num_steps=7)), tmp_path / "run")
    assert "optimizer.decay_steps: 6 -> 7, for the steps from here on" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows if "loss" in row][-1] == pytest.approx(2e-3 * 7 / 100)


@pytest.mark.slow
def test_diverged_run_stops(tmp_path, monkeypatch):
    """A run that goes on with NaN for days, or one bad step that ends it."""
    monkeypatch.setattr(DiffusionTask, "loss", nan_loss(DiffusionTask.loss))
    with pytest.raises(Diverged, match=r"not finite for the last 1\d steps"):
        train(build.Run(tiny.config(num_steps=30)), tmp_path / "run")


@pytest.mark.slow
def test_a_diverged_run_goes_on_with_the_rate_that_it_advises(tmp_path, capsys):
    """29 of 30 steps skipped, status 0; then a lower rate refused as another config, or tried on the state that diverged."""
    fields = {"num_steps": 6, "model__depth": 1, "checkpoint__every_steps": 1, "optimizer__warmup_steps": 0}
    folder, wild = tmp_path / "run", {"optimizer__learning_rate": 1e18, "optimizer__clip_norm": 1e9}
    train(build.Run(tiny.config(**fields | {"num_steps": 3})), folder)
    (folder / "config.json").unlink()  # as if a typing mistake had come in between
    write_json(folder / "config.json", plain(tiny.config(**fields | wild)))
    with pytest.raises(Diverged, match=r"for the last 2 steps, up to step 6; start the same command again .* from step 3, the"):
        train(build.Run(tiny.config(**fields | wild)), folder)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["2", "3", "4"]  # 4 is what diverged
    with pytest.raises(UserError, match=r"optimizer.b1: 0.9 -> 0.5\Z"):
        train(build.Run(tiny.config(**fields, optimizer__b1=0.5)), folder)
    run = train(build.Run(tiny.config(**fields, optimizer__clip_norm=None)), folder)
    assert int(run.state.step) == 6 and np.isfinite(run.loss)
    said = "from step 3 on it has optimizer.learning_rate: 1e+18 -> 0.002; optimizer.clip_norm: 1000000000.0 -> None"
    assert said in capsys.readouterr().err
    assert "4.abandoned" in [p.name for p in (folder / "checkpoints").iterdir()]
    (entry,) = divergences.read(folder)
    assert (entry["step"], entry["first_skipped"], entry["continued_from"]) == (6, 5, 3)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.002 -> 0\.001"):  # it has not diverged again
        train(build.Run(tiny.config(**fields, optimizer__learning_rate=1e-3, optimizer__clip_norm=None)), folder)


@pytest.mark.exhaustive
def test_a_run_that_diverged_at_once_begins_again(tmp_path, monkeypatch):
    """A lower rate that starts from the only checkpoint, which is what diverged; a kill after that which blocks the folder."""
    fields = {"num_steps": 3, "model__depth": 1, "checkpoint__every_steps": 1, "optimizer__warmup_steps": 0}
    folder, wild = tmp_path / "run", {"optimizer__learning_rate": 1e18, "optimizer__clip_norm": 1e9}
    with pytest.raises(Diverged, match=r"for the last 2 steps, up to step 3; .* from step 0"):
        train(build.Run(tiny.config(**fields | wild)), folder)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["1"]
    monkeypatch.setattr(setup.Training, "start", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(build.Run(tiny.config(**fields)), folder)
    monkeypatch.undo()
    run = train(build.Run(tiny.config(**fields)), folder)
    assert int(run.state.step) == 3 and np.isfinite(run.loss)
    assert [entry["continued_from"] for entry in divergences.read(folder)] == [0]


@pytest.mark.exhaustive
def test_a_schedule_that_goes(tmp_path):
    """A finished decay that can never be extended to a constant rate: the checkpoint is said to have another optimizer."""
    fields = {"model__depth": 1, "optimizer__warmup_steps": 0}
    train(build.Run(tiny.config(num_steps=2, **fields)), tmp_path / "run")
    run = train(build.Run(tiny.config(num_steps=4, optimizer__decay_steps=None, **fields)), tmp_path / "run")
    assert [int(x) for x in jax.tree.leaves(run.state.opt_state) if not x.ndim] == [4]


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"model__param_dtype": "float16"}, "model.param_dtype is 'float16'; .*param_dtype=float32, and .*dtype=bfloat16"),
        ({"model__param_dtype": "bfloat16"}, "model.param_dtype is 'bfloat16'"),
        ({"model__dtype": "float16"}, "model.dtype is 'float16'"),
    ],
)
def test_dtypes_that_lose_updates(tmp_path, fields, text):
    """79 % of the weights never moved, or 99.5 % became NaN, without a word."""
    with pytest.raises(UserError, match=text):
        train(build.Run(tiny.config(**fields)), tmp_path / "run")
    with pytest.raises(UserError, match=r"codec\.param_dtype is 'bfloat16'"):
        build.check_dtypes(tiny.autoencoder(codec={"param_dtype": "bfloat16"}))


def nan_loss(real):
    def loss(self, *args, **kwargs):
        value, parts = real(self, *args, **kwargs)
        return value * np.nan, {name: part * np.nan for name, part in parts.items()}

    return loss


def test_a_rate_of_zero_of_another_optimizer(tmp_path):
    """Steps that change nothing, with an optimizer that the package does not know."""

    def run(rate):
        config = tiny.config(optimizer={"name": "mine"}, num_steps=6)
        return SimpleNamespace(config=config, optimizer=SimpleNamespace(rate=rate))

    with pytest.raises(UserError, match="optimizer 'mine' has a learning rate of 0 after step 4, and num_steps is 6"):
        setup.check_steps(run(lambda step: max(0, 4 - step)), 0, tmp_path)
    setup.check_steps(run(lambda step: step), 0, tmp_path)


def test_other_config_is_refused(whole):
    """A folder that silently goes on with another model, data set or seed."""
    with pytest.raises(UserError, match=r"model.width: 32 -> 64(.|\n)*seed: 0 -> 1"):
        train(build.Run(tiny.config(model__width=64, seed=1)), whole[1])


def test_other_data_is_refused(whole, monkeypatch):
    """A data set that changed under the run."""
    monkeypatch.setattr("dit_jax.data.sources.digits.fingerprint", lambda **facts: "another")
    with pytest.raises(UserError, match="data set has changed"):
        train(build.Run(tiny.config(num_steps=8)), whole[1])


def test_one_process_at_a_time(tmp_path):
    """Two processes that write checkpoints into one folder."""
    with (
        Workdir(tmp_path / "run", plain(tiny.config())),
        pytest.raises(UserError, match="another command"),
        Workdir(tmp_path / "run", plain(tiny.config())),
    ):
        pass


@pytest.mark.parametrize(
    "overrides, text",
    [
        ({"batch_size": 12}, "not a multiple of mesh.data x mesh.fsdp"),
        ({"mesh__data": 16}, "there are 8"),
        ({"model__num_classes": 9}, "--config.model.num_classes=10"),
        ({"data__name": "folder", "data__path": "/nowhere"}, "does not exist"),
        ({"data__name": "folder", "data__path": "", "data__split": ""}, "data.path is empty"),
        ({"data__split": "val"}, "no split"),
        ({"preview__every_steps": 5, "preview__num_images": 0}, "preview.num_images is 0"),
        ({"log__every_steps": 0}, "log.every_steps is 0"),
        ({"log__watchdog_seconds": -1.0}, "watchdog_seconds is -1.0"),
        ({"profile__num_steps": 9}, "do not lie within 0 to num_steps = 6"),
        ({"seed": -1}, "seed is -1"),
        ({"optimizer__decay_steps": 5}, "learning rate would be 0 after step 5"),
        ({"log__wandb": "digits"}, "pip install wandb"),
        ({"model__mlp_ratio": -1.0}, "mlp_ratio is -1.0; it must be positive"),
        ({"loader__num_threads": 0}, "num_threads=0"),
    ],
)
def test_refused_before_any_work(tmp_path, monkeypatch, overrides, text):
    """A mistake that leaves a half-made workdir behind."""
    if "log__wandb" in overrides:  # which a machine may have
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=text):
        train(build.Run(tiny.config(**overrides)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batches_of_several_epochs_and_flat_folders_are_reported(tmp_path, capsys):
    """A batch of 4096 on 1,797 images without a word; two remedies, of which one is the other, for a folder without classes."""
    build.Run(tiny.config(batch_size=4096)).loader
    assert "each batch of 4096 holds 2.3 epochs" in capsys.readouterr().err
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"no classes and .* is 10; pass --config\.model\.num_classes=0 to train without labels$"):
        build.Run(tiny.config(data={"name": "folder", "path": str(tmp_path), "split": ""})).loader


def test_a_failed_start_binds_nobody(tmp_path):
    """A folder that refuses the corrected config because a start failed before its first checkpoint."""
    with Workdir(tmp_path / "run", plain(tiny.config(seed=5))):
        pass
    with Workdir(tmp_path / "run", plain(tiny.config())) as folder:
        assert json.loads((folder.path / "config.json").read_text())["seed"] == 0


def test_a_folder_that_cannot_be_made(tmp_path):
    """A stack trace for a mistyped --workdir."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), Workdir(tmp_path / "file" / "run", plain(tiny.config())):
        pass


def test_preview_and_records(tmp_path):
    """A preview that is not written, is not from the step it names, or is missing from the TensorBoard events."""
    train(build.Run(tiny.config(num_steps=2, preview__every_steps=2, preview__num_images=20)), tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "00000002.png").is_file()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["width"] == 32
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "loss" in row]
    assert {
        "loss",
        "mse",
        "vb",
        "grad_norm",
        "images_per_second",
        "skipped",
        "loss_t0.00",
        "data_wait_seconds",
        "checkpoint_seconds",
    } <= row.keys()
    assert 0 < row["step_seconds_p50"] <= row["step_seconds_p99"]
    compiled, _, shown, last = rows
    assert compiled["compile_seconds"] > 0 and shown["preview_seconds"] > 0
    assert 0 < last["goodput"] < 1 and last["idle_preview_seconds"] > 0.5 * shown["preview_seconds"]


def test_a_preview_that_is_not_finite():
    """A run that ends because its preview holds NaN, or a black grid in its place."""

    class Results:
        def preview(self, *args):
            raise NotFinite("3 of 4 images hold NaN")

    records, meter = Records("unused"), SimpleNamespace(report=lambda: None)
    Preview(Results(), meter, records, None, None, 1, 1)(1, None)
    assert records.dropped["previews"] == 1


@pytest.mark.slow
def test_a_preview_that_cannot_be_written(tmp_path):
    """A run that ends because of a picture."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").touch()
    run = train(build.Run(tiny.config(num_steps=2, preview__every_steps=1, preview__num_images=4)), tmp_path / "run")
    assert int(run.state.step) == 2 and not run.stopped and run.dropped == {"previews": 2}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_data_that_goes_away(whole, tmp_path, monkeypatch, capsys):
    """Steps that are lost with the data, a status that says "your mistake", or another end after the data is back."""
    real, reads = Digits.__getitem__, []

    def read(self, index):
        reads.append(index)
        if len(reads) > 4 * 16:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, index)

    config = {"num_steps": 6, "checkpoint__every_steps": 100, "loader__retry_seconds": 0.1}
    monkeypatch.setattr(Digits, "__getitem__", read)
    with pytest.raises(TemporaryFailure, match=r"cannot be read any more, after 0\.1 s"):
        train(build.Run(tiny.config(**config)), tmp_path / "run")
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name in "1234" and f"saving step {saved.name}" in capsys.readouterr().err
    monkeypatch.undo()
    for a, b in zip(leaves(train(build.Run(tiny.config(**config)), tmp_path / "run")), leaves(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("damage", ["removed", "emptied", "set aside"])
def test_a_run_without_its_checkpoints_is_refused(whole, tmp_path, damage):
    """A finished run that is trained afresh, over its metrics, because its checkpoints are gone."""
    shutil.copytree(whole[1], tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        if damage == "set aside":
            step.rename(f"{step}.corrupt")
        else:
            shutil.rmtree(step)
    if damage == "removed":
        (tmp_path / "run" / "checkpoints").rmdir()
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match=r"has none that can be used; .*--restart, which renames the folder to run\.1"):
        train(build.Run(tiny.config(num_steps=6)), tmp_path / "run")
    assert files(tmp_path / "run") == before


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path):
    """A run that can never be started again: it has a config and metrics, and never had a checkpoint."""
    with Workdir(tmp_path / "run", plain(tiny.config())):
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2, "time": 1.0, "loss": 1.0}\n')
    assert int(train(build.Run(tiny.config(num_steps=1)), tmp_path / "run").state.step) == 1


@pytest.mark.slow
def test_restart(whole, tmp_path, capsys):
    """A second training that deletes or changes the first, or goes on from its checkpoints."""
    shutil.copytree(whole[1], tmp_path / "run")
    (tmp_path / "run.1").mkdir()
    before = files(tmp_path / "run")
    fields = {"num_steps": 1, "seed": 3}
    result = dit_jax.train(tiny.config(**fields), tmp_path / "run", restart=True)
    assert result["step"] == 1 and files(tmp_path / "run.2") == before and not list((tmp_path / "run.1").iterdir())
    assert f"the run that was in {tmp_path / 'run'} is now in {tmp_path / 'run.2'}" in capsys.readouterr().err


def test_other_random_numbers_are_refused(whole):
    """A run that goes on with other random numbers, because an environment variable is set or missing."""
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        with pytest.raises(UserError, match=r"jax_default_prng_impl: 'threefry2x32' -> 'rbg' .*JAX_DEFAULT_PRNG_IMPL"):
            train(build.Run(tiny.config(num_steps=8)), whole[1])
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")


@pytest.mark.exhaustive
def test_memory_after_a_restore(whole, tmp_path, monkeypatch):
    """A restore that leaves a second copy of the state alive while the first step runs, for which there is no memory."""
    shutil.copytree(whole[1], tmp_path / "run")
    call, bytes_at_first_step = Stepper.__call__, []

    def first_step(self, batch):
        monkeypatch.setattr(Stepper, "__call__", call)
        bytes_at_first_step.append(sum(x.nbytes for x in jax.live_arrays()))
        before = jax.tree.leaves(self.state)
        output = call(self, batch)
        assert all(x.is_deleted() for x in before)
        return output

    gc.collect()
    others = sum(x.nbytes for x in jax.live_arrays())
    for name, num_steps in (("fresh", 1), ("run", 7)):
        monkeypatch.setattr(Stepper, "__call__", first_step)
        train(build.Run(tiny.config(num_steps=num_steps)), tmp_path / name)
        gc.collect()
    fresh, restored = (size - others for size in bytes_at_first_step)
    assert restored < 1.05 * fresh
