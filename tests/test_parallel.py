"""One device against meshes, and what each device holds."""

import itertools
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from dit_jax import build, recipes
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.parallel.mesh import make_mesh, place, shard_batch
from dit_jax.parallel.rules import AUTOENCODER_RULES, TRANSFORMER_RULES, shardings, spec_of
from dit_jax.training.loop import compile_step
from dit_jax.training.state import abstract_state, create_sharded

BLOCKS = ("adaln_zero", "adaln", "cross_attention", "in_context")
BATCH = {"image": np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.uint8),
         "label": np.arange(16, dtype=np.int32) % 10}
TINY = {"model__heads": 8, "model__width": 64}


def mesh_of(data, fsdp, tensor, sequence, devices=None):
    return make_mesh(data, fsdp, tensor, devices, sequence=sequence)


def one_device():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def task_of(block, zero1=False):
    return build.task(tiny.config(model__conditioning=block, mesh__zero1=zero1, optimizer__eps=1e-3, **TINY))


def randomized(task, mesh):
    """A sharded state whose weights are not zero, the same numbers on every mesh."""
    like = abstract_state(task, mesh)
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(x.dtype), like.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    state = zeros.replace(params=params, ema_params=jax.tree.map(lambda x: (x + 0.01).astype(np.float32), params))
    return place(state, jax.tree.map(lambda x: x.sharding, like))


def numbers(task, mesh):
    """What must not depend on the mesh: the network's output, the gradients, and parameters and average after a step."""
    state, constants = randomized(task, mesh), {"codec": {}}
    batch = shard_batch(mesh, BATCH)

    def forward_and_gradients(state, batch, key):
        inputs = task.draw_inputs(constants, batch, key)
        x_t = task.process.perturb(inputs["x0"], inputs["noise"], inputs["t"])
        output = task.network.apply({"params": state.params}, x_t, task.process.network_time(inputs["t"]), inputs["cond"])
        return output, task.gradients(state.params, inputs)[0]

    with jax.set_mesh(mesh):
        output, gradients = jax.device_get(jax.jit(forward_and_gradients)(state, batch, jax.random.key(3)))
    step, zeros, _ = compile_step(task, mesh, 0, state, constants, batch)
    new, _ = step(state, zeros(), constants, batch)
    new = jax.device_get(new)
    return {"output": output, "gradients": gradients, "params": new.params, "ema_params": new.ema_params,
            "moments": new.opt_state}


def distances(found, wanted):
    return {name: tiny.distance(found[name], wanted[name], floor=1e-6) for name in wanted}


def compare(block, shape, zero1=False):
    found = distances(numbers(task_of(block, zero1), mesh_of(*shape)), numbers(task_of(block), one_device()))
    assert max(found.values()) < 1e-5, found


SLOW = pytest.mark.slow
MESHES = [(2, 2, 1, 2), (8, 1, 1, 1), (2, 2, 2, 1), (1, 4, 2, 1), (1, 1, 8, 1), (1, 8, 1, 1), (4, 2, 1, 1), (1, 2, 2, 2),
          (1, 1, 1, 8), (2, 1, 1, 4)]


@pytest.mark.parametrize("shape, block, zero1", [
    ((2, 2, 1, 2), "in_context", True),
    *(pytest.param(shape, block, False, marks=SLOW if BLOCKS[i % 4] == block else pytest.mark.exhaustive)
      for i, shape in enumerate(MESHES) for block in BLOCKS),
    pytest.param((2, 2, 2, 1), "cross_attention", True, marks=SLOW),
    *(pytest.param(shape, "cross_attention", True, marks=pytest.mark.exhaustive) for shape in ((1, 8, 1, 1), (2, 4, 1, 1))),
])
def test_one_device_is_every_mesh(shape, block, zero1):
    """A sharding under which XLA gives other numbers: of the forward, a gradient, a step, the average."""
    compare(block, shape, zero1)


@pytest.mark.slow
def test_sixteen_devices():
    """A mesh that is only wrong beyond 8 devices."""
    program = ("import sys, jax; sys.path.insert(0, 'tests'); jax.config.update('jax_num_cpu_devices', 16)\n"
               "import test_parallel as t\n"
               "for shape, block, zero1 in (((2, 2, 2, 2), 'adaln_zero', False), ((4, 4, 1, 1), 'in_context', False),\n"
               "                            ((1, 16, 1, 1), 'cross_attention', True), ((2, 4, 2, 1), 'adaln', False)):\n"
               "    t.compare(block, shape, zero1)")
    process = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                             timeout=1500)
    assert process.returncode == 0, process.stderr[-2000:]


def held(tree):
    """Bytes that the fullest device holds."""
    found = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return max(found.values())


def test_bytes_fall_with_fsdp():
    """Parameters, moments or the average that stay whole although the mesh could split them; measured on the arrays."""
    parts = {name: [] for name in ("params", "ema_params", "opt_state")}
    task = task_of("adaln_zero")
    for fsdp in (1, 2, 4, 8):
        state = create_sharded(task, jax.random.key(0), make_mesh(-1, fsdp))
        for name, sizes in parts.items():
            sizes.append(held(getattr(state, name)))
    for sizes in parts.values():
        assert all(b < 0.56 * a for a, b in itertools.pairwise(sizes)), sizes
    state = create_sharded(task_of("adaln_zero", zero1=True), jax.random.key(0), make_mesh(1, 8))
    assert held(state.params) == parts["params"][0]
    assert held(state.ema_params) == parts["ema_params"][3] and held(state.opt_state) == parts["opt_state"][3]


def bytes_of(tree, specs, mesh_shape):
    """Bytes per device of shapes that are split by specs."""
    ways = [np.prod([mesh_shape[axis] for axis in spec if axis], initial=1) for spec in specs]
    return sum(x.size * x.dtype.itemsize / n for x, n in zip(tree, ways, strict=True))


def specs_of(tree, fsdp, tensor=1, rules=TRANSFORMER_RULES):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    shape = {"data": 1, "fsdp": fsdp, "tensor": tensor, "sequence": 1}
    names = ["/".join(str(key.key) for key in path) for path, _ in leaves]
    specs = [spec_of(name, x.shape, shape, rules) for name, (_, x) in zip(names, leaves, strict=True)]
    return dict(zip(names, specs, strict=True)), bytes_of([x for _, x in leaves], specs, shape)


@pytest.mark.parametrize("fsdp, share", [(8, 1 / 8), (16, 1 / 16), (128, 1 / 128), (256, 0.56)])
def test_width_1152_is_split(fsdp, share):
    """XL/2, whose width 256 devices do not divide: what can be split must be, over 128 all of it."""
    config = recipes.dit("XL/2")
    params = jax.eval_shape(build.task(config).init, jax.random.key(0)).params
    specs, size = specs_of(params, fsdp)
    assert size < 1.01 * share * specs_of(params, 1)[1] + 2**21  # and the biases
    assert "fsdp" in specs["blocks/mlp/in/kernel"] and "fsdp" in specs["blocks/mlp/out/kernel"]


@pytest.mark.parametrize("size", ["S/2", "B/2", "L/2", "XL/2"])
def test_heads_that_do_not_divide_stay_whole(size):
    """6 or 12 heads over 4 or 8 devices: an attention that is split through a head computes other scores."""
    heads = recipes.SIZES[size.partition("/")[0]].heads
    params = jax.eval_shape(build.task(recipes.dit(size)).init, jax.random.key(0)).params
    for tensor in (4, 8):
        specs, _ = specs_of(params, 1, tensor)
        assert ("tensor" in specs["blocks/attention/qkv/kernel"]) == (heads % tensor == 0)
        assert "tensor" in specs["blocks/mlp/in/kernel"]
        assert specs["label_embedding/embedding"] == PartitionSpec(None, "fsdp")  # 1,001 rows


def test_frozen_codec_is_split():
    """A codec's weights held whole by every device, or placed with parts exchanged."""
    config = tiny.digits_latent("").copy_and_resolve_references()
    config.codec.update({"scale": 1.0, "shift": 0.0})
    params = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape),
                          jax.eval_shape(build.codec(config).init, jax.random.key(0)))
    mesh = make_mesh(1, 8)
    placed = build.constants(config, mesh, None, params)["codec"]
    assert held(placed) < 0.4 * sum(x.nbytes for x in jax.tree.leaves(params))
    assert tiny.distance(placed, params) == 0
    real = jax.eval_shape(KLVAE().init, jax.random.key(0))
    assert specs_of(real, 8, rules=AUTOENCODER_RULES)[1] < 0.13 * specs_of(real, 1, rules=AUTOENCODER_RULES)[1]


def test_weights_of_a_file_are_split():
    """A second network that is whole on every device because its weights came from a file."""
    mesh = make_mesh(1, 8)
    params = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape),
                          abstract_state(task_of("adaln"), one_device()).params)
    placed = place(params, shardings(params, mesh))
    assert held(placed) < 0.14 * sum(x.nbytes for x in jax.tree.leaves(params))
    assert tiny.distance(placed, params) == 0
