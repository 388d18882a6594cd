"""Runs with each optimizer and several moving averages: what their checkpoints hold, and how they resume."""

import jax
import numpy as np
import pytest
import tiny

from dit_jax import build
from dit_jax.storage.checkpoints import restore_subtree
from dit_jax.tasks import averages
from dit_jax.tasks.state import create_sharded
from dit_jax.training.loop import train

NAMES = ("0.5", "0.9+warmup", "power:0.1")


def config(num_steps, **optimizer):
    c = tiny.config(num_steps=num_steps, model__depth=1, ema_decay=0.999, ema_warmup=True, averages=NAMES)
    with c.unlocked(), c.ignore_type():
        c.checkpoint.update({"every_steps": 1, "keep_last": 20})
        c.optimizer = optimizer
    return c


def recomputed(name, params):
    """The average after the last of these parameters, in float64, by its definition."""
    value = params[0].astype(np.float64)
    for step, new in enumerate(params[1:], 1):
        if name.startswith("power"):
            decay = (1 - 1 / step) ** 7.937  # sigma 0.1: gamma = 6.94, Karras et al. 2024, figure 13
        else:
            decay = float(name.removesuffix("+warmup"))
            decay = min(decay, (1 + step) / (10 + step)) if name.endswith("+warmup") else decay
        value = decay * value + (1 - decay) * new
    return value


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_run_in_three_starts(name, tmp_path, capsys):
    """Catches momentum or averages that a checkpoint forgets, averages of other steps, and a decay that cannot begin late."""
    optimizer = {"name": name, "learning_rate": 0.02}
    whole = train(build.Run(config(5, **optimizer)), tmp_path / "whole")
    train(build.Run(config(3, **optimizer)), tmp_path / "run")
    parts = train(build.Run(config(5, **optimizer)), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)

    run = whole.run
    start = create_sharded(run.task, jax.random.key(run.config.seed), run.mesh).params
    saved = {"params": run.abstract_state.params}
    params = [start, *(restore_subtree(tmp_path / "whole/checkpoints", saved, step)[0]["params"] for step in range(1, 6))]
    stored = {"0.999+warmup": whole.state.ema_params}
    stored |= {one: whole.state.averages[averages.key(averages.parse(one))] for one in NAMES}
    for one, tree in stored.items():
        wanted = jax.tree.map(lambda *x, one=one: recomputed(one, [np.asarray(y) for y in x]), *params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, wanted)

    late = {"decay": "linear", "decay_start": 5, "decay_steps": 9}
    last = train(build.Run(config(9, **optimizer, **late)), tmp_path / "run")
    assert int(last.state.step) == 9 and {int(x) for x in jax.tree.leaves(last.state.opt_state) if not x.ndim} == {9}
    assert last.run.optimizer.rate(8) == pytest.approx(0.02 / 4)
    assert "optimizer.decay_start: None -> 5, for the steps from here on" in capsys.readouterr().err
