"""Compiles the training step for the loop, the benchmark and the plan. Needs only JAX."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dit_jax.parallel.mesh import replicated
from dit_jax.tasks.state import on_device
from dit_jax.tasks.task import Task


def trace_step(task: Task, mesh: Mesh, seed: int, state: Any, constants: Any, batch: Any) -> tuple[Any, Any]:
    """Traces the step (state, sums, constants, batch) -> (state, sums), which donates state and sums.

    The new state has the memory kinds of the old one, device or host.

    Args:
        state, constants, batch: arrays, or ShapeDtypeStructs with shardings.

    Returns:
        (traced step, sums as ShapeDtypeStructs).
    """

    def step(state, sums, constants, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        state, new = task.step(on_device(state), constants, batch, key)
        return state, jax.tree.map(jnp.add, sums, new)

    def new_sums(state, constants, batch):
        return task.step(on_device(state), constants, batch, jax.random.key(0))[1]

    with jax.set_mesh(mesh):
        on_all = replicated(mesh)
        sums = jax.tree.map(lambda x: x.update(sharding=on_all), jax.eval_shape(new_sums, state, constants, batch))
        out = (jax.tree.map(lambda x: x.sharding, state), on_all)
        return jax.jit(step, donate_argnums=(0, 1), out_shardings=out).trace(state, sums, constants, batch), sums


def compile_step(
    task: Task, mesh: Mesh, seed: int, state: Any, constants: Any, batch: Any
) -> tuple[Any, Callable[[], Any], float]:
    """(compiled step, function that returns zero sums, seconds); arguments as for `trace_step`."""
    start = time.monotonic()
    traced, sums = trace_step(task, mesh, seed, state, constants, batch)
    with jax.set_mesh(mesh):
        zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums), out_shardings=replicated(mesh))
        compiled = traced.lower().compile()
    return compiled, zeros, time.monotonic() - start


def compile_steps(
    tasks: Sequence[Task], mesh: Mesh, seed: int, state: Any, constants: Any, batches: Sequence[Any]
) -> tuple[list[Any], Callable[[], Any], float]:
    """`compile_step` for several shapes of batches, each with the task of its shape: (compiled steps, zeros, seconds)."""
    made = [compile_step(task, mesh, seed, state, constants, batch) for task, batch in zip(tasks, batches, strict=True)]
    return [compiled for compiled, _, _ in made], made[0][1], sum(seconds for _, _, seconds in made)


def compile_in_background(*args: Any) -> Future:
    """Runs `compile_steps` in a thread. It needs only the state's shapes, so the state can be made or restored meanwhile.

    If restoring fails, that error is raised before the compilation is awaited.
    """
    thread = ThreadPoolExecutor(1)
    future = thread.submit(compile_steps, *args)
    thread.shutdown(wait=False)
    return future
