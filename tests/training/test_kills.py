"""A whole run, killed before any operation that changes its folder: training, previews, scores, final samples, the page."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX  # noqa: F401  # its import takes longer than the limit below
import tiny
from etils import epath
from kill_points import SHARES, check_every_kill

from dit_jax import build, session
from dit_jax.config_file import plain
from dit_jax.report import page, pictures
from dit_jax.runtime.versions import numeric_settings
from dit_jax.sample import shards
from dit_jax.sample.generator import Generator
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.storage.run_folder import Workdir
from dit_jax.storage.step_folder import read_record
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
    compile_once(monkeypatch, CONFIG)


def compile_once(monkeypatch, config):
    """Traces and compiles once for many runs of a config; draws no page. Returns the run."""

    def once(function):
        kept = {}

        def call(*args, **kwargs):
            key = str((args[1:], kwargs)) if function is Generator else None
            return kept[key] if key in kept else kept.setdefault(key, function(*args, **kwargs))

        return call

    run = build.Run(config)
    init = jax.jit(run.task.init, out_shardings=jax.tree.map(lambda x: x.sharding, run.abstract_state))
    monkeypatch.setattr(session, "Run", lambda config: run)
    monkeypatch.setattr(setup, "create_sharded", lambda task, key, mesh: init(key))
    monkeypatch.setattr(setup, "compile_in_background", once(setup.compile_in_background))
    monkeypatch.setattr(samples, "Generator", once(Generator))
    monkeypatch.setattr(scoring, "Generator", once(Generator))
    monkeypatch.setattr(pictures, "denoise", once(pictures.denoise))
    monkeypatch.setattr(page, "text", lambda collected: "page")
    return run


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("share", SHARES)
def test_killed_before_any_file_operation(tmp_path, monkeypatch, share):
    """A run that can never be finished, lost scores or records, other samples, leftovers of saves, scores and samples."""
    monkeypatch.setattr(records, "MOST_SECONDS", dict.fromkeys(records.MOST_SECONDS, 0.5))  # a killed thread writes nothing
    check_every_kill(tmp_path, lambda workdir: session.train(CONFIG, workdir), share, ended)


FEWER = [pytest.param(25, marks=SHARES[0].marks), SHARES[1]]  # what follows the first checkpoint is tested above
WITHOUT_RESULTS = tiny.config(
    num_steps=2,
    batch_size=8,
    model__depth=1,
    checkpoint__every_steps=1,
    log__every_steps=1,
)


def trained(folder, run, *steps):
    """The folder of a run that was never trained, with a checkpoint at each step."""
    state = run.task.init(jax.random.key(1))
    meta = {"data": run.loader.source.fingerprint, "numerics": numeric_settings()}
    with Workdir(folder, plain(run.config)), Checkpointer(folder / "checkpoints", every_steps=1) as checkpointer:
        for step in steps:
            checkpointer.save(step, state.replace(step=jnp.int32(step)), meta)


def ended_with_weights(workdir):
    """`ended`, the digests of the checkpoints, and what is recorded of a branch or a rewind."""
    files = {str(path.relative_to(workdir)): None for path in workdir.rglob("*") if "checkpoints" not in str(path)}
    files = {name: None for name in files if not name.startswith("tensorboard")}
    for file in ("branched_from.json", "rewinds.json"):
        if (workdir / file).exists():
            files[file] = re.sub(r'"(time|commit)": [^,]*', "", (workdir / file).read_text())
    saved = {path.name: read_record(epath.Path(path))[1] for path in (workdir / "checkpoints").iterdir()}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return files | {"saved": saved, "loss": {line["step"]: line["loss"] for line in lines if "loss" in line}}


@pytest.mark.parametrize("share", FEWER)
def test_a_branch_killed_before_any_file_operation(tmp_path, monkeypatch, share):
    """Catches a branch that begins again at step 0 or from other weights, or can never be started again."""
    monkeypatch.setattr(records, "MOST_SECONDS", dict.fromkeys(records.MOST_SECONDS, 0.5))
    trained(tmp_path / "parent", compile_once(monkeypatch, WITHOUT_RESULTS), 1)

    def command(workdir):
        session.train(WITHOUT_RESULTS, workdir, from_=tmp_path / "parent")

    (tmp_path / "branches").mkdir()
    names = check_every_kill(tmp_path / "branches", command, share, ended_with_weights)
    assert any("branched_from.json" in name for name in names)


@pytest.mark.parametrize("share", FEWER)
def test_a_rewind_killed_before_any_file_operation(tmp_path, monkeypatch, share):
    """Catches a rewind that is done in part, or twice, or loses what it sets aside."""
    monkeypatch.setattr(records, "MOST_SECONDS", dict.fromkeys(records.MOST_SECONDS, 0.5))
    run = compile_once(monkeypatch, WITHOUT_RESULTS)
    trained(tmp_path / "run", run, 1, 2)
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "time": 1.0, "loss": 2.0}\n{"step": 2, "time": 1.0, "loss": 1.0}\n'
    )
    (tmp_path / "run" / "result.json").write_text('{"step": 2}')
    (tmp_path / "run" / "samples").mkdir()
    (tmp_path / "run" / "samples" / "00000002.png").touch()

    def command(workdir):
        session.train(WITHOUT_RESULTS, workdir, rewind=1)

    def prepare(out):
        shutil.copytree(tmp_path / "run", out)

    (tmp_path / "runs").mkdir()
    names = check_every_kill(tmp_path / "runs", command, share, ended_with_weights, prepare=prepare)
    assert any("rewound.1" in name for name in names)


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
