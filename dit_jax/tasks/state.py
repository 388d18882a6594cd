"""The training state, and its creation on a mesh, already sharded."""

import re
import types
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dit_jax.errors import UserError
from dit_jax.parallel import rules
from dit_jax.parallel.rules import path_name
from dit_jax.storage.fingerprint import leaf_names
from dit_jax.tasks.averages import Average, key

# Places of the parts of an optimizer, in the names of its arrays. Numbers behind those belong to parameters.
PLACES = re.compile(r"^(.*?)(\d+/)+(?=(count|mu|nu|trace|ema|v|v_row|v_col|inner_states)(/|$))")
INNER_PLACES = re.compile(r"(inner_states/\w+/inner_state/)(\d+/)+")  # of Muon, which gives each part of the parameters its own
MOMENTS = re.compile(r"/?(^|(?<=/))(mu|nu|trace|ema|v|v_row|v_col)(/|$)")
SCHEDULE = " of a schedule"
HOST = "pinned_host"
OFFLOADS = {"none": (), "optimizer": ("opt_state",), "optimizer_and_ema": ("opt_state", "ema_params", "averages")}


@flax.struct.dataclass
class TrainState:
    """Arrays only.

    Fields:
        step: int32 scalar, number of steps taken.
        params: of the network, in `param_dtype`.
        ema_params: float32 exponential moving average of params; starts at params.
        opt_state: optax state.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any

    averages = types.MappingProxyType({})  # no field: checkpoints of runs without further averages have no entry for them


@flax.struct.dataclass
class AveragedState(TrainState):
    """A state with further moving averages.

    Fields:
        averages: float32 moving averages by `averages.key`.
    """

    averages: Any = flax.struct.field()


def new_state(params: Any, optimizer: optax.GradientTransformation, averages: Iterable[Average] = ()) -> TrainState:
    def copy():
        return jax.tree.map(lambda x: x.astype(jnp.float32), params)

    step, further = jnp.zeros((), jnp.int32), {key(average): copy() for average in averages}
    fields = {"step": step, "params": params, "ema_params": copy(), "opt_state": optimizer.init(params)}
    return AveragedState(**fields, averages=further) if further else TrainState(**fields)


def check_offload(offload: str) -> None:
    """Raises a UserError if `offload` is not one of OFFLOADS."""
    if offload not in OFFLOADS:
        raise UserError(f"mesh.offload is {offload!r}; it must be one of {', '.join(OFFLOADS)}")


def abstract_state(task: Any, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs that carry the shardings of the task's rules; nothing is computed.

    With task.zero1 the optimizer's state and the moving average are split over fsdp and the parameters are not. Each device
    updates its part of the parameters, which are gathered once per step; otherwise every layer is gathered at each use.
    Source: Rajbhandari et al. 2020 (ZeRO), stage 1.

    The parts that task.offload names are kept in pinned host memory between steps, with the same sharding; vectors and
    scalars stay on the devices. A program that uses such a state calls `on_device` first.

    task: a `Task`.
    """
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    shardings = rules.shardings(shapes, mesh, task.rules)
    if task.zero1:
        shardings = shardings.replace(params=rules.whole_over_fsdp(shardings.params))
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return state.replace(**{part: in_host_memory(getattr(state, part)) for part in OFFLOADS[task.offload] if part in vars(state)})


def in_host_memory(tree: Any) -> Any:
    """Moves ShapeDtypeStructs of two or more dimensions to pinned host memory.

    Vectors would save no memory, and TPUs cannot write part of one to the host (libtpu 0.0.42, a bias updated in parts).
    """
    return jax.tree.map(lambda x: x.update(sharding=x.sharding.with_memory_kind(HOST)) if x.ndim > 1 else x, tree)


def on_device(tree: Any) -> Any:
    """Inside a jitted function: copies arrays in host memory to the device and leaves others unchanged."""
    return jax.device_put(tree, jax.memory.Space.Device)


def with_structure(opt_state: Any, like: Any) -> Any:
    """The state of an optimizer in the structure of another one. Clipping and schedules add parts; a schedule has a count.

    Arrays of the same name are the same, whatever part they belong to. The counts of the moments and of a schedule differ in a
    branch with a new state of the optimizer; a schedule that is new takes the count of the moments.
    """
    if leaf_names(opt_state) == leaf_names(like):
        return opt_state
    arrays = dict(zip(_without_places(leaf_names(opt_state)), jax.tree.leaves(opt_state), strict=True))
    count = next(x for name, x in arrays.items() if _is_count(name))

    def leaf(name: str) -> Any:
        if name not in arrays and _is_count(name):
            return arrays.get(name.removesuffix(SCHEDULE), count)
        return arrays[name]

    leaves = [leaf(name) for name in _without_places(leaf_names(like))]
    leaves = [x if x.ndim else jnp.copy(x) for x in leaves]  # the training step donates its state, and no count twice
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _is_count(name: str) -> bool:
    """Whether an array of an optimizer's state is a number of steps."""
    return name.removesuffix(SCHEDULE).rpartition("/")[2] == "count"


def _without_places(names: list[str]) -> list[str]:
    """The names without the places of the optimizer's parts; a count that has no moments next to it ends in SCHEDULE."""
    with_moments = {name[: found.start()] for name in names if (found := MOMENTS.search(name))}
    return [
        INNER_PLACES.sub(r"\1", PLACES.sub(r"\1", name, count=1))
        + SCHEDULE * (_is_count(name) and name.removesuffix("count").rstrip("/") not in with_moments)
        for name in names
    ]


def create_sharded(task: Any, key: jax.Array, mesh: Mesh) -> TrainState:
    """Runs task.init under jit with the shardings of its rules: the arrays are created already sharded."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(task, mesh))
    return jax.jit(task.init, out_shardings=shardings)(key)


def is_constant(path: Iterable) -> bool:
    """Whether a parameter is named "constant": a network draws it at the start and never trains it (random Fourier features).

    It is saved with the others, and converted weights bring their own.
    """
    return path_name(path).rpartition("/")[2] == "constant"


def without_constants(updates: Any) -> Any:
    """The updates of an optimizer, zero for constants: weight decay must not change them either."""
    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.zeros_like(x) if is_constant(path) else x, updates)


def count_parameters(params: Any) -> int:
    """Number of parameters that can be trained, of arrays or shapes: all but constants."""
    return sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(params) if not is_constant(path))
