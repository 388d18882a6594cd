"""Moving averages against sums over all steps, and EDM2's closed forms."""

import jax
import numpy as np
import pytest
import tiny

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.tasks.averages import Exponential, Inverse, Power, combine, key, parse

AVERAGES = [Exponential(0.9), Exponential(0.999, warmup=True), Power(0.05), Power(0.1), Power(0.25), Inverse(0.9)]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("steps", [0, 1, 2, 57])
def test_the_profile_is_that_of_the_updates(average, steps):
    """Weights that belong to another step, or a decay that starts at 0 instead of 1."""
    params = np.random.default_rng(0).normal(size=(steps + 1, 3))
    value = params[0]
    gain = jax.jit(average.gain)
    for step in range(1, steps + 1):
        share = float(gain(step))
        value = (1 - share) * value + share * params[step]
    profile = average.profile(steps)
    assert profile.shape == (steps + 1,) and profile.sum() == pytest.approx(1) and (profile >= 0).all()
    np.testing.assert_allclose(profile @ params, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1, 0.25])
def test_the_width_of_a_power_function_average(sigma):
    """Another root of the cubic equation, or a width that is not relative to the training time."""
    profile = Power(sigma).profile(20_000)
    time = np.linspace(0, 1, 20_001)
    mean = profile @ time
    assert np.sqrt(profile @ (time - mean) ** 2) == pytest.approx(sigma, rel=2e-3)
    assert Power(0.1).exponent == pytest.approx(6.94, abs=0.01) and Power(0.05).exponent == pytest.approx(16.97, abs=0.01)


def test_warmup_forgets_the_initial_parameters():
    """A short run that samples its initial weights."""
    assert Exponential(0.9999).profile(300)[0] > 0.97
    assert Exponential(0.9999, warmup=True).profile(300)[0] < 1e-6
    late = [average.profile(200_000)[100_000:] for average in (Exponential(0.9999), Exponential(0.9999, warmup=True))]
    np.testing.assert_allclose(*late, atol=1e-7)


def test_the_inverse_warmup_is_k_diffusions():
    """Catches a schedule that is off by one step, a wrong power, and a name that means another average."""
    average = parse("0.9999+inverse")
    assert average == Inverse(0.9999) and parse(average.name) == average and key(average) == "0_9999_inverse"
    for step, decay in ((0, 0.0), (1, 1 - 2**-0.75), (99, 1 - 100**-0.75), (10**6, 0.9999)):  # theirs count from 0
        assert 1 - float(jax.jit(average.gain)(step + 1)) == pytest.approx(decay, abs=1e-6)
    assert average.profile(300)[0] == 0
    with pytest.raises(UserError, match=r"decay of an average is 1\.0"):
        parse("1.0+inverse")


@pytest.mark.parametrize("step", [1, 2, 1_000, 3_000_001])
def test_the_gain_late_in_a_run(step):
    """Catches 1 - (1 - 1 / step) ** (g + 1) in float32: its rounding is 10 % of the gain at three million steps."""
    for average in (Power(0.05), Power(0.28)):
        wanted = -np.expm1((average.exponent + 1) * np.log1p(-1 / step)) if step > 1 else 1
        assert float(jax.jit(average.gain)(step)) == pytest.approx(wanted, rel=1e-5)
    assert float(jax.jit(Exponential(0.99999, warmup=True).gain)(3_000_001)) == pytest.approx(1e-5, rel=1e-5)


@pytest.mark.parametrize("sigma", [0.05, 0.075, 0.12])
def test_an_average_made_afterwards(sigma):
    """Factors of the wrong snapshots: EDM2's two widths, stored every eighth of the run, give the widths between them."""
    steps = 4_000 if sigma == 0.05 else 24_000  # of which `combine` takes several at a time
    stored = [(Power(width), at) for width in (0.05, 0.1) for at in range(steps // 8, steps + 1, steps // 8)]
    factors, error = combine(stored, Power(sigma), steps)
    params = np.cumsum(np.random.default_rng(1).normal(size=(steps + 1, 4)), axis=0)
    values = np.array([average.profile(at) @ params[: at + 1] for average, at in stored])
    wanted = Power(sigma).profile(steps) @ params
    assert error < 0.02
    np.testing.assert_allclose(factors @ values, wanted, atol=0.02 * np.abs(params).max())


def test_a_stored_average_is_itself():
    """A combination where one of the stored averages is the wanted one; later ones that are used."""
    stored = [(Exponential(0.99), 50), (Power(0.1), 100), (Power(0.1), 200)]
    factors, error = combine(stored, Power(0.1), 100)
    np.testing.assert_allclose(factors, [0, 1, 0], atol=1e-9)
    assert error < 1e-9
    with pytest.raises(UserError, match=r"power:0\.1 at step 40 cannot be made: no average of step 40 or before is stored"):
        combine(stored, Power(0.1), 40)


@pytest.mark.parametrize("average", AVERAGES)
def test_names(average):
    """A name in a config or on the command line that becomes another average."""
    assert parse(average.name) == average


@pytest.mark.parametrize(
    "name, text",
    [("ema", "is no average; write 0.9999"), ("1.5", "must lie in"), ("power:0.5", "the width"), ("power:x", "is no")],
)
def test_names_of_none(name, text):
    """A mistyped name that becomes a default."""
    with pytest.raises(UserError, match=text):
        parse(name)


@pytest.mark.slow
def test_a_step_updates_all_of_them():
    """An average that misses a step, is of the parameters before it, or takes the decay of another one."""
    names = ("0.5", "power:0.1")
    run = build.Run(tiny.config(averages=names, ema_decay=0.9, ema_warmup=True, optimizer__learning_rate=0.1))
    state, step, constants = run.task.init(jax.random.key(0)), jax.jit(run.task.step), {"codec": run.codec_params}
    batch = {"image": np.full((16, 8, 8, 1), 200, np.uint8), "label": np.arange(16, dtype=np.int32) % 10}
    params = [state.params]
    for number in range(4):
        state, _ = step(state, constants, batch, jax.random.key(number))
        params.append(state.params)
    stored = {"0.9+warmup": state.ema_params} | {name: state.averages[key(parse(name))] for name in names}
    for name, value in stored.items():
        profile = parse(name).profile(4)
        wanted = jax.tree.map(lambda *x, profile=profile: np.tensordot(profile, np.stack(x), 1), *params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), value, wanted)
