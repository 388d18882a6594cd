"""A run with the EDM process, from its start to autoguidance."""

import jax
import numpy as np
import pytest
import tiny
from runs import save_run

import dit_jax
from dit_jax import recipes
from dit_jax.training import setup
from dit_jax.training.loop import train

pytestmark = pytest.mark.slow


def config(**overrides):
    c = recipes.digits("edm")
    c.model.update({"depth": 1, "width": 32, "patch_size": 2})
    fields = {"preview__every_steps": 2, "preview__num_images": 10, "sampler__num_steps": 2, "ema_decay": 0.5}
    return tiny.shorten(c, **fields | overrides)


def run():
    return tiny.run_on_one_device(config())


def test_an_interrupted_run_and_autoguidance(tmp_path, monkeypatch):
    """Catches EDM's times or its preconditioning that depend on how often a run was started, to the bit; previews that are not
    drawn, or are drawn of other weights; an EDM run that another one cannot guide, or guides with other than the difference."""
    whole = train(run(), tmp_path / "whole")
    monkeypatch.setattr(setup.StopSignal, "requested", lambda self, step: step == 2)
    assert train(run(), tmp_path / "again").stopped
    monkeypatch.undo()
    again = train(run(), tmp_path / "again")
    for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)
    for step in (2, 4):
        one, other = ((tmp_path / name / "samples" / f"{step:08d}.png").read_bytes() for name in ("whole", "again"))
        assert one == other and len(one) > 1000
    save_run(tmp_path / "weak", config(model__width=16), 0)
    one_step = {"sampler": "euler", "num_steps": 1}  # draws the predicted x0
    pipe = dit_jax.load(tmp_path / "whole")
    strong, weak = (np.asarray(one([3, 5], **one_step), int) for one in (pipe, dit_jax.load(tmp_path / "weak")))
    inside = (weak > 0) & (weak < 255) & (strong > 0) & (strong < 255)  # images are clipped
    for name, wanted in (("again", strong), ("weak", 2 * strong - weak)):
        guided = np.asarray(pipe([3, 5], guidance_scale=2.0, autoguidance=tmp_path / name, **one_step), int)
        assert abs(guided - wanted.clip(0, 255))[inside].max() <= 2
    assert abs(strong - weak)[inside].max() > 20
