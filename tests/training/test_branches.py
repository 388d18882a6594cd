"""A new run that begins from a checkpoint of another one, and a run that goes back in place."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

import dit_jax
from dit_jax import build
from dit_jax.config_file import of_run, plain
from dit_jax.errors import UserError
from dit_jax.report import collect
from dit_jax.storage import branch_record, divergences, rewinds
from dit_jax.storage.atomic import write_json
from dit_jax.storage.run_folder import Workdir, differences, read_config
from dit_jax.storage.step_folder import read_record
from dit_jax.tasks import state as states
from dit_jax.training import branch, setup
from dit_jax.training.loop import train
from dit_jax.training.meter import Diverged
from dit_jax.training.setup import Begin

SMALL = {"model__depth": 1, "checkpoint__every_steps": 1, "checkpoint__keep_last": 9, "optimizer__warmup_steps": 2}


def config(**fields):
    return tiny.config(**SMALL | fields)


def folder_of(path, steps=(1, 2, 4), **fields):
    """A folder with the config of a run and empty checkpoints."""
    for step in steps:
        (path / "checkpoints" / str(step)).mkdir(parents=True)
    write_json(path / "config.json", plain(config(**fields)))
    return path


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def begin(source, workdir, changed, **arguments):
    """The state of a branch that is trained in this process, without results."""
    begins = branch.opened(source, workdir, **arguments)
    begins.check_config(changed)
    return train(build.Run(changed), workdir, begin=Begin(begins)).state


@pytest.mark.slow
def test_a_branch_of_a_run(tmp_path, monkeypatch):
    """Catches keys, batches, a schedule or an average that begin again at a branch; a branch that reads its parent later on."""
    source = tmp_path / "a"
    parent = train(build.Run(config(num_steps=6)), source).state
    with monkeypatch.context() as patch:
        patch.setattr(setup.StopSignal, "requested", lambda self, step: step == 4)
        assert int(begin(source, tmp_path / "b", config(num_steps=6), step=3).step) == 4
    assert not equal(begin(source, tmp_path / "c", config(num_steps=6, optimizer__learning_rate=1e-3), step=3), parent)

    muon = config(num_steps=4, optimizer={"name": "muon", "learning_rate": 1e-3, "warmup_steps": 9}, averages=("0.5",))
    with pytest.raises(UserError, match=r"optimizer\.name: 'adamw' -> 'muon'\); give --reset_optimizer .* at step 3"):
        begin(source, tmp_path / "d", muon, step=3)
    assert not (tmp_path / "d").exists()
    begins = branch.opened(source, tmp_path / "d", 3, reset_optimizer=True)
    run = build.Run(muon)
    begun = begins.restore(run)
    assert equal(begun.averages["0_5"], begun.params) and not equal(begun.ema_params, begun.params)
    counts = [int(x) for x in jax.tree.leaves(begun.opt_state) if not x.ndim]
    assert sorted(set(counts)) == [0, 3]  # of the moments, and of the schedule
    assert int(train(run, tmp_path / "d", begin=Begin(begins)).state.step) == 4
    shutil.rmtree(source)
    assert equal(begin(source, tmp_path / "b", config(num_steps=6), step=3), parent)
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) == 3 and max(steps) == 6
    assert collect.read(tmp_path / "c").branch[-1] == "optimizer.learning_rate: 0.002 -> 0.001"


@pytest.mark.slow
def test_a_run_that_goes_back(tmp_path, capsys):
    """Catches a rewind that ends with other bits, keeps the old result, or is done again by a supervisor."""

    def saved(step):
        return read_record(epath.Path(tmp_path / "run" / "checkpoints" / str(step)))[1]

    fields = {"evaluation__num_images": 8, "evaluation__reference": "", "sampler__num_steps": 1}
    first = dit_jax.train(config(num_steps=4, **fields), tmp_path / "run")
    record = saved(4)
    again = dit_jax.train(config(num_steps=4, **fields), tmp_path / "run", rewind=2)
    assert saved(4) == record
    assert again["step"] == 4 and again["samples"] == first["samples"]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["1", "2", "3", "3.abandoned", "4", "4.abandoned"]
    aside = {str(path.relative_to(tmp_path / "run" / "rewound.1")) for path in (tmp_path / "run" / "rewound.1").rglob("*")}
    assert {"result.json", "report.html", "metrics.jsonl", "samples/00000004_final.npz"} <= aside
    assert dit_jax.train(config(num_steps=4, **fields), tmp_path / "run", rewind=2) == again
    assert "the same --rewind and config do not take it back again" in capsys.readouterr().err
    slower = config(num_steps=4, optimizer__learning_rate=1e-4, **fields)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.002 -> 0\.0001"):
        dit_jax.train(slower, tmp_path / "run")
    dit_jax.train(slower, tmp_path / "run", rewind=2)
    assert saved(4) != record
    assert rewinds.lines(tmp_path / "run")[1] == "from step 4 to step 2; optimizer.learning_rate: 0.002 -> 0.0001"


@pytest.mark.parametrize(
    "fields, line",
    [
        ({"process": {"name": "flow"}}, "process.name: 'gaussian' -> 'flow'"),
        ({"process__schedule": "cosine"}, "process.schedule: 'linear' -> 'cosine'"),
        ({"model__width": 64}, "model.width: 32 -> 64"),
        ({"codec__std": 0.5}, "codec.std: 0.75 -> 0.5"),
        ({"transform__resolution": 16}, "transform.resolution: 8 -> 16"),
        ({"conditioner": {"name": "none"}}, "conditioner.name: 'labels' -> 'none'"),
    ],
)
def test_what_a_branch_keeps(tmp_path, fields, line):
    """Catches parameters that are trained on as if they meant something else."""
    begins = branch.opened(folder_of(tmp_path / "a"), tmp_path / "b")
    with pytest.raises(UserError) as caught:
        begins.check_config(config(num_steps=6, **fields))
    assert line in str(caught.value) and str(tmp_path / "a") in str(caught.value)


def test_what_a_branch_may_change(tmp_path):
    """Catches a hyper-parameter that is refused; steps that were trained already."""
    begins = branch.opened(folder_of(tmp_path / "a"), tmp_path / "b")
    free = {"optimizer__b2": 0.95, "seed": 7, "batch_size": 32, "microbatches": 2, "ema_decay": 0.9, "averages": ("0.5",)}
    free |= {"process__min_snr_gamma": 5.0, "task__cond_dropout": 0.2, "transform__flip": True, "model__dtype": "bfloat16"}
    free |= {"mesh__data": 4, "mesh__fsdp": 2, "sampler__num_steps": 9, "guidance__scale": 2.0, "data__split": "train"}
    begins.check_config(config(num_steps=6, **free))
    with pytest.raises(UserError, match=r"num_steps is 4, and the branch begins at step 4 .*; give --config\.num_steps="):
        begins.check_config(config(num_steps=4))


def test_the_checkpoint_of_a_branch(tmp_path):
    """Catches a missing step that is replaced by another; a run that is overwritten by a branch, or a branch by another."""
    source, workdir = folder_of(tmp_path / "a"), tmp_path / "b"
    assert branch.opened(source, workdir).step == 4 and branch.opened(source, workdir, 2).step == 2
    with pytest.raises(UserError, match="has no checkpoint of step 3; the saved steps are: 1, 2, 4"):
        branch.opened(source, workdir, 3)
    with pytest.raises(UserError, match="has no checkpoint; train this run first"):
        branch.opened(folder_of(tmp_path / "new", ()), workdir)
    with pytest.raises(UserError, match=r"is not the --workdir of a dit_jax\.main run"):
        branch.opened(tmp_path / "missing", workdir)
    with pytest.raises(UserError, match="go back in place with --rewind"):
        branch.opened(source, source)
    with pytest.raises(UserError, match="has a run that is no branch; give a new --workdir"):
        branch.opened(source, folder_of(workdir))
    assert not branch.opened(source, workdir, restart=True).begun
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="has a run that is no branch"):
        branch.opened(source, tmp_path / "c")


def test_a_branch_that_is_begun(tmp_path):
    """Catches the same command that is refused, or begins from the step that is the newest by now."""
    source, workdir = folder_of(tmp_path / "a"), tmp_path / "b"
    record = {"run": str(source), "step": 2, "params": "0", "reset_optimizer": False, "changed": {}, "config": {"seed": 5}}
    workdir.mkdir()
    branch_record.write(workdir, record)
    with pytest.raises(UserError, match=r"step 2, that has not begun; give --from=.* --step=2 again"):
        branch.check_unbegun(workdir, None)
    killed = branch.opened(source, workdir)
    assert (killed.step, killed.begun) == (2, False) and branch.opened(source, workdir, 4).step == 4
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    shutil.rmtree(source)
    begun = branch.opened(source, workdir)
    assert (begun.step, begun.begun, begun.config) == (2, True, {"seed": 5})
    branch.check_unbegun(workdir, 2)
    for other in ({"step": 1}, {"reset_optimizer": True}):
        with pytest.raises(UserError, match=r"has a branch of .*a, step 2.*; give a new --workdir"):
            branch.opened(source, workdir, **other)
    with pytest.raises(UserError, match="has a branch of"):
        branch.opened(tmp_path / "other", workdir)


def test_the_config_of_a_branch(tmp_path):
    """Catches a config that differs from the parent's though no field is given; a field that cannot be set after a None."""
    stored = read_config(folder_of(tmp_path / "a", averages=("0.5", "power:0.1"), optimizer__decay_steps=None))
    assert plain(of_run(stored)) == stored
    changed = of_run(stored, ["optimizer.decay_steps=1e3", "optimizer.clip_norm=None", "averages=('0.9',)"])
    assert (changed.optimizer.decay_steps, changed.optimizer.clip_norm, changed.averages) == (1000, None, ("0.9",))
    assert of_run(stored, ["optimizer.name=muon"]).optimizer.name == "muon"
    with pytest.raises(UserError, match="has no field learning_rat"):
        of_run(stored, ["optimizer.learning_rat=1"])


def test_the_codec_of_a_branch(tmp_path):
    """Catches a branch that cannot begin because the codec of its parent was moved, though the parent has a copy."""
    begins = branch.opened(folder_of(tmp_path / "a"), tmp_path / "b")
    moved = tiny.digits_latent(tmp_path / "moved")
    assert begins.with_codec(moved).codec.path == str(tmp_path / "moved")
    (tmp_path / "a" / "codec").mkdir()
    assert begins.with_codec(moved).codec.path == str(tmp_path / "a" / "codec")
    assert begins.with_codec(tiny.digits_latent(tmp_path)).codec.path == str(tmp_path)
    assert "path" not in begins.with_codec(config()).codec


def test_the_counts_of_a_new_optimizer_state():
    """Catches moments whose bias is corrected by the count of the schedule, after a start with another schedule."""
    counts = {"learning_rate": 1e-3, "warmup_steps": 5}
    old, new = (build.construct("optimizer", {"name": "adamw", **fields}) for fields in (counts, counts | {"clip_norm": 1.0}))
    params = {"kernel": jnp.ones((2, 3))}
    moments, rest, schedule = old.init(params)
    begun = (moments._replace(count=jnp.int32(2)), rest, schedule._replace(count=jnp.int32(9)))
    moments, _, schedule = states.with_structure(begun, new.init(params))[1]
    assert (int(moments.count), int(schedule.count)) == (2, 9)
    constant = build.construct("optimizer", {"name": "adamw", "learning_rate": 1e-3})
    assert [int(x) for x in jax.tree.leaves(states.with_structure(begun, constant.init(params))) if not x.ndim] == [2]


def test_when_a_run_goes_back(tmp_path):
    """Catches a step that is not saved, a supervisor that goes back for ever, a rewind that stays half done."""
    run, saved = folder_of(tmp_path / "run", num_steps=6), [1, 2, 4]
    with pytest.raises(UserError, match=r"--rewind=3: .* has no checkpoint of this step; the saved steps are: 1, 2, 4"):
        rewinds.decided(run, 3, True, saved)
    assert rewinds.decided(run, None, True, saved) is None and rewinds.decided(run, 2, True, saved) == 2
    settings = plain(config(num_steps=6, optimizer__learning_rate=1e-4))
    with pytest.raises(UserError, match=r"learning_rate"), Workdir(run, settings):
        pass
    with Workdir(run, settings, back=2):
        (entry,) = rewinds.read(run)
        assert (entry["to"], entry["newest"], entry["done"]) == (2, 4, False)
        assert entry["changed"] == {"optimizer.learning_rate": [0.002, 0.0001]}
    assert rewinds.decided(run, None, True, [1, 2]) == 2  # after a kill, whatever the next command is
    with pytest.raises(UserError, match=r"to step 2 was interrupted; let it finish with --rewind=2"):
        rewinds.decided(run, 1, True, saved)
    rewinds.finish(run)
    assert rewinds.decided(run, 2, True, saved) is None and rewinds.decided(run, 2, False, saved) == 2
    assert rewinds.decided(run, 1, True, saved) == 1 and "config" not in rewinds.read(run)[0]
    before = read_config(run)
    with Workdir(run, plain(config(num_steps=6)), back=1):
        rewinds.cancel(run)
    assert not differences(before, read_config(run)) and len(rewinds.read(run)) == 1


def test_what_a_rewind_sets_aside(tmp_path):
    """Catches results of later steps that stay, results of earlier ones or files of users that go, a copy that is overwritten."""
    rewinds.begin(tmp_path, 2, 4, {}, {})
    later = ["result.json", "report.html", "samples/00000004.png", "samples/00000003_final.npz", "scores/00000004.json"]
    stays = ["samples/00000002.png", "samples/real.png", "samples/mine_4.png", "scores/00000002.json", "scores/reference.npz"]
    for name in [*later, *stays, "scores/best.json", "metrics.jsonl", "samples/00000004_final.shards/0.npz"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"step": 4}')
    rewinds.set_aside(tmp_path, 2)
    (tmp_path / "metrics.jsonl").write_text("shorter")
    rewinds.set_aside(tmp_path, 2)
    aside = tmp_path / "rewound.1"
    assert all((aside / name).exists() and not (tmp_path / name).exists() for name in [*later, "scores/best.json"])
    assert (aside / "samples/00000004_final.shards/0.npz").exists() and all((tmp_path / name).exists() for name in stays)
    assert (aside / "metrics.jsonl").read_text() == '{"step": 4}'


def test_a_damaged_step_to_go_back_to(tmp_path, monkeypatch):
    """Catches a run that can never start again, or has another config, because it was to go back to a damaged checkpoint."""
    monkeypatch.setattr(setup, "compile_in_background", lambda *args: None)
    run = folder_of(tmp_path / "run", (2, 4), num_steps=6)  # whose checkpoints are empty
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="cannot go back to step 2, and nothing is changed: no valid checkpoint"):
        train(build.Run(config(num_steps=6, optimizer__learning_rate=1e-4)), run, begin=Begin(rewind=2))
    assert json.loads((run / "rewinds.json").read_text()) == [] and (run / "checkpoints" / "4").is_dir()
    assert all(read_config(path.parent) == json.loads(text) for path, text in before.items())


def test_arguments_that_do_not_fit(tmp_path):
    """Catches an argument that is ignored."""
    for text, arguments in {
        "restart begins the run again": {"restart": True, "rewind": 1},
        "from_ begins a new run": {"from_": tmp_path, "rewind": 1},
        "belong to from_": {"step": 1},
        "config is None": {},
    }.items():
        with pytest.raises(UserError, match=text):
            dit_jax.train(None if "None" in text else config(), tmp_path / "b", **arguments)


@pytest.mark.exhaustive
def test_a_branch_that_diverges_at_once(tmp_path):
    """Catches a branch that begins at step 0 with random numbers when it goes on with another rate."""
    source = tmp_path / "a"
    train(build.Run(config(num_steps=2)), source)
    wild = {"num_steps": 4, "optimizer__warmup_steps": 0, "optimizer__clip_norm": 1e9}
    with pytest.raises(Diverged, match="from step 2, the last"):
        begin(source, tmp_path / "b", config(optimizer__learning_rate=1e18, **wild), step=2)
    state = begin(source, tmp_path / "b", config(optimizer__learning_rate=1e-3, **wild), step=2)
    assert int(state.step) == 4 and divergences.read(tmp_path / "b")[0]["continued_from"] == 2
