"""Sweeps whose runs are shared by commands with --part."""

import json

import pytest
from user_files import write
from verbs import ROOT, refused, run_verbs, start

from dit_jax.errors import UserError
from dit_jax.runtime.job_array import Part, parse_part
from dit_jax.sweep import grid, scores
from dit_jax.sweep.folder import Folder
from dit_jax.sweep.grid import Sweep


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def expand():
    return grid.expand(Sweep(title="t", base="configs/digits.py", grid={"model.width": [16, 32]}, seeds=[0, 1]))


def finish(folder, run):
    folder.of(run).mkdir(parents=True)
    (folder.of(run) / "result.json").write_text(json.dumps({"step": run.config.num_steps}))


def test_parts_are_every_nth_item():
    """An item that two parts do, or none."""
    parts = [Part(index, 3) for index in range(3)]
    assert sorted(k for part in parts for k in part.of(10)) == list(range(10)) and list(parts[1].of(10)) == [1, 4, 7]
    assert parse_part("2/3") == parts[2] and parse_part(None) is None
    for text in ("3/3", "-1/3", "1", "1/0", "a/b", "0/3/1", ""):
        with pytest.raises(UserError, match="--part="):
            parse_part(text)


def test_parts_work_at_the_same_time_and_a_part_once(tmp_path):
    """Parts that exclude each other; two commands that train the same runs; parts of different divisions."""
    runs = expand()
    with Folder(tmp_path, "t", Part(0, 2)), Folder(tmp_path, "t", Part(1, 2)) as other:
        assert other.num_parts == 2
        with pytest.raises(UserError, match="training part 1/2"), Folder(tmp_path, "t", Part(1, 2)):
            pass
    with pytest.raises(UserError, match="is shared by 2 parts, and --part=0/3 is of 3"), Folder(tmp_path, "t", Part(0, 3)):
        pass
    with Folder(tmp_path, "t") as whole:
        finish(whole, runs[0])
        with pytest.raises(UserError, match="3 of 4 runs") as error:
            whole.check_parts(runs)
        assert f"--part=0/2: {runs[2].name}\n" in str(error.value)
        assert f"--part=1/2: {runs[1].name}, {runs[3].name}" in str(error.value)
        for run in runs[1:]:
            finish(whole, run)
        whole.check_parts(runs)


def test_a_part_scores_its_own_first_seeds(tmp_path):
    """The second seed of a model scored, because the first is another part's; a model scored by two parts."""
    runs, calls = expand(), []
    folder = Folder(tmp_path, "t")

    class Fake:
        stopping = False

        def run(self, command, log):
            calls.extend(text for text in command if text.startswith("--workdir="))
            return 1, "", 1.0

    for run in runs:
        finish(folder, run)
        (folder.of(run) / "samplers").mkdir()
    first = [run for run in runs if run.config.seed == 0]
    for index in range(2):
        scores.score_all(runs, [("ddim", 5)], folder, Fake(), [runs[k] for k in Part(index, 2).of(4)])
    assert sorted(calls) == sorted(f"--workdir={folder.of(run)}" for run in first)


@pytest.mark.slow
def test_flags_that_are_refused(tmp_path):
    """--part that is ignored; a command that trains the missing runs of other machines."""
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "parts.json").write_text('{"parts": 3}')
    outcomes = run_verbs(
        tmp_path,
        [["sweep", "--sweep=digits", "--workdir=w2", "--part=0/3", "--list"], ["sweep", "--sweep=digits", "--workdir=w"]],
    )
    refused(outcomes[0], "--part=0/3 trains runs here")
    status, _, stderr = outcomes[1]
    assert status == 2 and "--part=2/3: " in stderr and "Traceback" not in stderr


@pytest.mark.exhaustive
def test_parts_and_the_command_that_collects_them(tmp_path):
    """Parts that do not add up to the sweep of one command."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    source = """
        from dit_jax.sweep.grid import Sweep
        def get_sweep():
            fields = {"model.depth": [1], "preview.every_steps": [0], "batch_size": [8], "evaluation.num_images": [40],
                      "sampler.num_steps": [3], "log.every_steps": [2], "num_steps": [4]}
            widths = {"a": {"model.width": 16}, "b": {"model.width": 32}}
            return Sweep(title="tiny", base="configs/digits.py", grid=fields, variants=widths)
        """
    args = ["-m", "dit_jax.sweep", f"--sweep={write(tmp_path / 'tiny.py', source)}"]
    for part in ("0/2", "1/2"):
        ended = start([*args, f"--workdir={tmp_path / 'parts'}", f"--part={part}"], tmp_path)
        assert ended.returncode == 0 and json.loads(ended.stdout.splitlines()[-1])["done"] == 1, ended.stderr
    rows = {}
    for name in ("parts", "one"):
        ended = start([*args, f"--workdir={tmp_path / name}"], tmp_path)
        assert ended.returncode == 0, ended.stderr
        rows[name] = json.loads((tmp_path / name / "results.json").read_text())["runs"]
    assert [row["fid"] for row in rows["parts"]] == [row["fid"] for row in rows["one"]] and len(rows["one"]) == 2
