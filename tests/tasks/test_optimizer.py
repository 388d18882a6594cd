"""The learning rate of the optimizers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax import recipes
from dit_jax.config_file import read
from dit_jax.errors import UserError
from dit_jax.storage.fingerprint import leaf_names
from dit_jax.tasks.muon import muon
from dit_jax.tasks.optimizer import adafactor, adamw
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


@pytest.mark.parametrize(
    "make, fields",
    [(adafactor, {"momentum": 0.9, "min_factored_size": 2}), (adafactor, {}), (functools.partial(muon, {"a": "io"}), {})],
)
def test_the_state_of_others_follows_too(make, fields):
    """Catches momentum of one parameter that becomes another's, and a schedule that begins anew, where a decay comes or goes."""
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"0": {"v": jnp.arange(3.0) + 7}}}
    bare, scheduled = make(**fields), make(**fields, decay_steps=9, clip_norm=1.0)
    state = bare.update(params, bare.init(params), params)[1]
    there = with_structure({"codec": state}, {"codec": scheduled.init(params)})["codec"]
    wanted = scheduled.update(params, scheduled.init(params), params)[1]
    assert jax.tree.structure(there) == jax.tree.structure(wanted)
    assert {int(x) for x in jax.tree.leaves(there) if not x.ndim} == {1}
    assert leaf_names(with_structure(there, state)) == leaf_names(state)
    jax.tree.map(np.testing.assert_array_equal, with_structure(there, state), state)


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


@pytest.mark.parametrize("make", [adamw, adafactor])
@pytest.mark.parametrize(
    "fields, rates",
    [
        ({"decay": "linear", "decay_steps": 4}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"decay": "linear", "decay_steps": 6, "decay_start": 4, "warmup_steps": 2}, [0.5, 1, 1, 1, 1, 0.5, 0, 0]),
        ({"decay_steps": 6, "decay_start": 4}, [1, 1, 1, 1, 1, 0.5, 0]),
        ({"warmup_steps": 2}, [0.5, 1, 1]),
    ],
)
def test_schedules(make, fields, rates):
    """A stable part that is missing, a fall at the wrong step, or a recorded rate that is not the one of the update."""
    optimizer = make(learning_rate=1.0, weight_decay=1.0, **fields)
    params = {"w": jnp.ones(())}
    state = optimizer.init(params)
    for step, rate in enumerate(rates):
        updates, state = optimizer.update({"w": jnp.zeros(())}, state, params)
        assert optimizer.rate(step) == pytest.approx(rate) and float(updates["w"]) == pytest.approx(-rate, abs=1e-6)


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"decay": "wsd"}, "decay is wsd; it must be one of cosine, linear"),
        ({"decay_start": 3}, "decay_start is 3; it must be None, or from warmup_steps = 0 to below decay_steps = None"),
        ({"decay_start": 3, "decay_steps": 3}, "decay_start is 3"),
        ({"groups": (("(", 1, None),)}, "no regular expression"),
        ({"groups": (("a", -1, None),)}, "the factor of 'a' is -1"),
        ({"groups": (("a", 1),)}, "a group is"),
        ({"groups": (("a", 1.0, -0.1),)}, "the weight decay of 'a' is -0.1"),
    ],
)
def test_schedules_and_groups_that_are_none(fields, text):
    """A fall that never comes, or a group that counts for nothing, without a word."""
    with pytest.raises(UserError, match=text):
        adamw(**fields)


@pytest.mark.parametrize("make", [adamw, adafactor])
def test_groups(make):
    """A rate or decay of another group, a decay without its rate, or a pattern that matches the middle of a path."""
    groups = (("blocks/.*/kernel", 0.5, 0.2), ("kernel", 2.0, None), ("head/.*", 0.0, None))
    optimizer = make(learning_rate=0.1, weight_decay=1.0, groups=groups)
    leaf = jnp.ones((2, 2))
    params = {"blocks": {"a": {"kernel": leaf, "bias": leaf}}, "last": {"kernel": leaf}, "head": {"bias": leaf}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    rates = {"blocks/a/kernel": 0.01, "blocks/a/bias": 0.1, "last/kernel": 0.2, "head/bias": 0.0}
    for name, rate in rates.items():
        value = functools.reduce(lambda tree, key: tree[key], name.split("/"), updates)
        np.testing.assert_allclose(value, -rate, rtol=1e-6, err_msg=name)
    with pytest.raises(UserError, match="'blocks' is the first of no parameter; paths are such as blocks/a/bias and last/kernel"):
        make(groups=(("blocks", 1.0, None),)).init(params)


def test_adafactor_is_that_of_its_paper():
    """Catches sums of the wrong axis, a decay that is off by one step, and clipping of the wrong norm."""
    rng, second = np.random.default_rng(3), {}
    params = {"a": jnp.zeros((3, 5)), "b": jnp.zeros((4,))}
    optimizer = adafactor(learning_rate=0.1, min_factored_size=3, clipping_threshold=0.9)
    state = optimizer.init(params)
    for step in range(1, 4):
        grads = {name: rng.normal(size=x.shape) * step for name, x in params.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
        for name, gradient in grads.items():  # Shazeer & Stern 2018, algorithms 4 and 5, in float64
            decay, square = 1 - step**-0.8, gradient**2 + 1e-30
            sums = [square.sum(1, keepdims=True), square.sum(0, keepdims=True)] if gradient.ndim == 2 else [square]
            second[name] = [decay * old + (1 - decay) * new for old, new in zip(second.get(name, [0, 0]), sums, strict=False)]
            variance = second[name][0] * second[name][1] / second[name][0].sum() if gradient.ndim == 2 else second[name][0]
            scaled = gradient / np.sqrt(variance)
            scaled /= max(1, np.sqrt(np.mean(scaled**2)) / 0.9)
            np.testing.assert_allclose(updates[name], -0.1 * scaled, rtol=1e-4, err_msg=f"{name} {step}")


def test_adamw_without_groups_is_that_of_groups():
    """Another optimizer as soon as there is a group."""
    params = {"a": jax.random.normal(jax.random.key(0), (3, 4)), "b": jnp.ones((2,))}
    fields = {"learning_rate": 0.1, "weight_decay": 0.3, "warmup_steps": 2, "clip_norm": 0.5}
    plain, grouped = adamw(**fields), adamw(**fields, groups=(("a", 1.0, None),))
    states = [plain.init(params), grouped.init(params)]
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: jnp.sin(jnp.arange(x.size) + step).reshape(x.shape), params)
        (one, states[0]), (two, states[1]) = plain.update(grads, states[0], params), grouped.update(grads, states[1], params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, two)


def test_groups_are_those_of_torch():
    """Catches a decay without the group's rate, moments that depend on the group, and a warm-up that a group does not follow:
    HDiT's four groups (matrices and others, of the mapping network and the rest; k-diffusion's `param_groups`)."""
    torch = pytest.importorskip("torch")
    rng, steps, warmup, rate, decay = np.random.default_rng(6), 8, 4, 5e-3, 0.3
    groups = (
        ("blocks/.*_norm/kernel", 1 / 3, None),
        ("mapping/.*kernel", 1 / 3, None),
        ("mapping/.*", 1 / 3, 0.0),
        (".*(scale|embedding)", 1.0, 0.0),
    )
    places = {  # path: (factor of the rate, weight decay)
        "mapping/in/kernel": (1 / 3, decay),
        "mapping/norm/scale": (1 / 3, 0.0),
        "blocks/mlp_norm/kernel": (1 / 3, decay),
        "blocks/mlp/kernel": (1.0, decay),
        "blocks/scale": (1.0, 0.0),
        "label/embedding": (1.0, 0.0),
    }
    params = {name: rng.normal(size=(3, 2)) for name in places}
    optimizer = adamw(rate, b1=0.9, b2=0.95, weight_decay=decay, warmup_steps=warmup, groups=groups)
    ours = unflatten_dict({name: jnp.float32(x) for name, x in params.items()}, sep="/")
    theirs = {name: torch.nn.Parameter(torch.tensor(x, dtype=torch.float32)) for name, x in params.items()}
    grouped = [{"params": [theirs[name]], "lr": rate * factor, "weight_decay": wd} for name, (factor, wd) in places.items()]
    reference = torch.optim.AdamW(grouped, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: min(1, (step + 1) / warmup))
    state = optimizer.init(ours)
    for _ in range(steps):
        grads = {name: rng.normal(size=(3, 2)) for name in places}
        tree = unflatten_dict({name: jnp.float32(x) for name, x in grads.items()}, sep="/")
        updates, state = optimizer.update(tree, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, x in grads.items():
            theirs[name].grad = torch.tensor(x, dtype=torch.float32)
        reference.step()
        schedule.step()
    for name, x in flatten_dict(ours, sep="/").items():
        np.testing.assert_allclose(x, theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
