"""Weights held in the dtype that the network uses them in."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dit_jax import build
from dit_jax.errors import NotFinite
from dit_jax.sample.generator import Generator
from dit_jax.sample.weights import cast_for_inference, check_finite
from dit_jax.tasks.state import abstract_state

BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def task_of(**overrides):
    return build.Run(tiny.config(model__dtype="bfloat16", sampler__num_steps=2, **overrides)).task


def params_of(task, mesh):
    """Random weights on the mesh, none of them 0 and none of them a bfloat16."""
    like = abstract_state(task, mesh).ema_params
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jax.device_put(0.2 * rng.standard_normal(x.shape).astype(x.dtype), x.sharding), like)


def by_name(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    "conditioning, unroll, kept",
    [("adaln_zero", False, 0), ("adaln_zero", True, 0), ("cross_attention", False, 8), ("in_context", False, 6)],
)
def test_samples_keep_every_bit(conditioning, unroll, kept):
    """A parameter that the network uses in float32, such as a norm's scale, rounded to bfloat16; one that could be cast and is
    not; casts that are done in another order."""
    config = tiny.config(model__conditioning=conditioning, model__unroll=unroll)
    task = task_of(model__conditioning=conditioning, model__unroll=unroll)
    params = params_of(task, build.Run(config).mesh)
    held = cast_for_inference(task, params)
    assert sorted(name for name, x in by_name(held).items() if x.dtype != BFLOAT16) == sorted(
        name for name in by_name(params) if "norm" in name
    )
    assert sum(x.dtype == FLOAT32 for x in jax.tree.leaves(held)) == kept
    keys, labels = jax.random.split(jax.random.key(1), 4), jnp.arange(4)
    sampler, guidance = build.Run(config).sampler, build.Run(tiny.config(guidance__scale=1.5)).guidance
    draw = jax.jit(lambda params: task.draw_latents(params, {}, keys, {"label": labels}, sampler, guidance))
    wanted = np.asarray(draw(params))
    assert wanted.dtype == np.float32 and wanted.std() > 0.1
    np.testing.assert_array_equal(draw(held), wanted)


def test_weights_that_are_not_finite_are_named():
    """Black images of weights that hold NaN; a message that does not say which array."""
    params = {"blocks": {"kernel": jnp.ones((2, 3)), "bias": jnp.array([1.0, jnp.inf, jnp.nan])}}
    with pytest.raises(NotFinite, match=r"step 7 of x has NaN or infinity in blocks/bias \(2 of 3\); sample an earlier step"):
        check_finite(params, "step 7 of x")
    check_finite({"kernel": params["blocks"]["kernel"]}, "step 7 of x")


def uses(network, **params):
    """The dtypes that `cast_for_inference` gives the parameters of a network (params, x) -> output."""

    task = types.SimpleNamespace(
        apply=lambda params, x, t, cond: network(params, x),
        latent_shape=(2, 2, 1),
        condition=lambda params, constants, requests: ({}, {}),
        conditioner=types.SimpleNamespace(batch_spec=dict),
        low_res_spec=dict,
    )
    one = jax.devices()[0]
    return {name: x.dtype for name, x in cast_for_inference(task, jax.device_put(params, one)).items()}


def test_what_may_be_cast():
    """A parameter that is used in two dtypes, before its cast, or where that cannot be seen, taken for one that is always cast;
    one that is cast behind a slice or in a loop taken for the other."""

    def network(params, x):
        y = params["sliced"][1].astype(BFLOAT16) + params["both"].astype(BFLOAT16)
        y = y + (2 * params["scaled_first"]).astype(BFLOAT16) + params["narrow"].astype(FLOAT32).astype(BFLOAT16)
        y, _ = jax.lax.scan(lambda y, p: (y + jax.jit(lambda p: p.astype(BFLOAT16))(p), None), y, params["in_a_loop"])
        z = jax.lax.while_loop(lambda z: z.sum() < 9, lambda z: z + params["unseen"].astype(BFLOAT16).astype(FLOAT32), 1 + x)
        return x + y + z + params["both"], params["returned"]

    one = jnp.ones(1)
    found = uses(
        network,
        sliced=jnp.ones((3, 1)),
        both=one,
        scaled_first=one,
        in_a_loop=jnp.ones((3, 1)),
        unseen=one,
        returned=one,
        unused=one,
        narrow=one.astype(BFLOAT16),
    )
    assert {name for name, dtype in found.items() if dtype == BFLOAT16} == {"sliced", "in_a_loop", "narrow"}


def test_arrays_stay_where_they_are():
    """Split parameters that are gathered by the cast, a copy of float32 weights where nothing is to be cast, a moving average
    that is drawn from in host memory; a plan for other arrays than a sampler has."""
    config = tiny.config(mesh__fsdp=4, model__dtype="bfloat16")
    task, mesh = build.Run(config).task, build.Run(config).mesh
    params = params_of(task, mesh)
    held = cast_for_inference(task, params)
    abstract = cast_for_inference(task, abstract_state(task, mesh).ema_params)
    for kept, x, like in zip(*map(jax.tree.leaves, (held, params, abstract)), strict=True):
        assert kept.sharding.is_equivalent_to(x.sharding, x.ndim) and like.sharding.is_equivalent_to(x.sharding, x.ndim)
        assert kept.dtype == like.dtype == BFLOAT16
    plain = build.Run(tiny.config(mesh__fsdp=4)).task
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (cast_for_inference(plain, params), params)), strict=True))
    offloaded = build.Run(tiny.config(mesh__fsdp=4, mesh__offload="optimizer_and_ema")).task
    away = params_of(offloaded, mesh)
    for kept, x in zip(*map(jax.tree.leaves, (cast_for_inference(offloaded, away), params)), strict=True):
        assert kept.sharding.memory_kind == x.sharding.memory_kind and kept.sharding.is_equivalent_to(x.sharding, x.ndim)
        np.testing.assert_array_equal(kept, x)


def test_no_weight_is_cast_in_the_loop():
    """A sampler that casts every layer's weights at every step, after all."""
    config = tiny.config(model__dtype="bfloat16")
    task, mesh = build.Run(config).task, build.Run(config).mesh
    generator = Generator(task, mesh, build.Run(config).sampler, build.Run(config).guidance, 8, 0)
    rows = jnp.zeros(generator.batch_size, jnp.int32)

    def casts(params):
        with jax.set_mesh(mesh):
            text = str(generator.program.trace(params, {"codec": {}}, rows, {"label": rows}, None, np.uint32(0), None).jaxpr)
        return text.count("bf16[32,128] = convert_element_type")  # of an MLP's kernel, in the loop over the blocks

    params = abstract_state(task, mesh).ema_params
    assert (casts(params), casts(cast_for_inference(task, params))) == (1, 0)
