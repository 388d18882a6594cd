import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import flow
from dit_jax.diffusion.flow import Flow
from dit_jax.errors import UserError

X0, NOISE = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
FROM = {"velocity": flow.from_velocity, "noise": flow.from_noise, "x0": flow.from_x0, "score": flow.from_score}


def quantity(name, x0, noise, c):
    return {"velocity": flow.velocity_of(x0, noise, c), "noise": noise, "x0": x0, "score": flow.score_of(noise, c)}[name]


@pytest.mark.parametrize("interpolant", flow.INTERPOLANTS)
@pytest.mark.parametrize("first, second", list(itertools.permutations(FROM, 2)))
def test_conversion_cycles(interpolant, first, second):
    """A conversion that does not undo another, at three times at once."""
    process = Flow(interpolant)
    t = jnp.array([0.1, 0.5, 0.9])
    c, x_t = process.expanded(t, X0), process.perturb(X0, NOISE, t)
    one = quantity(first, X0, NOISE, c)
    two = quantity(second, *FROM[first](one, x_t, c), c)
    np.testing.assert_allclose(two, quantity(second, X0, NOISE, c), atol=2e-5)
    np.testing.assert_allclose(quantity(first, *FROM[second](two, x_t, c), c), one, atol=2e-4)


@pytest.mark.parametrize("interpolant", flow.INTERPOLANTS)
def test_ends_and_rates(interpolant):
    """Ends that are not data and noise, rates that are not derivatives, or a velocity that is undefined at an end."""
    process = Flow(interpolant)
    np.testing.assert_array_equal(process.perturb(X0, NOISE, jnp.array([0.0, 0.0, 1.0]))[1:], [X0[1], NOISE[2]])
    t = jnp.linspace(0, 1, 11)
    c = process.coefficients(t)
    for value, rate in ((0, c.alpha_rate), (1, c.sigma_rate)):
        np.testing.assert_allclose(jax.vmap(jax.grad(lambda t, v=value: process.coefficients(t)[v]))(t), rate, atol=1e-6)
    for t in (0.0, 1.0):
        x_t = process.perturb(X0, NOISE, t)
        prediction = process.predict(flow.velocity_of(X0, NOISE, process.coefficients(t)), x_t, t)
        np.testing.assert_allclose(prediction.x0, X0, atol=1e-5)
        np.testing.assert_allclose(prediction.noise, NOISE, atol=1e-5)
    float64 = process.coefficients(np.array([0.0, 1.0]), np)
    assert float64.alpha[1] == 0 and float64.sigma[0] == 0 and float64.alpha.dtype == np.float64


def test_network_meets_sit():
    """Time or velocity with the sign that SiT's weights do not have (linear: x0 - noise, 1 = data)."""
    t = jnp.array([0.0, 0.3, 1.0])
    np.testing.assert_allclose(Flow().network_time(t), [1, 0.7, 0], rtol=1e-6)
    loss, _ = Flow().loss(X0 - NOISE, X0, NOISE, t)
    assert (loss == 0).all()


@pytest.mark.parametrize("interpolant", flow.INTERPOLANTS)
def test_network_meets_sd3(interpolant):
    """Catches a sign or time that SD3's weights do not have (noise - x0, 1000 = noise): samples would be plausible mush."""
    process, t = Flow(interpolant, convention="sd3"), jnp.array([0.0, 0.3, 1.0])
    np.testing.assert_allclose(process.network_time(t), [0, 300, 1000], rtol=1e-6)
    x_t, rate = jax.jvp(lambda t: process.perturb(X0, NOISE, t), (t,), (jnp.ones(3),))  # d x / d t
    np.testing.assert_allclose(process.predict(rate, x_t, t).x0, X0, atol=1e-5)
    np.testing.assert_allclose(process.predict(rate, x_t, t).noise, NOISE, atol=1e-5)
    assert float(process.loss(rate, X0, NOISE, t)[0].max()) < 1e-10
    np.testing.assert_array_equal(process.loss(X0, X0, NOISE, t)[0], Flow(interpolant).loss(-X0, X0, NOISE, t)[0])
    wide = Flow(interpolant, convention="sd3", spare_channels=True).predict(np.concatenate([rate, X0], -1), x_t, t)
    np.testing.assert_array_equal(wide.x0, process.predict(rate, x_t, t).x0)


def test_spare_channels():
    """Spare channels that reach the loss or the prediction."""
    process, t = Flow(spare_channels=True), jnp.array([0.1, 0.5, 0.9])
    assert process.output_channels(2) == 4 and Flow().output_channels(2) == 2
    wide = np.concatenate([X0 + 1, np.full_like(X0, 1e3)], axis=-1)
    np.testing.assert_allclose(process.loss(wide, X0, NOISE, t)[0], Flow().loss(X0 + 1, X0, NOISE, t)[0])
    np.testing.assert_array_equal(process.predict(wide, NOISE, t).x0, Flow().predict(X0 + 1, NOISE, t).x0)


@pytest.mark.parametrize(
    "fields, quantiles",
    [
        ({}, [0.25, 0.5, 0.75]),
        ({"shift": 3.0}, [0.5, 0.75, 0.9]),  # 3 t / (1 + 2 t)
        ({"time_distribution": "logit_normal"}, [0.3375, 0.5, 0.6625]),  # sigmoid(-+0.6745)
        ({"time_distribution": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5}, [0.6599, 0.7311, 0.7920]),
    ],
)
def test_training_times(fields, quantiles):
    """Another distribution, or a shift towards the data (quantiles +- 4 deviations)."""
    t = Flow(**fields).sample_time(jax.random.key(0), 40_000)
    assert t.shape == (40_000,) and t.min() >= 0 and t.max() <= 1
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]), quantiles, atol=0.012)


def test_grid_is_shifted():
    """A sampling grid without the resolution shift that training had."""
    np.testing.assert_allclose(Flow().grid(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(Flow(shift=3.0).grid(4), [1, 0.9, 0.75, 0.5, 0])


def test_grid_of_sd3():
    """Catches a grid whose end is shifted once only, or that steps to 0 evenly; the numbers are those of Stability's code."""
    times = Flow(shift=3.0, sampling_grid="sd3").grid(28)
    assert times.shape == (29,) and times[0] == 1 and times[-1] == 0
    np.testing.assert_allclose(times[[1, 2, 25, 26, 27]], [0.9874, 0.9741, 0.1998, 0.1109, 0.0089], atol=5e-5)
    np.testing.assert_allclose(Flow(sampling_grid="sd3").grid(4), [1, 0.667, 0.334, 0.001, 0], rtol=1e-12)
    np.testing.assert_array_equal(Flow(shift=3.0, sampling_grid="sd3").grid(1), [1, 0])


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"convention": "flux"}, "process.convention is 'flux'; it must be one of sit, sd3"),
        ({"sampling_grid": "karras"}, "uniform, sd3"),
        ({"interpolant": "vp"}, "linear, gvp"),
        ({"time_distribution": "beta"}, "logit_normal"),
        ({"shift": 0.0}, "positive"),
        ({"time_distribution": "logit_normal", "logit_std": -1.0}, "positive"),
        ({"logit_mean": 0.5}, "no effect"),
    ],
)
def test_bad_fields(fields, text):
    """A field that is ignored, or trains something else."""
    with pytest.raises(UserError, match=text):
        Flow(**fields)
