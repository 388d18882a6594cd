"""Muon against NumPy, optax and singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tiny

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.parallel.mesh import make_mesh
from dit_jax.storage.fingerprint import leaf_names
from dit_jax.tasks.muon import as_matrices, kinds_of, muon, orthogonalize
from dit_jax.tasks.state import abstract_state, create_sharded


def newton_schulz(x, num_iterations):
    """In float64, matrix by matrix, with the square on the left whatever the shape."""
    x = x.astype(np.float64) / np.linalg.norm(x)
    for _ in range(num_iterations):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (9, 4), (1, 6)])
def test_orthogonalize(shape):
    """The wrong coefficients, a transpose that is not undone, or one norm for a whole stack."""
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32) * np.array([1.0, 1e3])[:, None, None]
    y = np.asarray(orthogonalize(jnp.asarray(x)))
    for one, other in zip(x, y, strict=True):
        np.testing.assert_allclose(other, newton_schulz(one, 5), atol=2e-5)
    values = np.linalg.svd(y, compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    assert not np.asarray(orthogonalize(jnp.zeros(shape))).any()


def test_axes():
    """Heads of one matrix that are treated as several, queries and keys as one, or a layout that does not come back."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 3, 2, 5))  # layers, D, (q, k, v), heads, E
    flat, back = as_matrices(x, "isoo")
    assert flat.shape == (4, 3, 6, 10)
    np.testing.assert_array_equal(flat[1, 2], x[1, :, 2].reshape(6, 10))
    np.testing.assert_array_equal(back(flat), x)
    flat, back = as_matrices(x[:, 0], "iio")
    assert flat.shape == (4, 6, 5)
    np.testing.assert_array_equal(back(flat), x[:, 0])


def test_an_update():
    """Another momentum, factor or decay than the reference's, over several steps."""
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "b": jnp.ones((6,))}
    optimizer = muon({"w": "io"}, learning_rate=0.1, beta=0.9, weight_decay=0.5, adam_learning_rate=0.01, warmup_steps=2)
    state, momentum = optimizer.init(params), np.zeros((4, 6))
    reference = optax.adamw(optax.linear_schedule(0.005, 0.01, 1), weight_decay=0.5)
    adam = reference.init(params["b"])
    for step in range(3):
        grads = {"w": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "b": jnp.asarray(rng.normal(size=6), jnp.float32)}
        updates, state = optimizer.update(grads, state, params)
        gradient = np.asarray(grads["w"], np.float64)
        momentum = 0.9 * momentum + 0.1 * gradient
        wanted = np.sqrt(6 / 4) * newton_schulz(0.9 * momentum + 0.1 * gradient, 5) + 0.5 * np.asarray(params["w"])
        np.testing.assert_allclose(updates["w"], -optimizer.rate(step) * wanted, atol=1e-5)
        bias, adam = reference.update(grads["b"], adam, params["b"])
        np.testing.assert_allclose(updates["b"], bias, rtol=1e-5)
        params = optax.apply_updates(params, updates)
    assert [optimizer.rate(step) for step in range(3)] == pytest.approx([0.05, 0.1, 0.1])


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_optax(consistent_rms):
    """A difference to optax's Muon, which corrects the bias of the momentum: the same direction without Nesterov's step."""
    params = {"w": jax.random.normal(jax.random.key(0), (3, 5))}
    ours = muon({"w": "io"}, learning_rate=0.1, nesterov=False, consistent_rms=consistent_rms)
    theirs = optax.contrib.muon(0.1, nesterov=False, consistent_rms=consistent_rms)
    states = [ours.init(params), theirs.init(params)]
    for step in range(3):
        grads = {"w": jax.random.normal(jax.random.key(step), (3, 5))}
        (one, states[0]), (two, states[1]) = ours.update(grads, states[0], params), theirs.update(grads, states[1], params)
        np.testing.assert_allclose(one["w"], two["w"], rtol=1e-4, atol=1e-6)


def config(**fields):
    return tiny.config(optimizer={"name": "muon", **fields})


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_every_kernel_of_the_blocks_is_a_matrix(conditioning):
    """A kernel that is left to AdamW unnoticed, or a table that matches nothing."""
    network = tiny.dit(conditioning)
    state = jax.eval_shape(build.Run(tiny.config(model__conditioning=conditioning)).task.init, jax.random.key(0))
    names = [name for name in leaf_names(state.params) if kinds_of(network.matrices, name)]
    assert names == [name for name in leaf_names(state.params) if name.startswith("blocks") and name.endswith("kernel")]


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "data": 2}])
def test_the_same_update_on_every_mesh(shape):
    """Matrices that are orthogonalized in parts, one part per device."""
    updated = []
    for mesh in (make_mesh(data=1, devices=jax.devices()[:1]), make_mesh(**shape)):
        run = build.Run(config(learning_rate=0.1))
        state = create_sharded(run.task, jax.random.key(0), mesh)
        grads = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), state.params)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run.task, mesh))
        grads = jax.device_put(grads, shardings.params)
        step = jax.jit(run.optimizer.update, out_shardings=(shardings.params, shardings.opt_state))
        updates, opt_state = step(grads, state.opt_state, state.params)
        updates, _ = step(grads, opt_state, state.params)
        updated.append(jax.tree.map(np.asarray, updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *updated)


@pytest.mark.slow
def test_activations_change_alike_at_every_width():
    """A factor that lets the step's effect grow or vanish with the width (coordinate check, Yang et al. 2022, appendix D.1)."""
    changes = []
    for width in (64, 256):
        x = jax.random.normal(jax.random.key(1), (16, width))
        w = jax.random.normal(jax.random.key(0), (width, 4 * width)) / np.sqrt(width)
        optimizer = muon({"w": "io"}, learning_rate=0.1)
        grads = {"w": jax.grad(lambda w, x=x: jnp.sum(jnp.tanh(x @ w) ** 2))(w)}
        updates, _ = optimizer.update(grads, optimizer.init({"w": w}), {"w": w})
        changes.append(float(jnp.sqrt(jnp.mean((x @ updates["w"]) ** 2))))
    assert 0.5 < changes[0] / changes[1] < 2


def test_a_network_without_matrices():
    """Muon that silently becomes AdamW."""
    with pytest.raises(UserError, match="optimizer 'muon' needs a network that says which of its parameters are matrices"):
        build.Run(tiny.autoencoder(optimizer={"name": "muon"})).optimizer
    with pytest.raises(UserError, match="beta is 1; it must be in"):
        muon({"w": "io"}, beta=1)
