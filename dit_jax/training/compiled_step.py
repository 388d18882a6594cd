"""The program of one training step, as the loop runs it and the benchmark times it; needs only JAX."""

import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dit_jax.parallel.mesh import replicated
from dit_jax.training.task import Task


def compile_step(task: Task, mesh: Mesh, seed: int, state, constants, batch):
    """(compiled step, zero sums, seconds): (state, sums, constants, batch) -> (state, sums), its first two arguments donated."""
    def step(state, sums, constants, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        state, new = task.step(state, constants, batch, key)
        return state, jax.tree.map(jnp.add, sums, new)

    start = time.monotonic()
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda *args: task.step(*args, jax.random.key(0))[1], state, constants, batch)
        whole = replicated(mesh)
        zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=whole)
        out = (jax.tree.map(lambda x: x.sharding, state), whole)
        compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=out).lower(state, zeros(), constants, batch).compile()
    return compiled, zeros, time.monotonic() - start
