import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.likelihood import bits_per_dimension


def test_total_is_prior_and_terms():
    """A bound without its prior (which a full-length schedule hides: it is 1e-5 there), or a prior in nats."""
    process = Gaussian("scaled_linear", num_timesteps=20, variance="fixed_small")
    x0 = np.round(np.random.default_rng(0).uniform(-1, 1, (2, 3, 3, 1)) * 127.5) / 127.5
    keys = jax.random.split(jax.random.key(0), 2)
    bound = bits_per_dimension(process, lambda x, t: jnp.zeros_like(x), jnp.float32(x0), keys)
    left = process.alpha_bar[-1]
    prior = 0.5 * (left * x0**2 - left - np.log(1 - left)).mean((1, 2, 3)) / np.log(2)
    assert prior.min() > 0.5 and bound.terms.shape == (2, 20)
    np.testing.assert_allclose(bound.prior, prior, rtol=1e-4)
    np.testing.assert_allclose(bound.total, prior + bound.terms.sum(1), rtol=1e-4)


def test_noise_belongs_to_the_example_and_the_step():
    """Noise that is shared between examples or steps."""
    process, seen = Gaussian("scaled_linear", num_timesteps=20, variance="fixed_small"), []

    def network(x, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return x

    bits_per_dimension(process, network, jnp.zeros((2, 2, 2, 1)), jax.random.split(jax.random.key(0), 2))
    jax.effects_barrier()
    noise = np.stack(seen).reshape(40, -1)  # x0 is 0: each row is sigma(t) times its noise
    noise = noise / np.abs(noise).max(1, keepdims=True)
    assert len(np.unique(noise.round(4), axis=0)) == 40
