"""Traces the programs of a run on its mesh from shapes, without loading or computing anything."""

import jax
import numpy as np

from dit_jax.build import Run
from dit_jax.parallel.mesh import batch_sharding
from dit_jax.sample.generator import Generator
from dit_jax.sample.weights import cast_for_inference
from dit_jax.tasks.compiled_step import trace_step


def train_step(run: Run, resident_rows: int = 0):
    """(traced training step, its arguments by name): the program that `tasks.compiled_step.compile_step` compiles."""
    # Outside of the mesh, because `jax.random.key(0)` would be made on its devices, which may not be here.
    arguments = {
        "state": run.abstract_state,
        "constants": run.abstract_constants(resident_rows),
        "batch": run.abstract_batch,
    }
    traced, sums = trace_step(run.task, run.mesh, run.config.seed, **arguments)
    return traced, arguments | {"sums": sums}


def sampling(run: Run):
    """Traces the sampling of one batch: (traced program, its arguments by name, batch size, evaluations or None).

    The batch size is `evaluation.batch_size`, rounded up as by the generator.
    """
    run = run.whole()
    mesh, config = run.mesh, run.config
    generator = Generator(run.task, mesh, run.sampler, run.guidance, config.evaluation.batch_size, config.seed)
    params = cast_for_inference(run.task, run.abstract_state.ema_params)
    constants = {name: x for name, x in run.abstract_constants(resident_rows=1).items() if name != "moments"}

    def rows(shape, dtype):
        return jax.ShapeDtypeStruct((generator.batch_size, *shape), dtype, sharding=batch_sharding(mesh))

    indices = rows((), np.int32)
    requests = {name: rows(x.shape, x.dtype) for name, x in run.conditioner.batch_spec().items()}
    with jax.set_mesh(mesh):
        traced = generator.program.trace(params, constants, indices, requests, None, np.uint32(generator.seed), None)
    arguments = {"params": params, "constants": constants, "batch": (indices, requests)}
    return traced, arguments, generator.batch_size, run.sampler.evaluations(run.process)
