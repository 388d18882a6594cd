"""VideoDiT on one device against meshes, among them the sequence axis, which splits windows or their tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dit_jax.models.video_dit import LATTE, VideoDiT
from dit_jax.parallel.mesh import make_mesh, place, shard_batch
from dit_jax.parallel.rules import shardings

WALT = {"windows": ((1, 2, 4), (0, 1, 2)), "position": "learned", "grid": (4, 2, 4), "relative_bias": True, "qk_norm": True}
WALT |= {"modulation": "lora", "rank": 4, "context_width": 8, "self_conditioning": True, "known_frames": True}
KINDS = {"latte": {"windows": LATTE, "num_classes": 10}, "walt": WALT, "full": {"windows": ((0, 0, 0),), "num_classes": 10}}
MESHES = [(1, 1, 1, 8), (2, 2, 1, 2), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 1, 4), (1, 8, 1, 1), (1, 1, 8, 1)]
IN_CI = [((2, 2, 1, 2), "walt"), ((2, 1, 1, 4), "latte")]


def inputs(kind):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 4, 4, 8, 3)).astype(np.float32)
    cond = {"context": rng.standard_normal((8, 3, 8)).astype(np.float32)} if kind == "walt" else {"label": np.arange(8) % 10}
    if kind == "walt":
        mask = np.zeros((*x.shape[:-1], 1), np.float32)
        mask[:, :2] = 1
        cond |= {"known": x, "known_mask": mask, "estimate": x[::-1].copy(), "context_mask": np.ones((8, 3), np.float32)}
    return {"x": x, "t": np.linspace(1, 900, 8).astype(np.float32), "cond": cond}


def numbers(kind, mesh):
    """(output, gradients of its squares)."""
    net = VideoDiT(2, 4, 64, 8, 3, **KINDS[kind])
    given = inputs(kind)
    like = jax.eval_shape(net.init, jax.random.key(0), *map(jnp.asarray, (given["x"][:1], given["t"][:1])),
                          {name: x[:1] for name, x in given["cond"].items()})["params"]  # fmt: skip
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(x.dtype), like)
    params = place(params, shardings(params, mesh, net.rules))
    batch = shard_batch(mesh, given)

    def loss(params, batch):
        output = net.apply({"params": params}, batch["x"], batch["t"], batch["cond"])
        return jnp.square(output).mean(), output

    with jax.set_mesh(mesh):
        (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    return jax.device_get((output, gradients))


@functools.cache
def of_one_device(kind):
    return numbers(kind, make_mesh(1, 1, 1, jax.devices()[:1]))


@pytest.mark.parametrize(
    "shape, kind",
    [
        pytest.param(shape, kind, marks=pytest.mark.slow if (shape, kind) in IN_CI else pytest.mark.exhaustive)
        for shape in MESHES
        for kind in KINDS
    ],
)
def test_one_device_is_every_mesh(shape, kind):
    """Catches windows that are split or put together wrongly under a sharding, and a gradient summed over too few devices."""
    data, fsdp, tensor, sequence = shape
    found = numbers(kind, make_mesh(data, fsdp, tensor, sequence=sequence))
    assert tiny.distance(found, of_one_device(kind), 1e-6) < 2e-5
