"""Scores while a run trains: what is recorded, which checkpoint is kept, and going on after a stop in the middle of one."""

import json

import pytest
import tiny

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.sample import drawing
from dit_jax.training import scoring
from dit_jax.training.loop import train


def config(**overrides):
    fields = {
        "num_steps": 6,
        "checkpoint__every_steps": 2,
        "checkpoint__keep_last": 1,
        "checkpoint__keep_every_steps": 100,
        "scoring__every_steps": 2,
        "scoring__num_images": 20,
        "scoring__sampler__num_steps": 2,
        "evaluation__batch_size": 8,
    }
    return tiny.config(**(fields | overrides))


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "fid" in line}


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    """A best checkpoint that is deleted as an old one; a score that is not recorded, or is taken for the best when it is not; a
    reference whose features are taken again for every score."""
    values, made = iter((3.0, 1.0, 2.0)), []
    evaluate, make = scoring.scores.evaluate, scoring.scores.make_reference
    monkeypatch.setattr(scoring.scores, "evaluate", lambda *args: evaluate(*args) | {"fid": next(values)})
    monkeypatch.setattr(scoring.scores, "make_reference", lambda *args: made.append(1) or make(*args))
    train(tiny.run_on_one_device(config()), tmp_path)
    assert {step: (line["fid"], line["best_fid"]) for step, line in records(tmp_path).items()} == {
        2: (3.0, 3.0),
        4: (1.0, 1.0),
        6: (2.0, 1.0),
    }
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    best = json.loads((tmp_path / "scores" / "best.json").read_text())
    assert (best["step"], best["fid"], best["num_samples"]) == (4, 1.0, 20) and len(made) == 1
    known = json.loads((tmp_path / "scores" / "00000004.json").read_text())
    assert known["made_by"]["sampler"]["num_steps"] == 2 and known["made_by"]["step"] == 4
    assert not list((tmp_path / "scores").glob("*_samples"))


@pytest.mark.slow
def test_a_stopped_score_is_finished_by_the_next_start(tmp_path, monkeypatch):
    """A run that goes on without the score that a signal interrupted, or trains on although it was asked to stop."""

    def interrupted(out, *args, **kwargs):
        out.mkdir(parents=True)
        return drawing.Drawn(out, out, 0, 0.0, True)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "draw", interrupted)
        run = train(tiny.run_on_one_device(config()), tmp_path)
    assert run.stopped and int(run.state.step) == 2 and not records(tmp_path)
    assert not train(tiny.run_on_one_device(config()), tmp_path).stopped
    assert sorted(records(tmp_path)) == [2, 4, 6]


@pytest.mark.slow
def test_a_stop_at_a_scored_step_loses_no_score(tmp_path, monkeypatch):
    """A signal that comes just before a score: the score of that step was never taken."""
    with monkeypatch.context() as patch:
        patch.setattr("dit_jax.runtime.signals.StopSignal.requested", lambda self, step: step == 2)
        assert train(tiny.run_on_one_device(config(num_steps=4)), tmp_path).stopped and not (
            tmp_path / "metrics.jsonl"
        ).read_text().count('"fid"')
    train(tiny.run_on_one_device(config(num_steps=4)), tmp_path)
    assert sorted(records(tmp_path)) == [2, 4]


@pytest.mark.parametrize(
    "overrides, text",
    [
        ({"evaluation__reference": ""}, "evaluation.reference is empty"),
        ({"scoring__num_images": 1}, "at least 1 and 2"),
        ({"evaluation__features": "inception"}, "weights"),
        ({"scoring__sampler__name": "sde"}, "sde"),
    ],
)
def test_mistakes_are_found_before_training(overrides, text):
    """A run that fails at its first score, hours after its start."""
    with pytest.raises(UserError, match=text):
        scoring.check(build.Run(config(**overrides)))
