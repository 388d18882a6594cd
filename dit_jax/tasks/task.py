"""The protocol of tasks, and the functions that all tasks share.

B is the global batch size.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from dit_jax.parallel.rules import Rules
from dit_jax.tasks.averages import Average
from dit_jax.tasks.state import TrainState

Sums = dict[str, jax.Array]
MOST_INITIAL = 0.01  # share of the initial parameters in a moving average, without a warning


class Task(Protocol):
    """One training step as a pure function of arrays. `DiffusionTask` and `AutoencoderTask` implement it.

    `constants` are the arrays that a step reads and does not change (weights of a frozen network, a data set on the devices).
    They are an argument of the step, so that they can be sharded over the mesh.

    Fields:
        name: the task's name in a config.
        image_shape: of one example, (H, W, C) or (F, H, W, C).
        microbatches: number of parts of a batch, computed in sequence.
    """

    @property
    def name(self) -> str: ...

    @property
    def image_shape(self) -> tuple[int, ...]: ...

    @property
    def microbatches(self) -> int: ...

    @property
    def average(self) -> Average:
        """The moving average of the parameters that results are made with."""
        ...

    @property
    def averages(self) -> tuple[Average, ...]:
        """Further moving averages, in the state's `averages`."""
        ...

    @property
    def rules(self) -> Rules:
        """How the state is split over the mesh."""
        ...

    @property
    def zero1(self) -> bool:
        """Whether parameters are replicated over the fsdp axis, and only the optimizer's state and the average are split."""
        ...

    @property
    def offload(self) -> str:
        """The parts of the state that are kept in host memory between steps, a key of `state.OFFLOADS`."""
        ...

    def init(self, key: jax.Array) -> TrainState: ...

    def init_optimizer(self, params: Any) -> Any:
        """`opt_state` of a `TrainState` with these parameters, before the first step."""
        ...

    def step(
        self, state: TrainState, constants: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, Sums]:
        """The new state, and sums for averaging: {name: f32[2] (sum, count)}, including "loss" and "skipped".

        A step whose loss, gradient, new parameters or new moving average are not finite changes only the step count.
        """
        ...

    def batch_spec(self, entry: str = "image") -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a training batch by name, for one example.

        Args:
            entry: the kind of data: "image", "moments" of a latent cache, or "row" of a cache on the devices.

        Raises:
            UserError: the task cannot be trained on this kind of data.
        """
        ...

    def constants(self) -> dict[str, Any]:
        """The frozen weights that `step` reads, as pytrees of ShapeDtypeStruct by name."""
        ...

    def constant_rules(self) -> dict[str, Rules]:
        """How each of `constants` is split over the mesh; an entry without rules is replicated."""
        ...

    def macs(self) -> int:
        """Multiply-adds of one forward pass of the trained network on one example; three times that is a training step."""
        ...

    @property
    def draws_samples(self) -> bool:
        """Whether the trained network draws samples from noise."""
        ...

    @property
    def has_auxiliary_networks(self) -> bool:
        """Whether a step runs networks that `macs` does not count: a discriminator, a perceptual distance."""
        ...

    @property
    def remat(self) -> str | None:
        """The network's rematerialisation policy; None if it has none."""
        ...

    def activation_bytes(self, rows: int, mesh_shape: Mapping[str, int]) -> int:
        """Lower bound on the bytes that a device keeps between forward and backward pass of `rows` examples; 0 if unknown."""
        ...

    def savings(self, rows: int, mesh_shape: Mapping[str, int], activations: int) -> dict[str, int]:
        """See `models.network.Planned.savings`."""
        ...

    def description(self) -> list[str]:
        """Lines "name  facts" of the summary at the start of a run."""
        ...


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key that depends only on the name, not on the order of calls."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def accumulate(gradient: Callable, inputs: Any, parts: int) -> tuple[Any, Any]:
    """Computes the parts of a batch in sequence; returns (averaged gradients, per-example values [B]).

    Args:
        gradient: part of the inputs -> (gradients of its mean loss, values [B / parts]).
        inputs: pytree of [B, ...].
    """
    if parts == 1:
        return gradient(inputs)
    # Strided parts, so that a batch split over devices does not move.
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), inputs)

    def add(total, part):
        grads, values = gradient(part)
        return jax.tree.map(lambda a, b: a + b / parts, total, grads), values

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], split))[0]
    grads, values = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), split)
    return grads, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1), values)


def share_of_initial(average: Average, steps: int) -> float:
    """The share of the initial parameters in a moving average after so many steps."""
    return float(average.profile(steps)[0])


def warning_of_average(average: Average, steps: int, remedy: str) -> str | None:
    """A sentence about a moving average that mostly holds what a short run began with; None where its share is small."""
    share = share_of_initial(average, steps)
    if share <= MOST_INITIAL:
        return None
    return f"the moving average (ema_decay {average.name}) holds {share:.0%} initial weights at step {steps}; {remedy}"


def all_finite(tree: Any) -> jax.Array:
    """Whether no array of a tree holds NaN or infinity, bool scalar."""
    return jnp.equal(sum(jnp.sum(~jnp.isfinite(x), dtype=jnp.float32) for x in jax.tree.leaves(tree)), 0)


def is_finite_update(optimizer: optax.GradientTransformation, params: Any, averages: Any) -> jax.Array | bool:
    """Whether new parameters and their moving averages are finite, where loss and gradient are.

    Reading them before the choice between old and new state computes the update twice, which adds 3 % to the bytes of S/2's
    step. It is left out where it cannot fail: float32 parameters and an optimizer that says `is_bounded`.
    """
    in_float32 = all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    return (in_float32 and getattr(optimizer, "is_bounded", False)) or all_finite((params, averages))


def only_if(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state if `finite`, else the old state with the new step count."""
    unchanged = dataclasses.replace(old, step=new.step)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, unchanged)


def mean_of(values: jax.Array, where: jax.Array) -> jax.Array:
    """f32[2]: sum and count of values [B] over where [B]."""
    return jnp.stack([jnp.where(where, values, 0).sum(), where.sum().astype(jnp.float32)])


def step_sums(values: Mapping[str, jax.Array], numbers: Mapping[str, jax.Array], finite: jax.Array) -> Sums:
    """Sums of per-example values [B] and of per-step numbers; a skipped step counts only in "skipped"."""
    sums = {name: mean_of(x, jnp.broadcast_to(finite, x.shape)) for name, x in values.items()}
    sums |= {name: mean_of(x[None], finite[None]) for name, x in numbers.items()}
    sums["skipped"] = jnp.stack([1 - finite.astype(jnp.float32), jnp.float32(1)])
    return sums
