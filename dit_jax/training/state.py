"""What training carries from step to step, and how it is born on a mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dit_jax.parallel import rules


@flax.struct.dataclass
class TrainState:
    """Arrays only.

    Fields:
        step: int32 scalar, how many steps were taken.
        params: of the network, in `param_dtype`.
        ema_params: float32 exponential moving average of params; starts at params.
        opt_state: optax state.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def new_state(params, optimizer) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(lambda x: x.astype(jnp.float32), params),
        opt_state=optimizer.init(params),
    )


def abstract_state(task, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs that carry the shardings of the task's rules; nothing is computed.

    With task.zero1 only the optimizer's state and the moving average are split over fsdp, the parameters are not: each device
    updates its part of them, then all are gathered once a step, where otherwise every layer is gathered each time it is used.
    Source: Rajbhandari et al. 2020 (ZeRO), stage 1.

    task: a `Task`.
    """
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    shardings = rules.shardings(shapes, mesh, task.rules)
    if task.zero1:
        shardings = shardings.replace(params=rules.whole_over_fsdp(shardings.params))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create_sharded(task, key, mesh: Mesh) -> TrainState:
    """Runs task.init under jit with the shardings of its rules: no array is ever whole on one device that should not be."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(task, mesh))
    return jax.jit(task.init, out_shardings=shardings)(key)


def count_parameters(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
