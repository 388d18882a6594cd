"""The optimizer's state and the moving average in host memory."""

import jax
import numpy as np
import pytest
import tiny

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.parallel.mesh import shard_batch
from dit_jax.sample.generator import Generator
from dit_jax.sample.weights import cast_for_inference
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.tasks.compiled_step import compile_step
from dit_jax.tasks.state import abstract_state, create_sharded

BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.uint8),
    "label": np.arange(16, dtype=np.int32) % 10,
}


def start(config):
    """(task, mesh, new state, a function that takes one step)."""
    task, mesh = build.Run(config).task, build.Run(config).mesh
    state, batch, constants = create_sharded(task, jax.random.key(0), mesh), shard_batch(mesh, BATCH), {"codec": {}}
    step, zeros, _ = compile_step(task, mesh, 0, state, constants, batch)
    return task, mesh, state, lambda state: step(state, zeros(), constants, batch)[0]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim > 1}


@pytest.mark.slow
@pytest.mark.parametrize("zero1", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_same_numbers_from_host_memory(tmp_path, zero1):
    """Moments that stay on the device, lose bits or come back from a checkpoint elsewhere; an average that draws no sample."""
    fields = {"mesh__fsdp": 4, "mesh__zero1": zero1, "model__depth": 1, "sampler__num_steps": 1}
    config = tiny.config(mesh__offload="optimizer_and_ema", **fields)
    task, mesh, state, step = start(config)
    plain_task, _, wanted, plain_step = start(tiny.config(**fields))
    state, wanted = step(state), plain_step(wanted)
    like = abstract_state(task, mesh)
    for found in (state, like):
        assert kinds(found.opt_state) == kinds(found.ema_params) == {"pinned_host"}
        assert kinds(found.params) == kinds(wanted) == {"device"}
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding.with_memory_kind(a.sharding.memory_kind), a.ndim)
    with Checkpointer(tmp_path / "checkpoints", every_steps=1) as checkpointer:
        checkpointer.save(1, state, {})
    with Checkpointer(tmp_path / "checkpoints", every_steps=1) as checkpointer:
        restored, _ = checkpointer.restore(like)
    equal(restored, wanted)
    state, wanted = step(restored), plain_step(wanted)
    equal(state, wanted)
    assert kinds(state.opt_state) == {"pinned_host"}
    sampler, guidance = build.Run(config).sampler, build.Run(config).guidance
    samples = [
        Generator(t, mesh, sampler, guidance, 8, 0)(
            cast_for_inference(t, average), {"codec": {}}, {"label": BATCH["label"][:8]}, 8
        )
        for t, average in ((task, state.ema_params), (plain_task, wanted.ema_params))
    ]
    equal(*samples)


@pytest.mark.slow
def test_only_the_optimizer():
    """An average that moves although only the optimizer was asked for."""
    config = tiny.autoencoder(mesh__offload="optimizer")
    state = create_sharded(build.Run(config).task, jax.random.key(0), build.Run(config).mesh)
    assert kinds(state.opt_state) == {"pinned_host"} and kinds((state.params, state.ema_params)) == {"device"}


def test_unknown_part():
    """A word that is taken for none."""
    for config in (tiny.config(mesh__offload="ema"), tiny.autoencoder(mesh__offload="ema")):
        with pytest.raises(UserError, match=r"mesh\.offload is 'ema'; it must be one of none, optimizer, optimizer_and_ema"):
            build.Run(config).task
