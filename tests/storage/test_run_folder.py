"""The folder of a run."""

import os

import pytest

from dit_jax.errors import UserError
from dit_jax.storage.atomic import partial_path
from dit_jax.storage.run_folder import Workdir, default_workdir


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
