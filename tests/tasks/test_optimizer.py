"""The learning rate of the optimizers."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from dit_jax import recipes
from dit_jax.config_file import read
from dit_jax.errors import UserError
from dit_jax.tasks.optimizer import adamw
from dit_jax.tasks.state import with_structure


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


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"learning_rate": math.inf}, "learning_rate is inf; it must be positive, and at most 1e"),
        ({"eps": 1e-60}, "eps is 1e-60; it must be 1e-30 to"),
        ({"b2": 1 - 1e-12}, r"b2 is 0\.999999999999; it must be in \[0, 1\), and below 1 in float32"),
        ({"learning_rate": 2.0, "weight_decay": 1.0}, "weight_decay is 1.0; it must be .* at most 1 when multiplied by"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
    ],
)
def test_numbers_that_float32_has_not(fields, text):
    """Settings with which AdamW makes NaN of finite gradients: 0 / 0, or a rate that overflows."""
    with pytest.raises(UserError, match=text):
        adamw(**fields)


@pytest.mark.parametrize("gradient", [0.0, 1e-38, 1.0, -1e18])
@pytest.mark.parametrize("fields", [{}, {"eps": 1e-30, "b1": 0.9999999, "b2": 0.9999999}, {"learning_rate": 1e18}])
def test_an_update_of_adamw_is_finite(fields, gradient):
    """A promise of `is_bounded`, with which the step does not look at the new parameters, that does not hold."""
    optimizer, params = adamw(**fields), {"w": jnp.float32(1)}
    assert optimizer.is_bounded
    updates, _ = optimizer.update({"w": jnp.float32(gradient)}, optimizer.init(params), params)
    assert jnp.isfinite(optax.apply_updates(params, updates)["w"])


def test_the_state_follows_clipping_and_schedules():
    """Adam's moments lost, or a count that starts at 0 and begins the schedule anew, where clipping or a decay comes or goes."""
    params = {"blocks": {"w": jnp.arange(3.0)}}
    clipped, bare = adamw(clip_norm=1.0, decay_steps=9), adamw()
    _, state = bare.update(params, bare.init(params), params)
    there = with_structure(state, clipped.init(params))
    assert jax.tree.structure(there) == jax.tree.structure(clipped.init(params))
    assert [int(x) for x in jax.tree.leaves(there) if not x.ndim] == [1, 1]
    back = with_structure({"part": there}, {"part": state})["part"]
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert (a == b).all()


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
