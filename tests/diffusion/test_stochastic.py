"""The samplers of EDM and k-diffusion against their formulas in NumPy float64, and all samplers on the EDM process."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest

from dit_jax import registry
from dit_jax.diffusion import samplers as s
from dit_jax.diffusion.edm import EDM
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.process import noise_like
from dit_jax.errors import UserError

EDM20, FLOW, GAUSSIAN = EDM(sigma_min=0.02, sigma_max=20.0), Flow(), Gaussian(variance="fixed_small")
NOISE = np.random.default_rng(0).normal(size=(16, 1, 1, 3))
KEYS = jax.random.split(jax.random.key(5), len(NOISE))
DENOISE = {EDM20: mixture.edm_denoise, FLOW: mixture.flow_denoise, GAUSSIAN: mixture.gaussian_denoise}


def drawn(process, sampler):
    with jax.enable_x64(True):
        draw = jax.jit(lambda x: sampler(process, DENOISE[process](process), x, KEYS))
        return np.asarray(draw(process.start(NOISE, 1.0)))


def z(step):
    return np.float64(noise_like(KEYS, NOISE.shape[1:], step))


def x0_of(y, level):
    """E[x0 | x0 + level noise = y]."""
    return mixture.expectations(y, 1.0, level, np)[0]


def churned_heun(y, levels, churn, low, high, deviation):
    """Karras et al. 2022, algorithm 2."""
    steps = len(levels) - 1
    for i, (now, after) in enumerate(itertools.pairwise(levels)):
        gamma = min(churn / steps, np.sqrt(2) - 1) if low <= now <= high else 0
        hat = now + gamma * now
        y = y + np.sqrt(hat**2 - now**2) * deviation * z(i)
        d = (y - x0_of(y, hat)) / hat
        nxt = y + (after - hat) * d
        if after:
            nxt = y + (after - hat) * (d + (nxt - x0_of(nxt, after)) / after) / 2
        y = nxt
    return y


def reverse_sde(y, levels, eta, deviation, order, rule):
    """The multistep solvers: integrals of e^(-(1 + eta)(h - u)) (1 + eta) p(u) over a step of length h in lambda, with the
    polynomial p through the last x0; "midpoint" and "half" are what the published formulas put in place of an integral."""
    known = []  # (lambda, x0), newest first
    for i, (now, after) in enumerate(itertools.pairwise(levels)):
        x0 = x0_of(y, now)
        known.insert(0, (-np.log(now), x0))
        if after == 0:
            return x0
        h = np.log(now / after)
        k = (1 + eta) * h
        constant = 1 - np.exp(-k)
        linear = (k - constant) / (1 + eta)  # of p(u) = u
        square = h**2 - 2 * linear / (1 + eta)
        y = np.exp(-k) * y + constant * x0
        if i >= 1 and order >= 2:
            (l0, a), (l1, b) = known[:2]
            first = (a - b) / (l0 - l1)
            if i >= 2 and order == 3:
                l2, c = known[2]
                second = (first - (b - c) / (l1 - l2)) / (l0 - l2)  # Newton's divided difference
                y = y + linear * (first + (l0 - l1) * second) + (0.5 if rule == "half" else 1) * square * second
            else:
                y = y + (constant * h / 2 if rule == "midpoint" else linear) * first
        y = y + z(i) * after * np.sqrt(1 - np.exp(-2 * eta * h)) * deviation * (eta > 0)
    raise AssertionError("the grid does not end at 0")


def levels_of(process, num_steps):
    """sigma / alpha of the grid; the first x / alpha."""
    alpha, sigma = process.alpha_sigma(process.grid(num_steps))
    return sigma / alpha, process.start(NOISE, 1.0) / alpha[0]


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    "make, order, rule",
    [
        (s.DPMSolverPlusPlus2MSDE, 2, "midpoint"),
        (functools.partial(s.DPMSolverPlusPlus2MSDE, solver="heun"), 2, "integral"),
        (s.DPMSolverPlusPlus3MSDE, 3, "half"),
        (functools.partial(s.DPMSolverPlusPlus3MSDE, curvature="taylor"), 3, "integral"),
    ],
)
@pytest.mark.parametrize("process", [EDM20, GAUSSIAN])
def test_multistep_trajectory(process, make, order, rule, eta):
    """Catches any coefficient that is not k-diffusion's, at every step of a run with the same noise."""
    levels, y = levels_of(process, 9)
    wanted = reverse_sde(y, levels, eta, 1.1, order, rule)
    close = {"rtol": 1e-8, "atol": 1e-10} if process is EDM20 else {"atol": 1e-5}  # the tables of gaussian are float32
    np.testing.assert_allclose(drawn(process, make(9, eta=eta, s_noise=1.1)), wanted, **close)


@pytest.mark.parametrize("churn, low, high", [(4.0, 0.0, np.inf), (40.0, 0.05, 5.0), (0.0, 0.0, np.inf)])
def test_churned_trajectory(churn, low, high):
    """Catches a gamma, an interval, a noise or a step that is not algorithm 2's."""
    levels, y = levels_of(EDM20, 11)
    found = drawn(EDM20, s.StochasticHeun(11, churn, low, high, 1.003))
    np.testing.assert_allclose(found, churned_heun(y, levels, churn, low, high, 1.003), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("process", [EDM20, FLOW, GAUSSIAN])
def test_without_noise_they_are_the_solvers(process):
    """Catches a variant for one process only: with no noise they are Heun and DPM-Solver++(2M) of every process."""
    np.testing.assert_allclose(drawn(process, s.StochasticHeun(8, 0.0)), drawn(process, s.Heun(8)), rtol=1e-10)
    plain = drawn(process, s.DPMSolverPlusPlus2M(8))
    np.testing.assert_allclose(drawn(process, s.DPMSolverPlusPlus2MSDE(8, 0.0)), plain, rtol=1e-10, atol=1e-12)


@functools.cache
def solution(sigma_min=EDM20.sigma_min):
    return mixture.edm_solution(dataclasses.replace(EDM20, sigma_min=sigma_min), EDM20.start(NOISE, 1.0))


@pytest.mark.parametrize(
    "make, order",
    [
        (s.Euler, 1),
        (s.DDIM, 1),
        (s.Heun, 2),
        (functools.partial(s.AdamsBashforth, order=3), 3),
        (s.UniPC, 3),  # on a smooth grid its corrector has the next order
        (functools.partial(s.StochasticHeun, s_churn=0.0), 2),
        (functools.partial(s.DPMSolverPlusPlus2MSDE, eta=0.0), 2),
        (functools.partial(s.DPMSolverPlusPlus2MSDE, eta=0.0, solver="heun"), 2),
        (functools.partial(s.DPMSolverPlusPlus3MSDE, eta=0.0), 2),
        (functools.partial(s.DPMSolverPlusPlus3MSDE, eta=0.0, curvature="taylor"), 3),
    ],
)
def test_order_on_edm(make, order):
    """Catches a sampler that loses its order on EDM's grid, where the clock is sigma and the start is not unit noise."""
    extrapolates = getattr(make, "func", None) is s.AdamsBashforth  # from sigma_min to 0; the others end with the predicted x0
    wanted = solution(1e-7) if extrapolates else solution()
    coarse, fine = (np.abs(drawn(EDM20, make(n)) - wanted).mean() for n in (120, 240))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25), (coarse, fine)


def test_adaptive_on_edm():
    """Catches an adaptive solver that ends away from the data, or takes the wrong rate of sigma."""
    for rtol, most in ((1e-3, 2e-2), (1e-6, 2e-5)):
        assert np.abs(drawn(EDM20, s.DormandPrince(rtol, rtol / 1e3)) - solution()).mean() < most


MOMENTS = {
    "heun_sde": {"num_steps": 60, "s_churn": 10.0},
    "dpmpp_2m_sde": {"num_steps": 60},
    "dpmpp_3m_sde": {"num_steps": 60},
    "ddpm": {"num_steps": 250},
}
SLOW = [
    pytest.param(process, name, marks=pytest.mark.slow)
    for process, name in ((EDM20, "ddpm"), (FLOW, "heun_sde"), (FLOW, "dpmpp_3m_sde"), (GAUSSIAN, "heun_sde"))
]


@pytest.mark.parametrize(
    "process, name",
    [*((EDM20, name) for name in ("heun_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")), *SLOW],
)
def test_moments(process, name):
    """Catches too much or too little noise in a step, or noise that repeats: the moments of the mixture, to 4 deviations."""
    count = 40_000
    sampler, denoise = registry.get("sampler", name)(**MOMENTS[name]), DENOISE[process](process)
    keys = jax.random.split(jax.random.key(1), 40)
    start = process.start(noise_like(jax.random.split(jax.random.key(2), 40), (1, 1, count // 40)), 1.0)
    x = np.float64(jax.jit(lambda x: sampler(process, denoise, x, keys))(start)).ravel()
    weights, means, variances = mixture.WEIGHTS, mixture.MEANS, mixture.VARIANCES
    mean, square = weights @ means, weights @ (means**2 + variances)
    assert x.mean() == pytest.approx(mean, abs=0.02)
    assert x.var() == pytest.approx(square - mean**2, rel=0.03)
    third = weights @ (means**3 + 3 * means * variances)
    assert (x**3).mean() == pytest.approx(third, abs=0.05)


def test_churn_rises_to_known_times():
    """Catches churn to a time that the network does not know, beyond the noisiest, or outside its interval."""
    sampler = s.StochasticHeun(10, 100.0, 0.1, 3.0)
    for process in (EDM20, FLOW, GAUSSIAN):
        times = process.grid(10)[:-1]
        raised = sampler.raised(process, times)
        alpha, sigma = process.alpha_sigma(times)
        with np.errstate(divide="ignore"):
            inside = (sigma / alpha >= 0.1) & (sigma / alpha <= 3.0)
        assert inside.any() and (raised[~inside] == times[~inside]).all() and (raised[inside] > times[inside]).all()
    np.testing.assert_allclose(raised * 1000, np.rint(raised * 1000), atol=1e-9)
    assert s.StochasticHeun(10, 100.0).raised(GAUSSIAN, np.ones(1)) == 1


@pytest.mark.parametrize("name", ["heun_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_examples_are_independent(name):
    """Catches noise that depends on the batch, or an output of another type."""
    process, sampler = EDM(), registry.get("sampler", name)(num_steps=4)
    draw = jax.jit(lambda x, keys: sampler(process, mixture.edm_denoise(process), x, keys))
    x = jnp.float32(80 * NOISE[:3])
    whole = draw(x, KEYS[:3])
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(draw(x[1:2], KEYS[1:2]), whole[1:2], atol=1e-5)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: s.StochasticHeun(s_churn=-1.0), "s_churn is -1.0"),
        (lambda: s.StochasticHeun(s_tmin=2.0, s_tmax=1.0), "s_tmin <= s_tmax"),
        (lambda: s.DPMSolverPlusPlus2MSDE(eta=-0.5), "eta is -0.5"),
        (lambda: s.DPMSolverPlusPlus2MSDE(solver="euler"), "midpoint, heun"),
        (lambda: s.DPMSolverPlusPlus3MSDE(s_noise=float("nan")), "s_noise is nan"),
        (lambda: s.DPMSolverPlusPlus3MSDE(curvature="exact"), "k_diffusion, taylor"),
        (lambda: drawn(EDM20, s.EulerMaruyama(5)), "interpolates between noise and data.* choose heun_sde"),
        (lambda: drawn(EDM20, s.DDIM(5, spacing="stride")), "use 'even'"),
    ],
)
def test_bad_fields(make, text):
    """Catches a field, or a pair of process and sampler, that gives noise instead of an error."""
    with pytest.raises(UserError, match=text):
        make()
