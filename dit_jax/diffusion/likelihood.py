"""The variational bound of a network with a Gaussian process, in bits per dimension."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.process import noise_like
from dit_jax.errors import UserError


class VariationalBound(NamedTuple):
    """All in bits per dimension; total = prior + terms.sum(axis=1) is an upper bound on the negative log-likelihood.

    Fields:
        total, prior: f32[B].
        terms: f32[B, T]; term i - 1 is the step from timestep i: i = 1 the decoder, i = T the noisiest.
    """

    total: jax.Array
    prior: jax.Array
    terms: jax.Array


def bits_per_dimension(
    process: Gaussian, network: Callable[[jax.Array, jax.Array], jax.Array], x0: jax.Array, keys: jax.Array
) -> VariationalBound:
    """The variational bound of each example, with one noise draw for each of the T timesteps; T calls of the network.

    The predicted x0 is not clipped, so that the bound also holds for latents.

    Args:
        network: (x_t, f32[B] network time) -> [B, ..., process.output_channels(C)]; its condition is bound; no guidance.
        x0: f32[B, ..., C] in [-1, 1], quantised to 256 levels: the decoder's bins are 2/255 wide.
        keys: [B].

    Raises:
        UserError: the process has no discrete timesteps.

    Source: Ho et al. 2020, equation 5; Nichol & Dhariwal 2021, equations 4 to 7.
    """
    if process.continuous:
        raise UserError(
            f"the variational bound is a sum over discrete timesteps, which process {type(process).__name__.lower()!r} does not "
            "have; use process gaussian"
        )

    def term(index):
        t = jnp.full(len(x0), index / process.num_timesteps, jnp.float32)
        x_t = process.perturb(x0, noise_like(keys, x0.shape[1:], index), t)
        return process.bound(network(x_t, process.network_time(t)), x0, x_t, t)

    terms = jax.lax.map(term, jnp.arange(1, process.num_timesteps + 1)).T
    prior = process.prior_bound(x0)
    return VariationalBound(prior + terms.sum(axis=1), prior, terms)
