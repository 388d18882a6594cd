import functools

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest

from dit_jax.diffusion import samplers as s
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.process import Memoryless, Prediction, expand, noise_like
from dit_jax.diffusion.samplers import adaptive, sde
from dit_jax.errors import UserError

FLOW, GAUSSIAN = Flow(), Gaussian(variance="fixed_small")
NOISE = np.random.default_rng(0).normal(size=(32, 1, 1, 2))


@functools.cache
def problem(process):
    """(denoise, exact solution of the ODE from NOISE) for the mixture."""
    if process.continuous:
        return mixture.flow_denoise(process), mixture.flow_solution(process, NOISE)
    return mixture.gaussian_denoise(process), mixture.gaussian_solution(process, NOISE)


def error(process, sampler):
    denoise, solution = problem(process)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), len(NOISE))
        return np.abs(np.asarray(jax.jit(lambda x: sampler(process, denoise, x, keys))(NOISE)) - solution).mean()


@pytest.mark.parametrize(
    "process, make, order, num_steps",
    [
        (FLOW, s.Euler, 1, 40),
        (FLOW, s.DDIM, 1, 40),
        (FLOW, s.Heun, 2, 20),
        (Flow("gvp"), s.Heun, 2, 20),
        (FLOW, functools.partial(s.AdamsBashforth, order=2), 2, 40),
        (FLOW, functools.partial(s.AdamsBashforth, order=3), 3, 40),
        (FLOW, functools.partial(s.AdamsBashforth, order=4), 4, 40),
        (Flow(shift=2.0), functools.partial(s.AdamsBashforth, order=4), 4, 80),
        (FLOW, s.UniPC, 2, 40),
        (FLOW, s.DPMSolverPlusPlus2MSigma, 2, 40),
        (GAUSSIAN, s.Euler, 1, 40),
        (GAUSSIAN, s.Heun, 2, 40),
        (GAUSSIAN, functools.partial(s.AdamsBashforth, order=2), 2, 40),
        (GAUSSIAN, functools.partial(s.AdamsBashforth, order=3), 3, 40),
        (GAUSSIAN, functools.partial(s.AdamsBashforth, order=4), 4, 80),
        (GAUSSIAN, s.DPMSolverPlusPlus2M, 2, 40),
        (GAUSSIAN, s.UniPC, 2, 40),
    ],
)
def test_order_of_convergence(process, make, order, num_steps):
    """A coefficient, a start or a last step that costs a sampler its order."""
    coarse, fine = error(process, make(num_steps)), error(process, make(2 * num_steps))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.3), (coarse, fine)


def test_dpm_solver_on_a_flow():
    """A step at t = 1, where log SNR is infinite, that spoils DPM-Solver++: slope 1.5 to 2.3 from 10 to 80 steps."""
    slope = np.log2(error(FLOW, s.DPMSolverPlusPlus2M(10)) / error(FLOW, s.DPMSolverPlusPlus2M(80))) / 3
    assert 1.5 < slope < 2.3


def test_adaptive_tolerance():
    """An error estimate or step control that misses: the error must follow rtol over three decades."""
    errors = [error(FLOW, s.DormandPrince(rtol, rtol / 1e3)) for rtol in (1e-3, 1e-6)]
    assert errors[0] < 5e-3 and errors[1] < 5e-6


def test_dormand_prince_table():
    """A mistyped coefficient: Butcher's quadrature conditions to order 5 for the solution, 4 for the estimate, 1 for stages."""
    nodes = np.append(0, adaptive.NODES)
    np.testing.assert_allclose(adaptive.STAGES.sum(1), adaptive.NODES, rtol=1e-12)
    for weights, order in ((adaptive.STAGES[-1], 5), (adaptive.FOURTH_ORDER, 4)):
        powers = np.arange(order)
        np.testing.assert_allclose(nodes ** powers[:, None] @ weights, 1 / (powers + 1), rtol=1e-12)


def test_adaptive_steps_belong_to_the_example():
    """Error control over the batch: an example would change with its neighbours."""
    denoise, _ = problem(FLOW)
    x = jnp.asarray(NOISE, jnp.float32)
    draw = jax.jit(lambda x: s.DormandPrince()(FLOW, denoise, x, None))
    batch, alone = draw(x.at[1:].multiply(3.0)), draw(x[:1])
    np.testing.assert_allclose(batch[:1], alone, atol=1e-4)  # float32 rounding, through the step control, is 1e-5


def test_adaptive_ends_on_nan():
    """A loop without end when the network returns NaN, or a NaN that is hidden."""
    x = jnp.asarray(NOISE[:2], jnp.float32)
    denoise = Memoryless(lambda x, t: Prediction(x * jnp.nan, x, 0.0))
    out = jax.jit(lambda x: s.DormandPrince()(FLOW, denoise, x, None))(x)
    assert jnp.isnan(out).all()


MEAN, COVARIANCE = np.array([0.5, -1.0]), np.array([[0.5, 0.3], [0.3, 0.4]])
VALUES, VECTORS = np.linalg.eigh(COVARIANCE)


def correlated_denoise(process):
    """The best prediction for data from N(MEAN, COVARIANCE) in two channels."""

    def denoise(x, t):
        alpha, sigma = process.coefficients(t)[:2] if process.continuous else (process.alpha(t), process.sigma(t))
        alpha, sigma = expand(alpha, x), expand(sigma, x)
        off = (x - alpha * MEAN) @ VECTORS
        whitened = off / (alpha**2 * VALUES + sigma**2)
        return Prediction(MEAN + alpha * (VALUES * whitened) @ VECTORS.T, sigma * whitened @ VECTORS.T, 0.0)

    return Memoryless(denoise)


@pytest.mark.parametrize(
    "process, sampler",
    [
        (GAUSSIAN, s.Ancestral(250)),
        (FLOW, s.Ancestral(250)),
        (GAUSSIAN, s.DDIM(250, 0.5)),
        # A constant diffusion of 1 is stiff at the end, where the score is noise / sigma: 250 steps are too few for it.
        *((FLOW, s.EulerMaruyama(250, d, norm=0.1 if d == "constant" else 1.0)) for d in sde.DIFFUSIONS),
        (Flow("gvp"), s.EulerMaruyama(250, "sbdm", last_step="tweedie")),
    ],
)
def test_mean_and_covariance(process, sampler):
    """Too much or too little noise in a stochastic step, or noise that repeats between steps."""
    keys = jax.random.split(jax.random.key(1), 5_000)
    noise = noise_like(jax.random.split(jax.random.key(2), 5_000), (1, 1, 2))
    denoise = correlated_denoise(process)
    x = np.asarray(jax.jit(lambda x: sampler(process, denoise, x, keys))(noise)).reshape(-1, 2)
    # 4 standard deviations of the estimates are 0.04; the rest is for the step.
    np.testing.assert_allclose(x.mean(0), MEAN, atol=0.06)
    np.testing.assert_allclose(np.cov(x.T), COVARIANCE, atol=0.06)


def sample(process, sampler, num=None):
    x = jnp.asarray(NOISE[:num], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 32)[:num]
    return jax.jit(lambda x: sampler(process, correlated_denoise(process), x, keys))(x)


def test_ddim_eta_one_is_ancestral():
    """A noise level of DDIM that is not the posterior's."""
    np.testing.assert_allclose(sample(GAUSSIAN, s.DDIM(50, 1.0)), sample(GAUSSIAN, s.Ancestral(50)), atol=1e-5)


def test_euler_is_ddim_where_both_are_exact():
    """An Euler step that is not DDIM's: on a Gaussian process, and on a linear flow."""
    for process in (GAUSSIAN, FLOW):
        np.testing.assert_allclose(sample(process, s.Euler(20)), sample(process, s.DDIM(20)), atol=1e-5)


@pytest.mark.parametrize("process", [GAUSSIAN, FLOW])
def test_inversion_round_trip(process):
    """An inversion onto another grid: DDIM must return to the data, nearer with more steps."""
    denoise = correlated_denoise(process)
    x0 = MEAN + jnp.asarray(NOISE, jnp.float32) @ np.linalg.cholesky(COVARIANCE).T

    def away(num_steps):
        noise = s.ddim_invert(process, denoise, x0, num_steps)
        return float(jnp.abs(s.DDIM(num_steps)(process, denoise, noise, None) - x0).mean())

    assert away(100) < 0.03 and away(100) < 0.6 * away(50)


@pytest.mark.parametrize(
    "process, sampler",
    [
        (GAUSSIAN, s.Ancestral(5)),
        (GAUSSIAN, s.DDIM(5)),
        (GAUSSIAN, s.Euler(5)),
        (GAUSSIAN, s.Heun(5)),
        (FLOW, s.Heun(5)),
        (FLOW, s.AdamsBashforth(6, 2)),
        (FLOW, s.AdamsBashforth(6, 3)),
        (GAUSSIAN, s.AdamsBashforth(6, 4)),
        (FLOW, s.EulerMaruyama(5)),
        (FLOW, s.EulerMaruyama(5, last_step="none")),
        (GAUSSIAN, s.DPMSolverPlusPlus2M(5)),
        (FLOW, s.UniPC(5)),
    ],
)
def test_evaluations(process, sampler):
    """A cost that is reported wrong, or a network that runs at a time it does not know (t = 0 of a process with timesteps)."""
    times = []

    def denoise(x, t):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return Prediction(x, x, 0.0)

    sampler(process, Memoryless(denoise), jnp.ones((1, 1, 1, 1)), jax.random.split(jax.random.key(0), 1))
    jax.effects_barrier()
    assert len(times) == sampler.evaluations(process)
    assert min(times) >= process.min_time and max(times) == 1


@pytest.mark.parametrize("sampler", [s.DDIM(4, 0.5), s.EulerMaruyama(4), s.AdamsBashforth(4, 4), s.DormandPrince()])
def test_any_rank_and_any_batch(sampler):
    """A sampler that only knows images, or noise that depends on the batch."""
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 2, 2))
    keys = jax.random.split(jax.random.key(1), 3)
    draw = jax.jit(lambda x, keys: sampler(FLOW, correlated_denoise(FLOW), x, keys))
    whole = draw(x, keys)
    assert whole.shape == x.shape and whole.dtype == jnp.float32
    np.testing.assert_allclose(draw(x[1:2], keys[1:2]), whole[1:2], atol=1e-5)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: s.DDIM(eta=1.5), "eta"),
        (lambda: s.DDIM(spacing="log"), "even, stride"),
        (lambda: s.AdamsBashforth(order=5), "2, 3 or 4"),
        (lambda: s.AdamsBashforth(3, order=4), "at least 4"),
        (lambda: s.DormandPrince(rtol=0), "positive"),
        (lambda: s.EulerMaruyama(diffusion="SBDM"), "sbdm"),
        (lambda: s.EulerMaruyama(last_step="Mean"), "tweedie"),
        (lambda: s.EulerMaruyama(last_step_size=0.0), "none"),
        (lambda: s.EulerMaruyama(1), "at least 2"),
        (lambda: s.EulerMaruyama(norm=-1.0), "at least 0"),
        (lambda: sample(GAUSSIAN, s.EulerMaruyama(5)), "needs a continuous process"),
        (lambda: sample(GAUSSIAN, s.DormandPrince()), "needs a continuous process"),
        (lambda: sample(GAUSSIAN, s.Euler(1001)), "1 to 1000"),
        (lambda: sample(GAUSSIAN, s.DDIM(300, spacing="stride")), "'even'"),
        (lambda: sample(FLOW, s.Euler(0)), "at least 1"),
        (lambda: sample(FLOW, s.DDIM(5, spacing="stride")), "'even'"),
    ],
)
def test_bad_fields(make, text):
    """A field or a pair of process and sampler that gives noise instead of an error."""
    with pytest.raises(UserError, match=text):
        make()


def dpmpp_2m_of_sd3(denoised, x, sigmas):
    """Lu et al. 2022, algorithm 2, with alpha = 1 and lambda = -ln(sigma), as Stable Diffusion 3.5's code samples; NumPy."""
    position, before = -np.log(np.append(sigmas[:-1], 1e-300)), None
    for i in range(len(sigmas) - 1):
        x0, h = denoised(x, sigmas[i]), position[i + 1] - position[i]
        mixed = x0
        if before is not None and sigmas[i + 1] > 0:
            half = h / (position[i] - position[i - 1]) / 2
            mixed = (1 + half) * x0 - half * before
        x = sigmas[i + 1] / sigmas[i] * x + (1 - sigmas[i + 1] / sigmas[i]) * mixed
        before = x0
    return x


def test_dpm_solver_as_sd3_uses_it():
    """Catches an extrapolation in the log-SNR, which sd3.5's sampler of the same name does not make, and a wrong end."""
    process = Flow(shift=3.0, convention="sd3", sampling_grid="sd3")

    def denoised(x, t, xp=np):
        return xp.tanh(x[..., ::-1] + 2 * t) - 0.5 * x * t

    def denoise(x, t):
        x0 = denoised(x, t, jnp)
        return Prediction(x0, (x - (1 - t) * x0) / t, 0.0)

    with jax.enable_x64(True):
        draw = jax.jit(lambda sampler, x: sampler(process, Memoryless(denoise), x, None), static_argnums=0)
        found, other = (np.asarray(draw(sampler(8), NOISE)) for sampler in (s.DPMSolverPlusPlus2MSigma, s.DPMSolverPlusPlus2M))
    wanted = dpmpp_2m_of_sd3(denoised, NOISE, process.grid(8))
    np.testing.assert_allclose(found, wanted, atol=1e-10)
    assert np.abs(other - wanted).max() > 1e-3
