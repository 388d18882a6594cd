"""The Gaussian process with a terminal SNR of zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import registry
from dit_jax.diffusion import samplers
from dit_jax.diffusion.gaussian import Gaussian, betas
from dit_jax.diffusion.process import Memoryless, Prediction
from dit_jax.errors import UserError

PROCESS = Gaussian(prediction="v", variance="fixed_small", zero_terminal_snr=True)
X0, NOISE = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 1)).astype(np.float32)
MEAN, DEVIATION = 0.7, 0.4


def test_schedule():
    """Catches another shift or scale of the roots; the first entry must stay, the last be exactly zero."""
    plain, rescaled = np.sqrt(Gaussian().alpha_bar[1:]), np.sqrt(PROCESS.alpha_bar[1:])
    assert PROCESS.alpha_bar[0] == 1 and rescaled[-1] == 0
    np.testing.assert_allclose(rescaled[0], plain[0], rtol=1e-15)
    np.testing.assert_allclose(np.diff(rescaled) / np.diff(plain), plain[0] / (plain[0] - plain[-1]), rtol=1e-9)


def test_schedule_of_diffusers():
    """Catches a difference from diffusers' function, which is in float32."""
    torch = pytest.importorskip("torch")
    ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    theirs = ddim.rescale_zero_terminal_snr(torch.tensor(betas("linear", 1000), dtype=torch.float64))
    np.testing.assert_allclose(torch.cumprod(1 - theirs, 0).numpy(), PROCESS.alpha_bar[1:], atol=1e-12)


def test_the_last_timestep():
    """Catches a target other than -x0 where only noise is left, and a prediction that divides by the zero."""
    t = jnp.ones(3)
    np.testing.assert_array_equal(PROCESS.perturb(X0, NOISE, t), NOISE)
    assert float(PROCESS.loss(-X0, X0, NOISE, t)[0].max()) == 0
    read = PROCESS.predict(-X0, jnp.asarray(NOISE), t)
    np.testing.assert_array_equal(read.x0, X0)
    np.testing.assert_array_equal(read.noise, NOISE)
    assert float(jnp.abs(PROCESS.prior_bound(X0)).max()) == 0
    bound = PROCESS.bound(-X0, jnp.asarray(X0), jnp.asarray(NOISE), t)
    np.testing.assert_allclose(bound, 0, atol=1e-6)


def exact(process):
    """The best prediction for data from N(MEAN, DEVIATION^2)."""

    def denoise(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN)
        return Prediction(x0, (x - alpha * x0) / sigma, 0.0)

    return Memoryless(denoise)


def drawn(sampler, x):
    keys = jax.random.split(jax.random.key(1), len(x))
    return np.asarray(jax.jit(lambda x: sampler(PROCESS, exact(PROCESS), x, keys))(jnp.asarray(x)))


def test_ddim_is_exact():
    """Catches a first step that is not DDIM's at SNR 0: the solution of the ODE from noise z is MEAN + DEVIATION z, and
    one of two steps has a closed form."""
    z = np.random.default_rng(3).normal(size=(64, 1, 1, 1)).astype(np.float32)
    np.testing.assert_allclose(drawn(samplers.DDIM(1000), z), MEAN + DEVIATION * z, atol=1e-2)
    alpha, sigma = PROCESS.alpha_sigma(np.array([PROCESS.min_time]))
    x = alpha * MEAN + sigma * z  # after the first of two steps, whose x0 is the mean
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    np.testing.assert_allclose(drawn(samplers.DDIM(2), z), MEAN + gain * (x - alpha * MEAN), atol=1e-5)


@pytest.mark.parametrize("name", registry.names("sampler"))
def test_every_sampler(name):
    """Catches a sampler that returns NaN or other moments: it must draw the data, or say that it cannot."""
    steps = {} if name == "dopri5" else {"num_steps": 250}
    sampler = registry.get("sampler", name)(**steps)
    z = np.random.default_rng(4).normal(size=(4096, 1, 1, 1)).astype(np.float32)
    if name not in ("ddpm", "ddim", "dpmpp", "unipc", "dpmpp_sigma", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        with pytest.raises(UserError, match=r"choose ddim, ddpm, dpmpp|choose (another|heun)|needs a continuous process"):
            drawn(sampler, z)
        return
    x = drawn(sampler, z)
    assert abs(x.mean() - MEAN) < 0.02 and abs(x.std() - DEVIATION) < 0.015, (x.mean(), x.std())


def test_refusals():
    """Catches a network that predicts the noise, and a grid that starts from noise at a later time."""
    with pytest.raises(UserError, match=r"set process\.prediction to 'v' or 'x0'"):
        Gaussian(zero_terminal_snr=True)
    for steps, spacing in ((50, "stride"), (1, "even")):
        with pytest.raises(UserError, match="leave out the last timestep"):
            PROCESS.grid(steps, spacing)
