"""The EDM process against formulas of the paper and of k-diffusion in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from dit_jax.diffusion.edm import EDM
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance
from dit_jax.diffusion.likelihood import bits_per_dimension
from dit_jax.errors import UserError

RNG = np.random.default_rng(0)
X0, NOISE, OUTPUT = (RNG.normal(size=(5, 3, 4, 2)) for _ in range(3))
SIGMA = np.array([0.002, 0.05, 0.7, 9.0, 120.0])  # the last is above sigma_max


def scalings(sigma, data):
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, table 1."""
    total = sigma**2 + data**2
    return data**2 / total, sigma * data / np.sqrt(total), 1 / np.sqrt(total), np.log(sigma) / 4


@pytest.mark.parametrize("data", [0.5, 1.3])
def test_preconditioning(data):
    """Catches a wrong scaling of the network's input, time or output, and cancellation in float32 at either end."""
    process = EDM(sigma_data=data, rho=5.0)
    t = jnp.float32((SIGMA / 80) ** (1 / 5))
    sigma = SIGMA.reshape(-1, 1, 1, 1)
    skip, out, into, time = scalings(sigma, data)
    x_t = X0 + sigma * NOISE
    np.testing.assert_allclose(process.perturb(jnp.float32(X0), jnp.float32(NOISE), t), x_t, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(process.network_input(jnp.float32(x_t), t), into * x_t, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(process.network_time(t), time.ravel(), rtol=1e-5, atol=1e-6)
    found = process.predict(jnp.float32(OUTPUT), jnp.float32(x_t), t)
    x0 = skip * x_t + out * OUTPUT
    np.testing.assert_allclose(found.x0, x0, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.noise, into * (sigma * into * x_t - data * OUTPUT), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.x0 + sigma * found.noise, x_t, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["edm", "soft_min_snr", "snr"])
def test_loss(name):
    """Catches a target or weight in another space: all three must also be the known weights on the squared error of x0."""
    data, sigma = 0.5, SIGMA.reshape(-1, 1, 1, 1)
    process, t = EDM(loss_weight=name), jnp.float32((SIGMA / 80) ** (1 / 7))
    skip, out, *_ = scalings(sigma, data)
    x_t = X0 + sigma * NOISE
    mask = RNG.integers(0, 2, size=(5, 3, 4, 1))
    errors = mask * (skip * x_t + out * OUTPUT - X0) ** 2
    on_x0 = {"edm": (SIGMA**2 + data**2) / (SIGMA * data) ** 2, "soft_min_snr": 1 / (SIGMA**2 + data**2), "snr": SIGMA**-2}
    loss, parts = process.loss(jnp.float32(OUTPUT), jnp.float32(X0), jnp.float32(NOISE), t, jnp.asarray(mask))
    np.testing.assert_allclose(loss, on_x0[name] * errors.mean((1, 2, 3)), rtol=2e-5)
    np.testing.assert_allclose(parts["mse"], (errors / out**2).mean((1, 2, 3)), rtol=2e-5)


def test_log_normal_times():
    """Catches times of another distribution: quantiles of ln(sigma)."""
    process = EDM(log_sigma_mean=-0.4, log_sigma_std=1.5, sigma_max=60.0)
    t = np.sort(np.float64(jax.jit(process.sample_time, static_argnums=1)(jax.random.key(0), 20_000)))
    assert t.max() > 1  # above sigma_max, which is not clipped
    log_sigma = np.log(60) + 7 * np.log(t)
    quantiles = (np.arange(len(t)) + 0.5) / len(t)
    assert np.abs(norm.cdf(log_sigma, -0.4, 1.5) - quantiles).max() < 0.015  # 99.98 % of the Kolmogorov-Smirnov distances


def log_snr(u, side, high, low=1e-3, largest=1e3):
    """k-diffusion's `rand_cosine_interpolated` for data of deviation 0.5, as simple diffusion's equations have it."""

    def shifted(d):
        shift = 2 * math.log(d / side)
        ends = [math.atan(math.exp(-0.5 * (2 * math.log(0.5 / sigma) - shift))) for sigma in (largest, low)]
        return shift - 2 * np.log(np.tan(ends[0] + u * (ends[1] - ends[0])))

    return (1 - u) * shifted(32) + u * shifted(high)


def test_interpolated_cosine_times():
    """Catches swapped ends of the interpolation, a u that is not stratified, and a tangent that loses its digits in float32."""
    process = EDM(time_distribution="interpolated_cosine", image_side=128, high_side=256, loss_weight="soft_min_snr")
    batch, key = 512, jax.random.key(3)
    t = np.float64(jax.jit(process.sample_time, static_argnums=1)(key, batch))
    u = (np.arange(batch) + np.float64(jax.random.uniform(key, (batch,)))) / batch
    sigma = 0.5 * np.exp(-log_snr(u, 128, 256) / 2)
    np.testing.assert_allclose(80 * t**7, sigma, rtol=1e-4)
    assert sigma.max() > 50 and sigma.min() < 0.05 and (np.diff(sigma) < 0).mean() > 0.9


def test_grid():
    """Catches a grid that is not equation 5, or that misses an end."""
    process, n = EDM(sigma_min=0.01, sigma_max=160.0, rho=7.0), 18
    i = np.arange(n)
    karras = (160 ** (1 / 7) + i / (n - 1) * (0.01 ** (1 / 7) - 160 ** (1 / 7))) ** 7
    times = process.grid(n)
    np.testing.assert_allclose(process.alpha_sigma(times)[1], np.append(karras, 0), rtol=1e-10)
    assert times[0] == 1 and times[-2] == process.min_time and process.grid(1).tolist() == [1, 0]


@pytest.mark.parametrize("process", [EDM(), Flow(), Flow("gvp"), Gaussian()])
def test_times_of_noise_levels(process):
    """Catches an inverse of another schedule than the process's own, and a start that is not standard noise times sigma."""
    times = np.array([0.003, 0.2, 0.77, 0.998])
    alpha, sigma = process.alpha_sigma(times)
    np.testing.assert_allclose(process.time_of(sigma / alpha), times, rtol=1e-9)
    alpha, sigma = process.alpha_sigma(np.ones(()))
    np.testing.assert_allclose(process.start(jnp.float32(NOISE), 1.0), np.hypot(alpha, sigma) * NOISE, rtol=1e-4)


def test_rates():
    """Catches a wrong derivative in `coefficients`, on which the adaptive solver depends."""
    process, t, h = EDM(), np.array([0.3, 0.9]), 1e-6
    c, after, before = (process.coefficients(t + s, np) for s in (0, h, -h))
    np.testing.assert_allclose(c.sigma_rate, (after.sigma - before.sigma) / (2 * h), rtol=1e-6)
    assert (c.alpha == 1).all() and (c.alpha_rate == 0).all()


def test_guidance_interval_above_one():
    """Catches a sampler's first step that is not guided, because churn raises t above 1."""
    guidance = Guidance(2.0, low=0.5, high=1.0)
    cond = {"label": jnp.ones(1)}
    call = guidance(lambda x, t, c: x * c["label"].reshape(-1, 1), cond, {"label": jnp.zeros(1)})
    for t, scale in ((1.05, 2), (0.7, 2), (0.4, 1)):
        assert float(call(jnp.ones((1, 1)), jnp.float32(t), t)[0, 0]) == scale


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"sigma_data": 0.0}, "sigma_data is 0.0; it must be positive"),
        ({"sigma_min": 90.0}, "sigma_min is 90.0; it must be below process.sigma_max, 80.0"),
        ({"rho": -1.0}, "rho is -1.0"),
        ({"loss_weight": "min_snr"}, "edm, soft_min_snr, snr"),
        ({"time_distribution": "uniform"}, "log_normal, interpolated_cosine"),
        ({"time_distribution": "interpolated_cosine"}, "--config.process.image_side=256"),
        (
            {"time_distribution": "interpolated_cosine", "image_side": 64, "log_sigma_std": 1.0},
            "no effect on interpolated_cosine",
        ),
        ({"image_side": 64}, "no effect on log-normal times"),
    ],
)
def test_bad_fields(fields, text):
    """Catches a field that is ignored or gives NaN."""
    with pytest.raises(UserError, match=text):
        EDM(**fields)


def test_refusals():
    """Catches a grid of timesteps, or a bound over timesteps, of a process that has none."""
    with pytest.raises(UserError, match="use 'even'"):
        EDM().grid(10, "stride")
    with pytest.raises(UserError, match="at least 1"):
        EDM().grid(0)
    with pytest.raises(UserError, match="process 'edm' does not have; use process gaussian"):
        bits_per_dimension(EDM(), None, None, None)
