"""Forecasting what the blocks add: the series itself, and the steps at which they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dit_jax import build, recipes
from dit_jax.diffusion import samplers
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.forecast import Forecast, ForecastingDenoise, Memory
from dit_jax.diffusion.process import Memoryless
from dit_jax.errors import UserError
from dit_jax.models.dit import DiT


def polynomial(t):
    return jnp.stack([3 - 2 * t + 0.5 * t**2, t**2 - t])[None, :, None]  # [1, 2, 1]


@pytest.mark.parametrize("order, error", [(0, 0.12), (1, 0.05), (2, 0.02)])
def test_series(order, error):
    """Wrong differences, signs or factorials: each order must come closer to a parabola, on uneven times too."""
    forecast = Forecast(4, order)
    memory = forecast_start(order)
    for t in (1.0, 0.9, 0.85, 0.7):
        memory = forecast.learn(memory, polynomial(t), jnp.float32(t))
    found = np.abs(forecast.predict(memory, jnp.float32(0.65)) - polynomial(0.65)).max()
    assert error / 20 < found < error  # not exact at order 2: of unlike steps the second difference is not the derivative


def forecast_start(order):
    return Memory(jnp.zeros((order + 1, 1, 2, 1)), jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_series_of_even_steps(order):
    """A series that is not exact where it can be: constants and lines at any order, once enough steps are known."""

    def line(t):
        return jnp.full((1, 2, 1), 2.0 if order == 0 else 2.0 - 3 * t)

    forecast, memory = Forecast(4, order), forecast_start(order)
    for t in (1.0, 0.8, 0.6, 0.4):
        memory = forecast.learn(memory, line(t), jnp.float32(t))
    np.testing.assert_allclose(forecast.predict(memory, jnp.float32(0.25)), line(0.25), rtol=1e-5)


def counting(forecast, calls):
    """A denoiser with x0 = what the blocks add, which is t, and counts how often its blocks run."""

    def note(_):
        calls.append(1)

    def run(x, time, cond):
        jax.debug.callback(note, time[0])
        return x, jnp.broadcast_to(time[:, None, None], (len(x), 1, 1))

    def denoise_with(network):
        def denoise(x, t):
            return Flow().predict(network(x, jnp.full(len(x), t), {}), x, t)

        return denoise

    return ForecastingDenoise(forecast, run, lambda x, time, cond, residual: x, denoise_with)


@pytest.mark.parametrize("interval, warmup, steps", [(3, 3, 20), (1, 1, 7), (5, 1, 11), (4, 30, 12)])
def test_full_steps(interval, warmup, steps):
    """Blocks that run oftener than is said, or a schedule that forgets its warm-up."""
    calls, forecast = [], Forecast(interval, 1, warmup)
    jax.block_until_ready(samplers.DDIM(steps)(Flow(), counting(forecast, calls), jnp.ones((2, 1, 1, 1)), None))
    jax.effects_barrier()
    assert len(calls) == forecast.full_steps(steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        samplers.DDIM(12),
        *(
            pytest.param(sampler(12), marks=pytest.mark.slow if sampler is samplers.UniPC else pytest.mark.exhaustive)
            for sampler in (
                samplers.UniPC,
                samplers.DPMSolverPlusPlus2M,
                samplers.Euler,
                samplers.AdamsBashforth,
                samplers.EulerMaruyama,
            )
        ),
    ],
)
def test_of_a_network(sampler):
    """A network whose head ignores what is forecast, or a sampler that drops the memory: forecasts must come closer to the full
    run than repeating the last sum does, and interval 1 must be the full run."""
    network = DiT(2, 2, 32, 2, 0, 1)
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    params = network.init(jax.random.key(1), noise, jnp.zeros(2), {})["params"]
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)

    def part(name, *args):
        return network.apply({"params": params}, *args, method=name)

    def run(x, time, cond):
        embedded = part("embed", x, time, cond)
        after = part("run_blocks", embedded)
        return part("head", after, embedded, x.shape), after - embedded.x

    def run_head(x, time, cond, residual):
        embedded = part("embed", x, time, cond)
        return part("head", embedded.x + residual, embedded, x.shape)

    def denoise_with(network):
        return lambda x, t: Flow().predict(network(x, jnp.broadcast_to(t, x.shape[:1]), {}), x, t)

    def sample(forecast):
        keys = jax.random.split(jax.random.key(2), 2)
        denoise = ForecastingDenoise(forecast, run, run_head, denoise_with)
        return jax.jit(lambda x: sampler(Flow(), denoise, x, keys))(noise)

    whole, repeated, forecast = sample(Forecast(1)), sample(Forecast(3, 0)), sample(Forecast(3, 1))
    plain = Memoryless(denoise_with(lambda *args: network.apply({"params": params}, *args)))
    wanted = jax.jit(lambda x: sampler(Flow(), plain, x, jax.random.split(jax.random.key(2), 2)))(noise)
    np.testing.assert_allclose(whole, wanted, atol=2e-5)
    # A line through states that fresh noise has moved is no better than the last of them.
    bound = 0.1 if isinstance(sampler, samplers.EulerMaruyama) else np.abs(repeated - whole).max()
    assert 1e-5 < np.abs(forecast - whole).max() < bound


@pytest.mark.parametrize("overrides", [{"sampler": {"name": "heun", "num_steps": 5}}, {"sampler": {"name": "dopri5"}}])
def test_several_evaluations_a_step(overrides):
    """Heun's second evaluation, or a step that dopri5 takes back, taken for the next step's."""
    config = tiny.config(process=recipes.flow(), forecast={"interval": 2}, **overrides)
    with pytest.raises(UserError, match="several times per step"):
        build.Run(config).forecast


@pytest.mark.parametrize("field", [{"interval": 0}, {"order": -1}, {"warmup_steps": 0}])
def test_bad_fields(field):
    """A schedule that never runs the blocks."""
    with pytest.raises(UserError, match=f"forecast.{next(iter(field))} is"):
        Forecast(**field)
