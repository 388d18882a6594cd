"""What a run makes besides its checkpoints: where it fails or hangs, the run continues, says so once and counts it."""

import contextlib
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from dit_jax import build, session
from dit_jax.errors import UserError
from dit_jax.runtime import watchdog
from dit_jax.training import events, loop
from dit_jax.training import records as records_module
from dit_jax.training.records import Records


class Failing:
    """A scorer and the results of a run that fail at every step but 2."""

    best = None

    def problem(self, step):
        return "the disk is full" if step == 3 else ""

    def give_up(self, step):
        self.gave_up = step

    def __call__(self, step, params, constants, record):
        if step != 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        self.best = {"step": 2, "fid": 1.0}
        record({"fid": 1.0})
        return {"fid": 1.0, "seconds": 0.1}

    def preview(self, folder, records, step, state, constants):
        if step != 2:
            raise ValueError("image 3 is not finite")
        return 0.5


def test_a_score_or_preview_that_fails_is_counted_and_tried_again(tmp_path, caplog):
    """A run of days that ends because its score ran out of memory, its reference was away, or a picture could not be drawn; a
    warning at every one; a failed score that leaves its samples."""
    failing, state = Failing(), SimpleNamespace(ema_params=None)
    meter = SimpleNamespace(report=lambda: None)
    with Records(tmp_path) as records:
        checkpointer = SimpleNamespace(best_step=None)
        score = events.Score(failing, None, records, checkpointer, meter, SimpleNamespace(wait=lambda step: None))
        preview = events.Preview(failing, meter, records, tmp_path, None, 1, 4)
        assert [score(step, state) for step in (1, 2, 3, 4)] == [False] * 4 and checkpointer.best_step == 2
        for step in (1, 2, 3):
            preview(step, state)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "fid" in line or "preview_seconds" in line] == [2, 2]
    assert {name: count for name, count in records.dropped.items() if count} == {"scores": 3, "previews": 2}
    assert len([r for r in caplog.records if "Cannot make" in r.message]) == 2 and failing.gave_up == 4


def test_a_disk_that_hangs_costs_previews_only(tmp_path, monkeypatch):
    """A run that waits for ever for a picture, or keeps all pictures since in memory."""
    monkeypatch.setitem(records_module.MOST_SECONDS, "previews", 0.2)
    hangs = threading.Event()
    with Records(tmp_path) as records:
        records.preview(hangs.wait)
        for _ in range(8):
            records.preview(lambda: None)
            time.sleep(0.01)
        records.scalars(1, {"loss": 1.0})
    hangs.set()
    assert records.dropped["previews"] >= 8 and "loss" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_scores_that_cannot_be_written(tmp_path):
    """A file in the place of the folder of scores ends the run at its first score; or the score is not tried again."""
    config = tiny.config(num_steps=4, scoring__every_steps=2, scoring__num_images=8, scoring__sampler__num_steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scores").touch()
    result = session.train(config, tmp_path / "run")
    assert result["step"] == 4 and result["dropped"] == {"scores": 2}
    (tmp_path / "run" / "scores").unlink()
    loop.train(build.Run(config), tmp_path / "run")
    assert (tmp_path / "run" / "scores" / "00000004.json").exists()


@pytest.mark.slow
def test_final_samples_that_cannot_be_written(tmp_path, capsys):
    """A run whose samples fail and that ends with 0, or whose training is lost with them."""
    config = tiny.config(num_steps=2, evaluation__num_images=8, preview__every_steps=1, preview__num_images=4)
    (tmp_path / "samples").touch()
    with pytest.raises(UserError, match="samples"):
        session.train(config, tmp_path)
    assert "step 2 is trained and saved" in capsys.readouterr().err and not (tmp_path / "result.json").exists()
    (tmp_path / "samples").unlink()
    result = session.train(config, tmp_path)
    assert np.load(result["samples"])["arr_0"].shape == (8, 8, 8, 1) and result["step"] == 2


@pytest.mark.exhaustive
def test_the_latent_plane_is_no_reason_to_fail(tmp_path, monkeypatch, capsys):
    """A trained codec that is not scored because of a picture."""

    def fail(*args):
        raise ValueError("a colour is missing")

    monkeypatch.setattr("dit_jax.training.reconstructions.draw_plane", fail)
    monkeypatch.setattr("dit_jax.training.reconstructions.is_plane", lambda shape: True)
    monkeypatch.setattr("dit_jax.training.reconstructions.PALETTE", [None] * 10)
    result = session.train(tiny.autoencoder(num_steps=2, task__discriminator_weight=0.0), tmp_path)
    assert result["plane"] is None and "a colour is missing" in capsys.readouterr().err and (tmp_path / "codec").is_dir()


class Hung(Exception):
    """Ends a run that hangs in a test."""


BLOCKED = {
    "data": ("dit_jax.data.loader.Batches", "__next__"),
    "restore": ("dit_jax.storage.checkpoints.Checkpointer", "restore"),
    "compile": ("dit_jax.training.setup", "compile_in_background"),
    "checkpoint": ("dit_jax.storage.checkpoints.Checkpointer", "save"),
    "preview": ("dit_jax.training.samples.Samples", "preview"),
    "scoring": ("dit_jax.training.scoring", "draw"),
    "sampling": ("dit_jax.training.samples", "draw"),
    "report": ("dit_jax.report.ending", "write"),
}


IN_CI = ("data", "restore", "preview", "scoring", "sampling")


@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=pytest.mark.slow if p in IN_CI else pytest.mark.exhaustive) for p in BLOCKED]
)
def test_a_hang_in_any_phase_is_found(tmp_path, monkeypatch, phase):
    """A phase of a run in which the watchdog sleeps: the first batch, a restore, a preview, a score, the final samples."""
    ended, reasons = threading.Event(), []

    def end(self, told, reason):
        reasons.append(reason)
        ended.set()

    def block(*args, **kwargs):
        assert ended.wait(60)
        raise Hung

    limits = {name: (0.1 if name == phase else 1_000.0, text) for name, (_, text) in watchdog.LIMITS.items()}
    monkeypatch.setattr(watchdog, "LIMITS", limits)
    monkeypatch.setattr(watchdog.Watchdog, "_end", end)
    config = tiny.config(
        num_steps=2,
        model__depth=1,
        log__watchdog_seconds=1.0,
        loader__retry_seconds=0.0,
        preview__every_steps=1,
        preview__num_images=4,
        evaluation__num_images=8,
        scoring__every_steps=2,
        scoring__num_images=8,
        scoring__sampler__num_steps=2,
    )
    where, name = BLOCKED[phase]
    run = build.Run(config)
    run.task
    blocked = (lambda *args: SimpleNamespace(result=block)) if phase == "compile" else block
    monkeypatch.setattr(f"{where}.{name}", blocked)
    with contextlib.suppress(Hung):
        session.train(config, tmp_path)
    assert reasons and watchdog.LIMITS[phase][1] in reasons[0]
