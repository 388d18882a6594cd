import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dit_jax import build
from dit_jax.diffusion.guidance import Guidance
from dit_jax.diffusion.samplers import DDIM, Ancestral
from dit_jax.parallel.mesh import make_mesh, shard_batch
from dit_jax.sample.generator import Generator
from dit_jax.sample.labels import spread_labels
from dit_jax.tasks.compiled_step import compile_step
from dit_jax.tasks.state import abstract_state, create_sharded

MESHES = [(2, 2, 2), *(pytest.param(mesh, marks=pytest.mark.exhaustive) for mesh in ((1, 4, 2), (8, 1, 1), (4, 2, 1), (1, 1, 8)))]
CONSTANTS = {"codec": {}}
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.uint8),
    "label": np.arange(16, dtype=np.int32) % 10,
}


def randomized(task, mesh):
    """A sharded state whose weights are not zero, the same numbers on every mesh."""
    like = abstract_state(task, mesh)
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(x.dtype), like.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    state = zeros.replace(params=params, ema_params=jax.tree.map(lambda x: (x + 0.01).astype(np.float32), params))
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, like)


def one_step(task, mesh, steps=1):
    state = randomized(task, mesh)
    batch = shard_batch(mesh, BATCH)
    step, zeros, _ = compile_step(task, mesh, 0, state, CONSTANTS, batch)
    sums = zeros()
    for _ in range(steps):
        state, sums = step(state, sums, CONSTANTS, batch)
    return jax.device_get(state), jax.device_get(sums)


@pytest.fixture(scope="module")
def single():
    task = build.Run(tiny.config(model__heads=8)).task
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    samples = draw(task, mesh, 16)
    return one_step(task, mesh), samples


def draw(task, mesh, count, batch_size=16, guidance=1.5):
    generator = Generator(task, mesh, Ancestral(4), Guidance(guidance), batch_size, seed=3)
    return generator(randomized(task, mesh).params, CONSTANTS, {"label": spread_labels(count, 10)}, count)


@pytest.mark.parametrize("shape", MESHES)
def test_one_device_is_every_mesh(single, shape):
    """A sharding under which XLA gives other numbers (seen with gate and MLP split alike), in a step or a sample."""
    task, mesh = build.Run(tiny.config(model__heads=8)).task, make_mesh(*shape)
    (state, sums), samples = single
    sharded, sharded_sums = one_step(task, mesh)
    # Adam's first step is the sign of the gradient times the rate: compare what does not blow rounding up, too.
    assert tiny.distance(sharded.opt_state, state.opt_state) < 1e-4
    assert tiny.distance(sharded.params, state.params) < 1e-4
    assert tiny.distance(sharded.ema_params, state.ema_params) < 1e-5
    assert tiny.distance(sharded_sums, sums) < 1e-4
    difference = np.abs(draw(task, mesh, 16).astype(int) - samples)
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_state_is_split():
    """Parameters, moments or the average that stay whole on every device although the mesh could split them."""
    task = build.Run(tiny.config(model__heads=8)).task
    state = create_sharded(task, jax.random.key(0), make_mesh(2, 2, 2))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held < 0.45 * sum(x.nbytes for x in jax.tree.leaves(state))


def test_starts_at_the_parameters():
    """An average that starts from zeros, or shares its buffer with the parameters (donation would fail)."""
    task = build.Run(tiny.config()).task
    state = create_sharded(task, jax.random.key(0), make_mesh(1, 1, 1, jax.devices()[:1]))
    assert tiny.distance(state.ema_params, state.params) == 0
    kernel = state.params["patch_embedding"]["kernel"]
    assert kernel.unsafe_buffer_pointer() != state.ema_params["patch_embedding"]["kernel"].unsafe_buffer_pointer()


@pytest.mark.slow
def test_ema_follows_in_float32():
    """A decay applied to the wrong side, or an average kept in 16 bits, where 1 - 0.9999 vanishes."""
    task = build.Run(tiny.config(model__param_dtype="bfloat16", ema_decay=0.9999)).task
    state = create_sharded(task, jax.random.key(0), make_mesh(1, 1, 1, jax.devices()[:1]))
    new, _ = jax.jit(task.step)(state, CONSTANTS, BATCH, jax.random.key(1))
    for old, params, ema in zip(*(jax.tree.leaves(x) for x in (state.ema_params, new.params, new.ema_params)), strict=True):
        assert ema.dtype == jnp.float32
        np.testing.assert_allclose(ema, old + 1e-4 * (params.astype(jnp.float32) - old), atol=1e-9)


@pytest.mark.slow
def test_microbatches_change_nothing():
    """Gradients that are summed instead of averaged, other noise per part, or losses given to the wrong time."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    whole, sums = one_step(build.Run(tiny.config()).task, mesh)
    parts, part_sums = one_step(build.Run(tiny.config(microbatches=4)).task, mesh)
    assert tiny.distance(parts.opt_state, whole.opt_state) < 1e-5
    assert tiny.distance(part_sums, sums) < 1e-5


def test_skips_a_step_that_is_not_finite():
    """A NaN that reaches parameters, moments or the average; a step count that stands still (its batch would repeat)."""
    task = build.Run(tiny.config()).task
    state = randomized(task, make_mesh(1, 1, 1, jax.devices()[:1]))
    bad = state.replace(params=jax.tree.map(lambda x: x, state.params))
    bad.params["final"]["linear"]["bias"] = bad.params["final"]["linear"]["bias"] + jnp.nan
    new, sums = jax.jit(task.step)(bad, CONSTANTS, BATCH, jax.random.key(1))
    assert new.step == state.step + 1 and sums["skipped"][0] == 1 and sums["loss"][1] == 0
    for field in ("ema_params", "opt_state"):
        assert tiny.distance(getattr(new, field), getattr(bad, field)) == 0


def bad_in_one_place(updates, state, params=None):
    """An update with one NaN, of a parameter that is not the first."""
    leaves, tree = jax.tree.flatten(updates)
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].set(jnp.nan)
    return jax.tree.unflatten(tree, leaves), state


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["optimizer", "float16"])
def test_skips_a_step_whose_new_parameters_are_not_finite(bad):
    """A finite gradient whose update is NaN: in float16 Adam's epsilon is 0, and 0 / 0 took 99.5 % of the parameters."""
    fields = {"model__depth": 1, "averages": ("0.5", "power:0.1")}
    task = build.Run(tiny.config(model__param_dtype="float16" if bad == "float16" else "float32", **fields)).task
    if bad == "optimizer":
        poison = optax.GradientTransformation(lambda params: optax.EmptyState(), bad_in_one_place)
        task = dataclasses.replace(task, optimizer=optax.chain(task.optimizer, poison))
    state = create_sharded(task, jax.random.key(0), make_mesh(1, 1, 1, jax.devices()[:1]))
    new, sums = jax.jit(task.step)(state, CONSTANTS, BATCH, jax.random.key(1))
    assert new.step == 1 and sums["skipped"][0] == 1 and sums["loss"][1] == 0
    for field in ("params", "ema_params", "opt_state", "averages"):
        assert tiny.distance(getattr(new, field), getattr(state, field)) == 0


def test_loss_by_time():
    """Buckets that miss or double examples: their sums must add up to the whole."""
    task = build.Run(tiny.config()).task
    _, sums = jax.jit(task.step)(randomized(task, make_mesh(1, 1, 1, jax.devices()[:1])), CONSTANTS, BATCH, jax.random.key(1))
    buckets = sum(sums[f"loss_t{b / 4:.2f}"] for b in range(4))
    np.testing.assert_allclose(buckets, sums["loss"], rtol=1e-5)
    assert sums["loss"][1] == 16


def test_sample_does_not_depend_on_its_batch():
    """One key per batch instead of per image: image k would change with the batch size or the number asked for."""
    task, mesh = build.Run(tiny.config()).task, make_mesh(1, 1, 1, jax.devices()[:1])
    few, many = draw(task, mesh, 5, batch_size=4), draw(task, mesh, 11, batch_size=8)
    assert np.abs(few.astype(int) - many[:5]).max() <= 1
    assert np.abs(many[0].astype(int) - many[10]).max() > 1  # same label, another key


def test_label_and_guidance_reach_the_samples():
    """Labels that are ignored or null in the sampler, guidance that changes nothing."""
    task, mesh = build.Run(tiny.config()).task, make_mesh(1, 1, 1, jax.devices()[:1])
    params = randomized(task, mesh).params

    def images(scale, labels):
        return Generator(task, mesh, DDIM(4), Guidance(scale), 4, seed=0)(
            params, CONSTANTS, {"label": np.array(labels)}, len(labels)
        )

    base = images(1.0, [3, 3, 3, 3]).astype(int)
    assert np.abs(images(1.0, [4, 4, 4, 4]) - base).max() > 1
    assert np.abs(images(3.0, [3, 3, 3, 3]) - base).max() > 1
    np.testing.assert_array_equal(images(3.0, [10, 10, 10, 10]), images(1.0, [10, 10, 10, 10]))  # null against null


@pytest.mark.slow
def test_unconditional():
    """A network of 0 classes that still reads labels."""
    task, mesh = build.Run(tiny.config(model__num_classes=0)).task, make_mesh(1, 1, 1, jax.devices()[:1])
    state = create_sharded(task, jax.random.key(0), mesh)
    assert "label_embedding" not in state.params
    new, _ = jax.jit(task.step)(state, CONSTANTS, BATCH, jax.random.key(1))
    images = Generator(task, mesh, DDIM(2), Guidance(1.0), 4, seed=0)(new.params, CONSTANTS, {}, 4)
    assert images.shape == (4, 8, 8, 1)
