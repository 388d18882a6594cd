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
from dit_jax.parallel.rules import path_name
from dit_jax.storage.fingerprint import leaf_names
from dit_jax.tasks.muon import as_matrices, kinds_of, muon, orthogonalize
from dit_jax.tasks.state import abstract_state


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


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_every_kernel_of_the_blocks_is_a_matrix(conditioning):
    """A kernel that is left to AdamW unnoticed, or a table that matches nothing."""
    network = tiny.dit(conditioning)
    state = jax.eval_shape(build.Run(tiny.config(model__conditioning=conditioning)).task.init, jax.random.key(0))
    names = [name for name in leaf_names(state.params) if kinds_of(network.matrices, name)]
    assert names == [name for name in leaf_names(state.params) if name.startswith("blocks") and name.endswith("kernel")]


@pytest.mark.slow
def test_the_same_update_on_every_mesh():
    """Matrices that are orthogonalized in parts, one part per device."""
    updated = []
    meshes = [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "data": 2}, {"tensor": 4, "data": 2}]
    for mesh in (make_mesh(data=1, devices=jax.devices()[:1]), *(make_mesh(**shape) for shape in meshes)):
        run = build.Run(tiny.config(optimizer={"name": "muon", "learning_rate": 0.1}, model__depth=1))
        like = abstract_state(run.task, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, like)
        params = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), like.params)
        grads = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), like.params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like.opt_state)
        params, grads, opt_state = jax.device_put(
            (params, grads, zeros), (shardings.params, shardings.params, shardings.opt_state)
        )
        step = jax.jit(run.optimizer.update, out_shardings=(shardings.params, shardings.opt_state))
        _, opt_state = step(grads, opt_state, params)
        updates, _ = step(jax.tree.map(lambda x: 0.5 - x, grads), opt_state, params)
        updated.append(jax.tree.map(np.asarray, updates))
    for other in updated[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updated[0], other)


def scaled(matrices, path, x):
    """Normal values over the root of the number of inputs, so that activations have one size at every width."""
    if x.ndim < 2:
        return x
    inputs = as_matrices(x, kinds_of(matrices, path_name(path)) or "io")[0].shape[-2]
    return jax.random.normal(jax.random.key(x.size), x.shape) / np.sqrt(inputs)


def change_of_activations(width, **fields):
    """The root mean square of what three steps of Muon change in the tokens behind the blocks."""
    network = tiny.dit(width=width, patch_size=4, depth=2)
    x, t, cond = jax.random.normal(jax.random.key(1), (8, 8, 8, 1)), jnp.linspace(0.1, 0.9, 8), {"label": jnp.arange(8)}
    like = jax.eval_shape(network.init, jax.random.key(0), x, t, cond)["params"]
    params = jax.tree_util.tree_map_with_path(lambda path, x: scaled(network.matrices, path, jnp.zeros(x.shape)), like)
    optimizer = muon(network.matrices, learning_rate=0.02, adam_learning_rate=1e-9, **fields)

    def loss(params):
        return jnp.mean((network.apply({"params": params}, x, t, cond)[..., :1] - jnp.roll(x, 1, 0)) ** 2)

    def step(carry, _):
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    def tokens(params):
        embedded = network.apply({"params": params}, x, t, cond, method="embed")
        return network.apply({"params": params}, embedded, method="run_blocks")

    @jax.jit
    def change(params):
        new = jax.lax.scan(step, (params, optimizer.init(params)), length=3)[0][0]
        return jnp.sqrt(jnp.mean((tokens(new) - tokens(params)) ** 2))

    return float(change(params))


@pytest.mark.slow
def test_activations_change_alike_at_every_width():
    """Catches a factor with which every width needs another rate (coordinate check, Yang et al. 2022, appendix D.1)."""
    changes = [change_of_activations(width) for width in (32, 256)]
    assert max(changes) < 1.5 * min(changes), changes


def test_a_network_without_matrices():
    """Muon that silently becomes AdamW."""
    with pytest.raises(UserError, match="optimizer 'muon' needs a network that says which of its parameters are matrices"):
        build.Run(tiny.autoencoder(optimizer={"name": "muon"})).optimizer
    with pytest.raises(UserError, match="beta is 1; it must be in"):
        muon({"w": "io"}, beta=1)
