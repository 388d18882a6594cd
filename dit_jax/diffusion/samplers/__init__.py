"""Samplers: from noise to data.

A sampler is a frozen dataclass, called with (process, denoise, noise f32[B, ...], keys [B]) -> x0 f32[B, ...]; `noise` is x_t at
the first time of its grid, as `Process.start` makes it of standard normal noise.
`denoise(x_t, t, memory)` is a network with its parameters, condition and guidance bound (`process.Denoise`).
Coefficients are derived in float64 before the loop. Each example has its own key, so it does not depend on its batch.
`evaluations(process)` is the number of calls of `denoise`; None if it depends on the example.
`times(process)` are the times of the grid, float64, descending. A sampler that has it, and derives all else from it and from
`num_steps`, can start at any of these times (`late.started`); an adaptive one has none.

In comments and names: now = t, next = the next, less noisy time of the grid.
"""

from dit_jax import registry
from dit_jax.diffusion.samplers.adaptive import DormandPrince
from dit_jax.diffusion.samplers.ancestral import DDIM, Ancestral, ddim_invert
from dit_jax.diffusion.samplers.multistep import DPMSolverPlusPlus2M, DPMSolverPlusPlus2MSigma, UniPC
from dit_jax.diffusion.samplers.ode import AdamsBashforth, Euler, Heun
from dit_jax.diffusion.samplers.sde import EulerMaruyama
from dit_jax.diffusion.samplers.stochastic import DPMSolverPlusPlus2MSDE, DPMSolverPlusPlus3MSDE, StochasticHeun
from dit_jax.registry import register

__all__ = [
    "DDIM",
    "AdamsBashforth",
    "Ancestral",
    "DPMSolverPlusPlus2M",
    "DPMSolverPlusPlus2MSDE",
    "DPMSolverPlusPlus2MSigma",
    "DPMSolverPlusPlus3MSDE",
    "DormandPrince",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "StochasticHeun",
    "UniPC",
    "ddim_invert",
    "default_sampler",
]

register("sampler", "ddpm", Ancestral)
register("sampler", "ddim", DDIM)
register("sampler", "euler", Euler)
register("sampler", "heun", Heun)
register("sampler", "ab", AdamsBashforth)
register("sampler", "dopri5", DormandPrince)
register("sampler", "sde", EulerMaruyama)
register("sampler", "dpmpp", DPMSolverPlusPlus2M)
register("sampler", "dpmpp_sigma", DPMSolverPlusPlus2MSigma)
register("sampler", "unipc", UniPC)
register("sampler", "heun_sde", StochasticHeun)
register("sampler", "dpmpp_2m_sde", DPMSolverPlusPlus2MSDE)
register("sampler", "dpmpp_3m_sde", DPMSolverPlusPlus3MSDE)


def default_sampler(name: str) -> dict:
    """The name and every field of a sampler, as a config has them.

    Raises:
        UserError: no such sampler.
    """
    return {"name": name, **registry.defaults("sampler", name)}
