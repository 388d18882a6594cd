"""Traces the programs of a config on a mesh, with shapes instead of arrays, without loading or computing anything."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.interop import lpips
from dit_jax.parallel.mesh import batch_sharding, replicated, rows_per_step
from dit_jax.parallel.rules import AUTOENCODER_RULES, shardings
from dit_jax.sample.generator import Generator
from dit_jax.sample.weights import hold
from dit_jax.tasks.compiled_step import trace_step
from dit_jax.tasks.state import abstract_state


def _shaped(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def check_batch(config, mesh):
    """Raises UserError if the batch cannot be split over the mesh."""
    ways = rows_per_step(mesh) * config.microbatches
    if config.batch_size % ways:
        raise UserError(
            f"batch_size {config.batch_size} is not a multiple of mesh.data x mesh.fsdp x microbatches = "
            f"{rows_per_step(mesh)} x {config.microbatches} = {ways}"
        )


def abstract_constants(config, task, mesh, resident_rows: int) -> dict:
    """`build.constants`, as shapes.

    resident_rows: rows of the latent cache on the devices, if the config uses one.

    Raises:
        UserError: the config uses a resident cache, but resident_rows is 0.
    """
    if config.task.name == "autoencoder":
        if not config.task.perceptual_weight:
            return {}
        params = {}
        for keys, shape in lpips.LAYOUT.values():
            node = params
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return {"perceptual": _shaped(jax.tree.map(_as_read, params), replicated(mesh))}
    codec = jax.eval_shape(task.codec.init, jax.random.key(0))
    constants = {"codec": jax.tree.map(_shaped, codec, shardings(codec, mesh, AUTOENCODER_RULES))}
    if config.data.name == "latents" and config.loader.get("resident"):
        if resident_rows < 1:
            raise UserError(
                "loader.resident keeps the latent cache on the devices, whose size is only known from the data: give "
                "--resident_rows=<number of images, or twice that with mirror images>"
            )
        ways, (*grid, channels) = rows_per_step(mesh), task.latent_shape
        shape = (-(-resident_rows // ways) * ways, *grid, 2 * channels)
        constants["moments"] = jax.ShapeDtypeStruct(shape, jnp.float16, sharding=batch_sharding(mesh))
    return constants


def _as_read(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The layout of an LPIPS array after `lpips.load`: OIHW to HWIO, [1, C, 1, 1] to [C]."""
    o, i, h, w = x.shape if len(x.shape) == 4 else (*x.shape, 1, 1, 1)[:4]
    kernel = h > 1
    return jax.ShapeDtypeStruct((h, w, i, o) if kernel else (max(x.shape),), x.dtype)


def train_step(config, task, mesh, resident_rows: int = 0):
    """(traced training step, its arguments by name): the program that `tasks.compiled_step` compiles."""
    # Outside of the mesh: `jax.random.key(0)` would be created on its devices, which may not exist.
    state = abstract_state(task, mesh)
    constants = abstract_constants(config, task, mesh, resident_rows)
    batch = build.abstract_batch(config, task, mesh)
    traced, sums = trace_step(task, mesh, config.seed, state, constants, batch)
    return traced, {"state": state, "sums": sums, "constants": constants, "batch": batch}


def sampling(config, task, mesh):
    """Traces the sampling of one batch: (traced program, its arguments by name, batch size, evaluations or None).

    The batch size is `evaluation.batch_size`, rounded up as by the generator.
    """
    sampler, guidance = build.sampler(config), build.guidance(config)
    generator = Generator(task, mesh, sampler, guidance, config.evaluation.batch_size, config.seed)
    params = hold(task, abstract_state(task, mesh).ema_params)
    constants = {"codec": abstract_constants(config, task, mesh, 1)["codec"]}
    rows = jax.ShapeDtypeStruct((generator.batch_size,), np.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        traced = generator.program.trace(params, constants, rows, rows, None)
    arguments = {"params": params, "constants": constants, "batch": rows}
    return traced, arguments, generator.batch_size, sampler.evaluations(task.process)
