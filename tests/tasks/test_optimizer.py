"""The learning rate of the optimizers."""

import jax.numpy as jnp
import optax
import pytest

from dit_jax import recipes
from dit_jax.config_file import read
from dit_jax.tasks.optimizer import adamw


@pytest.mark.parametrize(
    "fields",
    [{}, {"warmup_steps": 1}, {"warmup_steps": 4}, {"decay_steps": 9}, {"warmup_steps": 4, "decay_steps": 9, "clip_norm": 1.0}],
)
def test_the_rate_is_that_of_the_update(fields):
    """A recorded learning rate that is off by one step, or not the one that the parameters see."""
    optimizer = adamw(learning_rate=0.5, weight_decay=1.0, **fields)
    params = {"w": jnp.ones(())}
    state = optimizer.init(params)
    for step in range(11):  # without a gradient, AdamW moves a weight of 1 by -rate x weight_decay
        updates, state = optimizer.update({"w": jnp.zeros(())}, state, params)
        assert float(updates["w"]) == pytest.approx(-optimizer.rate(step), abs=1e-6)
    assert (optimizer.rate(9) == 0) == ("decay_steps" in fields)


def test_what_checkpoints_hold():
    """An optimizer that knows its rate and whose state has another structure than optax's."""
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    params = {"w": jnp.ones(())}
    assert adamw(clip_norm=1.0).init(params) == plain.init(params)


def test_the_decay_follows_the_number_of_steps():
    """A longer run whose last steps have a rate of 0, because the decay stayed behind; a given decay that is overridden."""
    file = "configs/digits.py"
    assert recipes.digits().optimizer.decay_steps == recipes.digits().num_steps
    assert read(file, ["num_steps=70"]).optimizer.decay_steps == 70
    given = read(file, ["optimizer.decay_steps=90", "num_steps=70"])
    assert (given.optimizer.decay_steps, given.num_steps) == (90, 70)
    assert read(file, ["optimizer.decay_steps=None", "num_steps=70"]).optimizer.decay_steps is None
    assert recipes.digits_latent().optimizer.decay_steps == recipes.digits_latent().num_steps
    assert recipes.dit().optimizer.decay_steps is None
