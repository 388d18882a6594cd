"""Samplers that start below t = 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import registry
from dit_jax.diffusion.edm import EDM
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.process import Memoryless, Prediction, expand
from dit_jax.diffusion.samplers import DormandPrince
from dit_jax.diffusion.samplers.late import can_start, start_time, started
from dit_jax.errors import UserError

PROCESSES = {"flow": Flow(), "shifted gvp": Flow("gvp", shift=3.0), "gaussian": Gaussian(), "edm": EDM(sigma_data=0.7)}
PAIRS = [
    (sampler, process)
    for sampler in registry.names("sampler")
    for process in PROCESSES
    if process != "edm"
    and (sampler in ("ab", "ddim", "ddpm", "dpmpp", "euler", "heun", "unipc") or (sampler == "sde" and process != "gaussian"))
]
PAIRS += [(sampler, "edm") for sampler in ("ab", "heun", "heun_sde", "dpmpp_3m_sde")]
PAIRS += [("heun_sde", "gaussian"), ("heun_sde", "flow"), ("dpmpp_2m_sde", "flow")]
STD = 0.7  # of the data, so that x_t has the standard deviation sqrt(alpha^2 STD^2 + sigma^2)
X = jax.random.normal(jax.random.key(0), (2, 1, 1, 600))
KEYS = jax.random.split(jax.random.key(1), 2)


def coefficients(process, t):
    one, zero = jnp.ones(()), jnp.zeros(())
    return process.perturb(one, zero, t), process.perturb(zero, one, t)


def exact(process, calls):
    """The denoiser of N(0, STD^2) data; it records its times."""

    def function(x, t):
        jax.debug.callback(lambda t: calls.append(float(np.ravel(t)[0])), t, ordered=True)
        alpha, sigma = (expand(c, x) for c in coefficients(process, t))
        variance = alpha**2 * STD**2 + sigma**2
        return Prediction(alpha * STD**2 / variance * x, sigma / variance * x, 0.0)

    return Memoryless(function)


@pytest.mark.parametrize("name, of", PAIRS)
def test_rest_of_the_own_grid(name, of):
    """Catches a start on another grid than the sampler's, coefficients of the first steps on the last, a wrong count
    of evaluations, and a last step that misses the data."""
    process, sampler, calls, full = PROCESSES[of], registry.get("sampler", name)(num_steps=120), [], []
    late = started(sampler, process, 0.6)
    assert late.skipped > 5 and late.num_steps == 120 - late.skipped
    t = start_time(late, process)
    assert t <= 0.6 < sampler.times(process)[late.skipped - 1]
    alpha, sigma = (float(c) for c in coefficients(process, jnp.float32(t)))
    found = late(process, exact(process, calls), np.hypot(alpha * STD, sigma) * X, KEYS)
    jax.effects_barrier()
    assert len(calls) == late.evaluations(process)
    assert calls[0] > t if name == "heun_sde" else calls[0] == pytest.approx(t)  # heun_sde raises t first
    jax.block_until_ready(sampler(process, exact(process, full), process.start(X, 1.0), KEYS))
    jax.effects_barrier()
    if name != "ab":  # its first points are computed several times
        assert calls == full[-len(calls) :]
    assert float(found.std()) == pytest.approx(STD, rel=0.1)
    if name in ("ddim", "dpmpp", "euler", "heun", "unipc", "ab"):
        np.testing.assert_allclose(found, STD * X, rtol=0.1)


@pytest.mark.parametrize("of", PROCESSES)
def test_continues_the_full_trajectory(of):
    """Catches a start beside the right time: the rest from x_t of a full run must end where that ends, to rounding."""
    process, sampler, states = PROCESSES[of], registry.get("sampler", "heun")(num_steps=12), []

    def recording(x, t):
        jax.debug.callback(lambda t, x: states.append((float(np.ravel(t)[0]), x)), t, x, ordered=True)
        return exact(process, []).function(x, t)

    end = sampler(process, Memoryless(recording), process.start(X, 1.0), KEYS)
    jax.effects_barrier()
    late = started(sampler, process, 0.5)
    x_t = [x for t, x in states if t == pytest.approx(start_time(late, process), abs=1e-6)][-1]  # after the corrector
    np.testing.assert_allclose(late(process, exact(process, []), jnp.asarray(x_t), KEYS), end, rtol=1e-5, atol=1e-6)


def test_all_of_it_is_the_sampler_itself():
    """Catches strength 1 that compiles or rounds otherwise than generation."""
    sampler = registry.get("sampler", "ddpm")()
    assert started(sampler, Gaussian(), 1.0) is sampler


def test_refusals():
    """Catches a start that is silently another than asked for."""
    assert not can_start(DormandPrince())
    names = "ab, ddim, ddpm, dpmpp, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sigma, euler, heun, heun_sde, sde, unipc"
    with pytest.raises(UserError, match=f"no grid of times; choose one of {names}"):
        started(DormandPrince(), Flow(), 0.5)
    with pytest.raises(UserError, match=r"strength=0.05 is below the last noisy time of the sampler's grid, 0.1; take a greater"):
        started(registry.get("sampler", "euler")(num_steps=10), Flow(), 0.05)
    with pytest.raises(UserError, match=r"strength=0.1 leaves 1 of 10 steps: .* needs at least 3"):
        started(registry.get("sampler", "ab")(num_steps=10, order=3), Flow(), 0.1)
