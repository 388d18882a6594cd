"""One device against meshes, and what each device holds."""

import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
import tiny_text
from jax.sharding import PartitionSpec
from paths import ROOT

from dit_jax import build, recipes
from dit_jax.codecs.codec import AUTOENCODER_RULES
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.models.dit import RULES
from dit_jax.parallel.mesh import make_mesh, place, shard_batch
from dit_jax.parallel.rules import shardings, spec_of, warnings
from dit_jax.pixels import to_float
from dit_jax.tasks.compiled_step import compile_step
from dit_jax.tasks.diffusion import DiffusionTask
from dit_jax.tasks.state import abstract_state, create_sharded

BLOCKS = ("adaln_zero", "adaln", "cross_attention", "in_context")
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.uint8),
    "label": np.arange(16, dtype=np.int32) % 10,
}
TINY = {"model__heads": 8, "model__width": 64}
NETWORKS = {  # other than DiT
    "unet": {
        "channels": 16, "multipliers": (1, 2), "num_res_blocks": 1, "attention_factors": (), "head_width": 0, "heads": 2,
        "scale_shift_norm": False, "context_width": 16, "norm_groups": 4, "num_classes": 10,
    },
    "hourglass": {
        "widths": (32, 64), "depths": (1, 1), "attentions": ("neighborhood", "shifted_window"), "patch_size": 1,
        "kernel_size": 3, "window_size": 2, "head_width": 8, "mapping_width": 32, "mapping_depth": 1, "num_classes": 10,
        "time_scale": 1e-3,
    },
}  # fmt: skip


# MM-DiT with the table and a block of dual attention; on clips, with rotary positions and all axes; PixArt, with masked text.
# T5 v1.1 and a small encoder are trained with each.
TEXT = ("mmdit", "mmdit_clips", "pixart")


@pytest.fixture(autouse=True, scope="module")
def tiny_t5():
    with tiny_text.known():
        yield


def text_task(block, **fields):
    masked = block == "pixart"
    network = {"patch_size": 2, "depth": 3, "width": 128, "heads": 8, "context_width": 64}
    network |= {"name": "pixart"} if masked else {"name": "mmdit", "pooled_width": 64, "qk_norm": True, "dual_blocks": 1}
    if block == "mmdit_clips":
        network |= {"position": "rope", "rope_widths": (4, 6, 6)}
    text = {"name": "text", "encoders": ("t5_split", "bytes"), "lengths": (5, 8), "width": 64, "depth": 1, "trainable": True}
    text |= {"dtype": "float32", "mask": masked, "pooled": not masked, "dropout": (0.3,)}
    task = build.Run(tiny.config(model=network, conditioner=text, **fields)).task
    shape = (2, 8, 8, 1)
    return dataclasses.replace(task, image_shape=shape, latent_shape=shape) if block == "mmdit_clips" else task


def batch_of(task):
    """A batch of 16 examples; one for text has ids, some of which are padding, and dropped encoders."""
    if not getattr(getattr(task, "conditioner", None), "takes_text", False):
        return BATCH
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, *task.image_shape)).astype(np.uint8)
    batch = {"image": image, "label": BATCH["label"]}
    for name, x in task.conditioner.batch_spec().items():
        values = rng.integers(1, 100, (16, *x.shape)) * (rng.random((16, *x.shape)) < 0.7)
        if x.dtype == bool:
            values = values > 0
        elif values.ndim == 2:
            values[:, 0] = 1  # the end of a text, which each has
        batch[name] = values.astype(x.dtype)
    return batch


def mesh_of(data, fsdp, tensor, sequence, devices=None):
    return make_mesh(data, fsdp, tensor, devices, sequence=sequence)


def one_device():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def task_of(block, zero1=False, **fields):
    fields |= {"mesh__zero1": zero1, "optimizer__eps": 1e-3}
    if block == "autoencoder":
        return build.Run(tiny.autoencoder(**fields)).task
    if block == "diffit":
        return build.Run(tiny.diffit(model__heads=8, model__width=64, **fields)).task
    if block in TEXT:
        return text_task(block, **fields)
    if block in NETWORKS:
        return build.Run(tiny.config(model={"name": block, **NETWORKS[block]}, **fields)).task
    return build.Run(tiny.config(**TINY | {"model__conditioning": block} | fields)).task


def randomized(task, mesh):
    """A sharded state whose weights are not zero, the same numbers on every mesh."""
    like = abstract_state(task, mesh)
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(x.dtype), like.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    average = jax.tree.map(lambda x: (x + 0.01).astype(np.float32), {name: params[name] for name in like.ema_params})
    state = zeros.replace(params=params, ema_params=average)
    return place(state, jax.tree.map(lambda x: x.sharding, like))


def diffusion(task, constants, params, batch, key):
    """(output of the network, gradients)."""
    inputs = task.draw_inputs(constants, batch, key)
    x_t = task.process.perturb(inputs["x0"], inputs["noise"], inputs["t"])
    cond, _ = task.condition(params, constants, inputs["batch"])
    output = task.apply(params, x_t, task.process.network_time(inputs["t"]), cond)
    return output, task.gradients(params, constants, inputs)[0]


def autoencoding(task, constants, params, batch, key):
    """(reconstructions, gradients of the autoencoder and of its discriminator)."""
    images = to_float(batch["image"])
    noise = jax.random.normal(key, (len(images), *task.codec.latent_shape(task.image_shape)))
    latents, _ = task.encode(params["codec"], images, noise)
    return task.codec.decode(params["codec"], latents), task.gradients(params, constants, images, noise, True)[0]


def numbers(task, mesh):
    """What must not depend on the mesh: output, gradients, and parameters, average and moments after a step."""
    state, constants = randomized(task, mesh), {"codec": {}}
    batch = shard_batch(mesh, batch_of(task))
    forward_and_gradients = diffusion if isinstance(task, DiffusionTask) else autoencoding
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *args: forward_and_gradients(task, constants, *args))
        output, gradients = jax.device_get(program(state.params, batch, jax.random.key(3)))
    step, zeros, _ = compile_step(task, mesh, 0, state, constants, batch)
    new, _ = step(state, zeros(), constants, batch)
    new = jax.device_get(new)
    return {
        "output": output,
        "gradients": gradients,
        "params": new.params,
        "ema_params": new.ema_params,
        "moments": new.opt_state,
    }


@functools.cache
def numbers_of_one_device(block, **fields):
    return numbers(task_of(block, **fields), one_device())


def compare(block, shape, zero1=False, **fields):
    found, wanted = numbers(task_of(block, zero1, **fields), mesh_of(*shape)), numbers_of_one_device(block, **fields)
    # The biases of an autoencoder before its norms have no gradient: what is there is rounding.
    floor = 1e-4 if block == "autoencoder" else 1e-6
    distances = {name: tiny.distance(found[name], wanted[name], floor) for name in wanted}
    assert max(distances.values()) < 1e-5, distances


# CI has three blocks, each axis and ZeRO-1 in some mesh; the other pairs of block and mesh are exhaustive.
SLOW = pytest.mark.slow
IN_CI = [((2, 2, 1, 2), "adaln_zero")]
MESHES = [
    (2, 2, 1, 2),
    (8, 1, 1, 1),
    (2, 2, 2, 1),
    (1, 4, 2, 1),
    (1, 1, 8, 1),
    (1, 8, 1, 1),
    (4, 2, 1, 1),
    (1, 2, 2, 2),
    (1, 1, 1, 8),
    (2, 1, 1, 4),
]


@pytest.mark.parametrize(
    "shape, block, zero1",
    [
        pytest.param((2, 2, 1, 2), "in_context", True, marks=SLOW),
        *(
            pytest.param(shape, block, False, marks=SLOW if shape == (1, 2, 2, 2) else pytest.mark.exhaustive)
            for shape in MESHES
            for block in NETWORKS
        ),
        *(
            pytest.param(shape, block, False, marks=SLOW if (shape, block) in IN_CI else pytest.mark.exhaustive)
            for shape in MESHES
            for block in BLOCKS
        ),
        pytest.param((2, 2, 2, 1), "cross_attention", True, marks=SLOW),
        *(pytest.param(shape, "cross_attention", True, marks=pytest.mark.exhaustive) for shape in ((1, 8, 1, 1), (2, 4, 1, 1))),
        pytest.param((2, 2, 2, 1), "diffit", True, marks=SLOW),
        *(pytest.param(shape, "diffit", False, marks=pytest.mark.exhaustive) for shape in MESHES),
        *(
            pytest.param(shape, block, False, marks=SLOW if (shape, block) == ((1, 2, 2, 2), "mmdit") else pytest.mark.exhaustive)
            for shape in MESHES
            for block in TEXT
        ),
        pytest.param((2, 2, 2, 1), "mmdit", True, marks=pytest.mark.exhaustive),
        pytest.param((2, 2, 2, 1), "autoencoder", True, marks=pytest.mark.exhaustive),
        pytest.param((1, 8, 1, 1), "autoencoder", False, marks=pytest.mark.exhaustive),
    ],
)
def test_one_device_is_every_mesh(shape, block, zero1):
    """A sharding under which XLA gives other numbers: of the forward, a gradient, a step, the average."""
    compare(block, shape, zero1)


SIXTEEN = [
    ((16, 1, 1, 1), False),
    ((4, 4, 1, 1), False),
    ((2, 2, 4, 1), False),
    ((4, 2, 2, 1), False),
    ((2, 2, 1, 4), False),
    ((1, 16, 1, 1), True),
    ((2, 2, 2, 2), True),
]
FIVE = (*BLOCKS, "autoencoder")


@pytest.mark.parametrize(
    "shape, zero1, block",
    [pytest.param(shape, zero1, block, marks=pytest.mark.exhaustive) for shape, zero1 in SIXTEEN for block in FIVE],
)
def test_sixteen_devices(shape, zero1, block):
    """A mesh that is only wrong beyond 8 devices."""
    program = f"import test_sharded_steps as t; t.compare({block!r}, {shape}, {zero1})"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "16",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support", Path(__file__).parent))),
    }
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr[-2000:]


@pytest.mark.exhaustive
def test_a_width_that_fsdp_does_not_divide():
    """Kernels split along another side, or along the depth that the scan runs over, that XLA puts together wrongly."""
    compare("adaln_zero", (1, 8, 1, 1), model__width=36, model__heads=3, model__depth=8)


def held(tree):
    """Bytes that the fullest device holds."""
    found = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return max(found.values())


@pytest.mark.slow
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


def specs_of(tree, fsdp, tensor=1, rules=RULES):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    shape = {"data": 1, "fsdp": fsdp, "tensor": tensor, "sequence": 1}
    names = ["/".join(str(key.key) for key in path) for path, _ in leaves]
    specs = [spec_of(name, x.shape, shape, rules) for name, (_, x) in zip(names, leaves, strict=True)]
    return dict(zip(names, specs, strict=True)), bytes_of([x for _, x in leaves], specs, shape)


@pytest.mark.parametrize("fsdp, share", [(8, 1 / 8), (16, 1 / 16), (128, 1 / 128), (256, 0.56)])
def test_width_1152_is_split(fsdp, share):
    """XL/2, whose width 256 devices do not divide: what can be split must be, over 128 all of it."""
    config = recipes.dit("XL/2")
    params = jax.eval_shape(build.Run(config).task.init, jax.random.key(0)).params
    specs, size = specs_of(params, fsdp)
    assert size < 1.01 * share * specs_of(params, 1)[1] + 2**21  # and the biases
    assert "fsdp" in specs["blocks/mlp/in/kernel"] and "fsdp" in specs["blocks/mlp/out/kernel"]


def test_depth_is_split_last():
    """A kernel that stays whole although its stack could be split; a stack gathered whole where a side of the kernel would do."""
    mesh_shape = {"data": 1, "fsdp": 8, "tensor": 2, "sequence": 1}
    specs = {
        name: spec_of(f"params/blocks/{name}/kernel", shape, mesh_shape, RULES)
        for name, shape in (
            ("attention/out", (8, 3, 12, 36)),
            ("cross_attention/query", (8, 36, 3, 16)),
            ("modulation/linear", (6, 36, 6, 36)),
        )
    }
    assert specs == {
        "attention/out": PartitionSpec("fsdp", None, None, None),
        "cross_attention/query": PartitionSpec(None, None, None, "fsdp"),
        "modulation/linear": PartitionSpec(None, None, None, None),
    }


@pytest.mark.parametrize(
    "size, mesh_shape, text",
    [
        ("XL/2", (2, 256, 1, 1), r"fsdp=256 .* 5749 of 5774 MiB of state .* mesh.fsdp = 2, 4, 8, 16, 32, 64, 128 splits them"),
        ("S/2", (2, 1, 4, 1), r"tensor=4 .*qkv/kernel: 108 of 339 MiB .* mesh.tensor = 2 splits them"),
        ("XL/2", (4, 128, 1, 1), None),
        ("B/2", (1, 8, 2, 1), None),
    ],
)
def test_what_stays_whole_is_said(size, mesh_shape, text):
    """A pod that runs out of memory because 256 does not divide 1152, without a word; a warning where nothing is wrong."""
    task = build.Run(recipes.dit(size)).task
    mesh = SimpleNamespace(shape=dict(zip(("data", "fsdp", "tensor", "sequence"), mesh_shape, strict=True)))
    found = warnings(jax.eval_shape(task.init, jax.random.key(0)), mesh, task.rules)
    assert len(found) == (text is not None)
    assert not found or re.search(text, found[0])


@pytest.mark.parametrize("size", ["S/2", "B/2", "L/2", "XL/2"])
def test_heads_that_do_not_divide_stay_whole(size):
    """6 or 12 heads over 4 or 8 devices: an attention that is split through a head computes other scores."""
    heads = recipes.SIZES[size.partition("/")[0]].heads
    params = jax.eval_shape(build.Run(recipes.dit(size)).task.init, jax.random.key(0)).params
    for tensor in (4, 8):
        specs, _ = specs_of(params, 1, tensor)
        assert ("tensor" in specs["blocks/attention/qkv/kernel"]) == (heads % tensor == 0)
        assert "tensor" in specs["blocks/mlp/in/kernel"]
        assert specs["label_embedding/embedding"] == PartitionSpec(None, "fsdp")  # 1,001 rows


@pytest.mark.slow
def test_frozen_codec_is_split():
    """A codec's weights held whole by every device, or placed with parts exchanged."""
    config = tiny.digits_latent("").copy_and_resolve_references()
    config.codec.update({"scale": 1.0, "shift": 0.0})
    params = jax.tree.map(
        lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape),
        jax.eval_shape(build.Run(config).codec.init, jax.random.key(0)),
    )
    config.mesh.update({"data": 1, "fsdp": 8})
    placed = build.Run(config, codec_params=params).frozen["codec"]
    assert held(placed) < 0.4 * sum(x.nbytes for x in jax.tree.leaves(params))
    assert tiny.distance(placed, params) == 0
    real = jax.eval_shape(KLVAE().init, jax.random.key(0))
    assert specs_of(real, 8, rules=AUTOENCODER_RULES)[1] < 0.13 * specs_of(real, 1, rules=AUTOENCODER_RULES)[1]


@pytest.mark.slow
def test_weights_of_a_file_are_split():
    """A second network that is whole on every device because its weights came from a file."""
    mesh = make_mesh(1, 8)
    params = jax.tree.map(
        lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape), abstract_state(task_of("adaln"), one_device()).params
    )
    placed = place(params, shardings(params, mesh, RULES))
    assert held(placed) < 0.14 * sum(x.nbytes for x in jax.tree.leaves(params))
    assert tiny.distance(placed, params) == 0
