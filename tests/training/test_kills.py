"""A whole run, killed before any operation that changes its folder: training, previews, scores, final samples, the page."""

import json
import re

import jax
import numpy as np
import pytest
import tensorboardX  # noqa: F401  # its import takes longer than the limit below
import tiny
from kill_points import SHARES, check_every_kill

from dit_jax import build, session
from dit_jax.report import page, pictures
from dit_jax.sample import shards
from dit_jax.sample.generator import Generator
from dit_jax.training import leftovers, records, samples, scoring, setup

CONFIG = tiny.config(
    num_steps=2,
    batch_size=8,
    model__depth=1,
    checkpoint__every_steps=1,
    checkpoint__keep_last=1,
    log__every_steps=1,
    preview__every_steps=2,
    preview__num_images=8,
    scoring__every_steps=2,
    scoring__num_images=8,
    scoring__sampler__num_steps=1,
    sampler__num_steps=1,
    evaluation__num_images=8,
    evaluation__batch_size=8,
)


def ended(workdir):
    """What an undisturbed run leaves, without times, commit, starts, and files with random names of Orbax and TensorBoard."""
    files = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if re.match(r"tensorboard/|checkpoints/.+/", name):
            continue
        timed = path.is_dir() or path.name in ("report.html", "metrics.jsonl", "result.json", "starts.jsonl")
        content = None if timed else path.read_bytes().replace(str(workdir).encode(), b"")
        files[name] = re.sub(rb'"(seconds|commit)": [^,}]*', b"", content) if content and path.suffix == ".json" else content
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curves = {name: {line["step"]: line[name] for line in lines if name in line} for name in ("loss", "fid", "best_fid")}
    result = json.loads((workdir / "result.json").read_text())
    return files | curves | {name: result[name] for name in ("step", "loss", "fid", "stopped", "samples_sha256")}


@pytest.fixture
def compiled(monkeypatch):
    """Traces and compiles once for many runs of CONFIG; draws no page."""

    def once(function):
        kept = {}

        def call(*args, **kwargs):
            key = str((args[1:], kwargs)) if function is Generator else None
            return kept[key] if key in kept else kept.setdefault(key, function(*args, **kwargs))

        return call

    run = build.Run(CONFIG)
    init = jax.jit(run.task.init, out_shardings=jax.tree.map(lambda x: x.sharding, run.abstract_state))
    monkeypatch.setattr(session, "Run", lambda config: run)
    monkeypatch.setattr(setup, "create_sharded", lambda task, key, mesh: init(key))
    monkeypatch.setattr(setup, "compile_in_background", once(setup.compile_in_background))
    monkeypatch.setattr(samples, "Generator", once(Generator))
    monkeypatch.setattr(scoring, "Generator", once(Generator))
    monkeypatch.setattr(pictures, "denoise", once(pictures.denoise))
    monkeypatch.setattr(page, "text", lambda collected: "page")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("share", SHARES)
def test_killed_before_any_file_operation(tmp_path, monkeypatch, share):
    """A run that can never be finished, lost scores or records, other samples, leftovers of saves, scores and samples."""
    monkeypatch.setattr(records, "MOST_SECONDS", dict.fromkeys(records.MOST_SECONDS, 0.5))  # a killed thread writes nothing
    check_every_kill(tmp_path, lambda workdir: session.train(CONFIG, workdir), share, ended)


class Scorer:
    """With the score of step 4 due and missing."""

    def unfinished(self, step):
        return step == 4


def test_samples_that_no_later_step_continues(tmp_path):
    """Samples of a step that a longer run passes, which stay for ever; those that it continues, or another's files, removed."""
    names = (
        "samples/00000002_final.shards",
        "samples/00000006_final.shards",
        "scores/00000002_samples",
        "scores/00000004_samples",
    )
    labels = np.zeros(3, np.int32)
    for name in names:
        with shards.claimed(shards.Shards(tmp_path / name, shards.settings_of(labels, (4, 4, 3), {}, {}), labels)):
            pass
    (tmp_path / names[1]).rename(tmp_path / "samples" / "mine_final.shards")
    others = tmp_path / "samples" / "00000003_final.shards"
    others.mkdir()
    (others / "notes.txt").touch()

    def left():
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))

    leftovers.remove(tmp_path, 2, Scorer())
    kept = ["samples/00000003_final.shards", "samples/mine_final.shards"]
    assert left() == ["samples/00000002_final.shards", *kept, "scores/00000004_samples"]
    leftovers.remove(tmp_path, 6, None)
    assert left() == kept and (others / "notes.txt").exists()
    leftovers.remove(tmp_path / "missing", None, None)
