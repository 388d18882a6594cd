import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.guidance import Guidance
from dit_jax.errors import UserError

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
COND = {"label": jnp.array([1.0, 2.0, 3.0])}
CALLS = []


def strong(x, t, cond):
    """Two data and two variance channels."""
    jax.debug.callback(lambda: CALLS.append("strong"))
    return jnp.concatenate([x, x + 1], axis=-1) * cond["label"][:, None, None, None] + t[:, None, None, None]


def weak(x, t, cond):
    """A smaller network: data channels only."""
    jax.debug.callback(lambda: CALLS.append("weak"))
    return 0.5 * x * cond["label"][:, None, None, None]


def called():
    jax.effects_barrier()
    names = sorted(CALLS)
    CALLS.clear()
    return names


@pytest.mark.parametrize("channels, count", [(None, 2), (1, 1)])
def test_autoguidance(channels, count):
    """Guidance away from the null condition instead of the weak network, or a learned variance that is guided too."""
    out = Guidance(2.0, channels)(strong, COND, None, weak)(X, 0.5, 5.0)
    s, w = strong(X, jnp.full(3, 5.0), COND), weak(X, jnp.full(3, 5.0), COND)
    np.testing.assert_allclose(out, s.at[..., :count].set((2 * s[..., :2] - w)[..., :count]), rtol=1e-5, atol=1e-5)


def test_pays_for_the_weak_network_only_where_it_guides():
    """A second forward outside the interval, or at scale 1."""
    called()
    guided = jax.jit(Guidance(2.0, low=0.2, high=0.6)(strong, COND, None, weak))
    guided(X, 0.5, 5.0)
    assert called() == ["strong", "weak"]
    guided(X, 0.7, 5.0)
    assert called() == ["strong"]
    Guidance(1.0)(strong, COND, None, weak)(X, 0.5, 5.0)
    assert called() == ["strong"]


@pytest.mark.parametrize("second", [None, weak])
def test_interval_per_example(second):
    """Times that differ between examples (an adaptive solver's): each must have its own guidance and network time."""
    t = jnp.array([0.1, 0.4, 0.9])
    null = {"label": jnp.zeros(3)}
    guided = Guidance(3.0, low=0.2, high=0.6)(strong, COND, null, second)
    together = guided(X, t, 1 - t)
    for i in range(3):
        one = Guidance(3.0, low=0.2, high=0.6)(strong, {"label": COND["label"][i : i + 1]}, {"label": jnp.zeros(1)}, second)
        np.testing.assert_allclose(together[i : i + 1], one(X[i : i + 1], t[i], 1 - t[i]), rtol=1e-6)
    np.testing.assert_allclose(together[::2], strong(X, 1 - t, COND)[::2], rtol=1e-6)


def test_more_channels_than_data():
    """channels = 4 on 2 data channels, which would guide the learned variance."""
    with pytest.raises(UserError, match="at most 2"):
        Guidance(2.0, 4)(strong, COND, None, weak)(X, 0.5, 5.0)
