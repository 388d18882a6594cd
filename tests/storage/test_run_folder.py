"""The folder of a run."""

import os

import pytest

from dit_jax.errors import UserError
from dit_jax.storage.atomic import partial_path
from dit_jax.storage.run_folder import Workdir, check_not_lost, default_workdir, set_aside


@pytest.mark.parametrize(
    "config, folder",
    [
        ("configs/xl2_imagenet256.py", "runs/xl2_imagenet256"),
        ("configs/imagenet.py:XL/2,512,latents", "runs/imagenet-XL-2-512-latents"),
        ("digits:process=flow", "runs/digits-process-flow"),
        ("/home/me/net.v2.py:", "runs/net.v2"),
    ],
)
def test_default_workdir(config, folder):
    """Two configs that train in one folder, or a folder in a folder."""
    assert os.fspath(default_workdir(config, 1)) == folder


def test_several_processes_have_no_default():
    """Every host training in a folder of its own."""
    with pytest.raises(UserError, match=r"give --workdir=.* on storage that all hosts share"):
        default_workdir("configs/digits.py", 2)


def test_partial_files_of_a_killed_run_go_and_no_others(tmp_path):
    """Partial pictures and scores that pile up with every kill; a user's file in the run's folder that is deleted."""
    ours = ("config.json", "report.html", "samples/00000040.png", "samples/00000040_final.npz", "samples/real.png")
    ours += ("scores/00000040.json", "scores/best.json", "scores/reference.npz")
    theirs = ("notes.md", "samples/mine.png", "scores/table.csv")
    for name in (*ours, *theirs):
        path = partial_path(tmp_path / name)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "samples" / "00000040.png.partial").touch()  # not of our writer
    kept = [path.name for path in tmp_path.rglob("*.partial") if any(name.split("/")[-1] in path.name for name in theirs)]
    with Workdir(tmp_path, {}):
        assert sorted(path.name for path in tmp_path.rglob("*.partial")) == sorted([*kept, "00000040.png.partial"])


def test_a_run_that_is_set_aside(tmp_path):
    """--restart that deletes, takes the place of something, or renames what is no run or is at work."""
    run = tmp_path / "run"
    with Workdir(run, {}), pytest.raises(UserError, match="another command"):
        set_aside(run)
    (run / "metrics.jsonl").write_text("{}")
    (tmp_path / "run.1").mkdir()
    assert set_aside(run) == tmp_path / "run.2" and not run.exists() and not list((tmp_path / "run.1").iterdir())
    assert sorted(path.name for path in (tmp_path / "run.2").iterdir()) == ["config.json", "metrics.jsonl"]
    assert set_aside(run) is None and set_aside(tmp_path / "run.1") is None
    with pytest.raises(UserError, match="is not the folder of a run"):
        set_aside(tmp_path)
    assert (tmp_path / "run.2").is_dir()


def test_a_run_that_has_lost_its_checkpoints(tmp_path):
    """A run that trains afresh over its records; one that never had a checkpoint and cannot start again; a finished old one."""
    with Workdir(tmp_path / "run", {}) as folder:
        (tmp_path / "run" / "metrics.jsonl").write_text("{}")
        check_not_lost(tmp_path / "run", None)
        folder.note_saved()
        check_not_lost(tmp_path / "run", 3)
        with pytest.raises(UserError, match=r"--restart, which renames the folder to run\.1 and deletes nothing"):
            check_not_lost(tmp_path / "run", None)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result.json").write_text("{}")
    with pytest.raises(UserError, match="has saved checkpoints"):
        check_not_lost(tmp_path / "old", None)
