"""A mixture of two normals per value, for which the optimal network of any process is known; float64 under jax.enable_x64."""

import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from dit_jax.diffusion.flow import velocity_of
from dit_jax.diffusion.process import Memoryless, Prediction

WEIGHTS, MEANS, VARIANCES = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.3, 0.2])


def expectations(x, alpha, sigma, xp=jnp):
    """E[x0 | x_t = x], E[noise | x_t = x] for x = alpha x0 + sigma noise; alpha and sigma are scalars or [B] for x [B, ...]."""
    alpha, sigma = (xp.asarray(a).reshape(xp.asarray(a).shape + (1,) * (x.ndim + 1 - xp.asarray(a).ndim)) for a in (alpha, sigma))
    off = x[..., None] - alpha * MEANS
    variance = alpha**2 * VARIANCES + sigma**2
    log_p = xp.log(WEIGHTS) - 0.5 * xp.log(variance) - 0.5 * off**2 / variance
    p = xp.exp(log_p - log_p.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    return (p * (MEANS + alpha * VARIANCES / variance * off)).sum(-1), (p * sigma / variance * off).sum(-1)


def flow_denoise(process):
    def denoise(x, t):
        c = process.expanded(t, x)
        return process.predict(velocity_of(*expectations(x, c.alpha, c.sigma), c), x, t)

    return Memoryless(denoise)


def gaussian_denoise(process):
    """The optimal network for noise prediction, with tables in float64 instead of the process's float32."""

    def denoise(x, t):
        alpha_bar = jnp.asarray(process.alpha_bar)[process.index(t)]
        return process.predict(expectations(x, jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar))[1], x, t)

    return Memoryless(denoise)


def edm_denoise(process):
    """The optimal network for data plus noise."""

    def denoise(x, t):
        sigma = process.sigma(jnp.asarray(t, x.dtype))
        return Prediction(*expectations(x, jnp.ones_like(sigma), sigma), 0.0)

    return Memoryless(denoise)


def edm_solution(process, x):
    """The predicted x0 at sigma_min at the end of the ODE that starts from x at sigma_max."""
    end = solve(lambda sigma, x: expectations(x, 1.0, sigma, np)[1], process.sigma_max, process.sigma_min, x)
    return expectations(end, 1.0, process.sigma_min, np)[0]


def flow_solution(process, noise):
    """The solution of the ODE at t = 0, to 1e-11, by SciPy."""

    def velocity(s, x):
        c = process.coefficients(np.float64(1 - s), np)
        return velocity_of(*expectations(x, c.alpha, c.sigma, np), c)

    return solve(velocity, 0, 1, noise)


def gaussian_solution(process, noise):
    """The solution for a variance-preserving process, integrated in sigma / alpha."""

    def slope(ratio, y):
        alpha = 1 / np.sqrt(1 + ratio**2)
        return expectations(alpha * y, alpha, alpha * ratio, np)[1]

    scale, clock = process.ode(np.array([1.0, 0.0]))
    return solve(slope, *clock, noise / scale[0])


def solve(slope, start, end, x):
    return solve_ivp(slope, (start, end), np.ravel(x), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1].reshape(x.shape)
