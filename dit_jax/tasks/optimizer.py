"""Optimizers, as functions of plain numbers.

`adamw` is the paper's. `adafactor` keeps the second moments of matrices as row and column sums. `tasks.muon` has Muon.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from dit_jax.errors import UserError
from dit_jax.parallel.rules import path_name

LARGEST, SMALLEST = 1e30, 1e-30  # numbers whose products with those of a training step stay within float32
DECAYS = ("cosine", "linear")
Group = Sequence[Any]  # (pattern of paths, factor of the rate, weight decay or None)


class Scheduled(optax.GradientTransformationExtraArgs):
    """An optimizer that knows its learning rate.

    Fields:
        rate: number of finished steps -> the rate of the next step. A function of the host, which waits for no device.
        is_bounded: finite float32 parameters and gradients give finite new parameters.
    """

    rate: Callable[[int], float]
    is_bounded: bool


@dataclass(frozen=True)
class Schedule:
    """The learning rate by step: a linear rise, a constant part, and a fall to zero.

    Linear from a late step on is "warmup, stable, decay" (WSD, Hu et al. 2024, section 4).

    Fields:
        learning_rate: the highest rate.
        warmup_steps: steps over which the rate rises linearly.
        decay_steps: the step at which the rate reaches zero; None keeps it constant.
        decay: the shape of the fall: "cosine" (half a period) or "linear".
        decay_start: the step at which the fall begins; None for the end of the warm-up.

    Raises:
        UserError: a value is out of its range.
    """

    learning_rate: float
    warmup_steps: int = 0
    decay_steps: int | None = None
    decay: str = "cosine"
    decay_start: int | None = None

    def __post_init__(self):
        check(
            ("learning_rate", self.learning_rate, 0 < self.learning_rate <= LARGEST, f"positive, and at most {LARGEST:g}"),
            ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0"),
            ("decay_steps", self.decay_steps, self.decay_steps is None or self.decay_steps > 0, "at least 1, or None"),
            ("decay", self.decay, self.decay in DECAYS, f"one of {', '.join(DECAYS)}"),
        )
        start, end = self.decay_start, self.decay_steps
        check(
            (
                "decay_start",
                start,
                start is None or (end is not None and self.warmup_steps <= start < end),
                f"None, or from warmup_steps = {self.warmup_steps} to below decay_steps = {end}",
            )
        )

    @property
    def _start(self) -> int:
        return self.warmup_steps if self.decay_start is None else self.decay_start

    def __call__(self, step: int) -> float:
        """The rate after `step` finished steps."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.decay_steps is None or step < self._start:
            return self.learning_rate
        part = min((step - self._start) / max(self.decay_steps - self._start, 1), 1.0)
        return self.learning_rate * (1 - part if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * part)))

    def traced(self) -> float | optax.Schedule:
        """The same as a function of a traced count; a number if it is constant."""
        rate, pieces, bounds = self.learning_rate, [], []
        if self.warmup_steps:
            pieces.append(optax.linear_schedule(rate / self.warmup_steps, rate, self.warmup_steps - 1))
            bounds.append(self.warmup_steps)
        if self.decay_steps is None:
            pieces.append(optax.constant_schedule(rate))
        else:
            if self._start > self.warmup_steps:
                pieces.append(optax.constant_schedule(rate))
                bounds.append(self._start)
            steps = max(self.decay_steps - self._start, 1)
            linear = self.decay == "linear"
            pieces.append(optax.linear_schedule(rate, 0.0, steps) if linear else optax.cosine_decay_schedule(rate, steps))
        if len(pieces) > 1:
            return optax.join_schedules(pieces, bounds)
        return rate if self.decay_steps is None else pieces[0]


def check(*rows: tuple[str, Any, Any, str]) -> None:
    """Raises a UserError for the first row (field, value, whether it is good, what is wanted) that is not good."""
    for name, value, good, wanted in rows:
        if not good:
            raise UserError(f"optimizer.{name} is {value}; it must be {wanted}")


def adamw(
    learning_rate: float = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay: str = "cosine",
    decay_start: int | None = None,
    clip_norm: float | None = None,
    groups: Sequence[Group] = (),
) -> Scheduled:
    """AdamW with optional warm-up, decay of the rate, and clipping by the global norm.

    The defaults are the paper's (Peebles & Xie 2023, section 4). Decoupled decay: Loshchilov & Hutter 2019.

    Args:
        learning_rate: the highest rate.
        warmup_steps: steps over which the rate rises linearly.
        decay_steps: the step at which the rate reaches zero; None keeps it constant.
        decay: the shape of the fall, cosine (half a period) or linear.
        decay_start: the step at which the fall begins; None for the end of the warm-up. Linear from a late step on is WSD.
        b1, b2: decay of Adam's first and second moment per step.
        eps: added to the square root of the second moment.
        weight_decay: per step, times the rate; 0 is the paper's. The product is at most 1.
        clip_norm: a gradient with a larger global norm is scaled to this norm; None does not clip.
        groups: (pattern, factor, weight decay) of parameters that have another rate or decay, see `check_groups`.

    Raises:
        UserError: a value is out of its range.
    """
    schedule = Schedule(learning_rate, warmup_steps, decay_steps, decay, decay_start)
    check_adam(b1, b2, eps)
    check_decay(weight_decay, learning_rate)
    check_groups(groups, learning_rate)
    if groups:
        update = optax.chain(optax.scale_by_adam(b1, b2, eps), *_grouped(groups, weight_decay, schedule.traced()))
    else:
        update = optax.adamw(schedule.traced(), b1, b2, eps, weight_decay=weight_decay)
    return finished(update, clip_norm, schedule, is_bounded=True)


def adafactor(
    learning_rate: float = 1e-3,
    decay_rate: float = 0.8,
    min_factored_size: int = 128,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay: str = "cosine",
    decay_start: int | None = None,
    clip_norm: float | None = None,
    groups: Sequence[Group] = (),
) -> Scheduled:
    """Adafactor with the rates of a schedule: the second moments of a matrix are sums of its rows and columns.

    Source: Shazeer & Stern 2018, algorithm 4, without its relative step size.

    Args:
        learning_rate: the highest rate.
        warmup_steps: steps over which the rate rises linearly.
        decay_steps: the step at which the rate reaches zero; None keeps it constant.
        decay: the shape of the fall, cosine (half a period) or linear.
        decay_start: the step at which the fall begins; None for the end of the warm-up. Linear from a late step on is WSD.
        decay_rate: the second moments' decay at step t is 1 - t ** -decay_rate.
        min_factored_size: smaller matrices keep all second moments.
        clipping_threshold: of the root mean square of an update; None does not clip.
        momentum: of the updates; None keeps none, which saves its memory.
        weight_decay: per step, times the rate.
        clip_norm: a gradient with a larger global norm is scaled to this norm; None does not clip.
        groups: (pattern, factor, weight decay) of parameters that have another rate or decay, see `check_groups`.

    Raises:
        UserError: a value is out of its range.
    """
    schedule = Schedule(learning_rate, warmup_steps, decay_steps, decay, decay_start)
    check(
        ("decay_rate", decay_rate, 0 < decay_rate <= 1, "in (0, 1]"),
        ("min_factored_size", min_factored_size, min_factored_size >= 1, "at least 1"),
        (
            "clipping_threshold",
            clipping_threshold,
            clipping_threshold is None or clipping_threshold > 0,
            "positive, or None for no clipping",
        ),
        ("momentum", momentum, momentum is None or 0 <= momentum < 1, "in [0, 1), or None"),
    )
    check_decay(weight_decay, learning_rate)
    check_groups(groups, learning_rate)
    scales = [optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_factored_size)]
    if clipping_threshold is not None:
        scales.append(optax.clip_by_block_rms(clipping_threshold))
    if momentum is not None:
        scales.append(optax.ema(momentum, debias=False))
    update = optax.chain(*scales, *_grouped(groups, weight_decay, schedule.traced()))
    return finished(update, clip_norm, schedule, is_bounded=False)


def finished(update: optax.GradientTransformation, clip_norm: float | None, schedule: Schedule, is_bounded: bool) -> Scheduled:
    """The optimizer with clipping by the global norm and its rate."""
    check(("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "positive, or None for no clipping"))
    update = update if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), update)
    scheduled = Scheduled(*optax.with_extra_args_support(update))
    scheduled.rate, scheduled.is_bounded = schedule, is_bounded
    return scheduled


def check_adam(b1: float, b2: float, eps: float) -> None:
    """Raises a UserError for numbers with which Adam makes NaN of finite gradients."""
    check(
        ("b1", b1, b1 >= 0 and np.float32(b1) < 1, "in [0, 1), and below 1 in float32"),  # its bias correction divides by 1 - b1
        ("b2", b2, b2 >= 0 and np.float32(b2) < 1, "in [0, 1), and below 1 in float32"),
        ("eps", eps, SMALLEST <= eps <= LARGEST, f"{SMALLEST:g} to {LARGEST:g}"),  # below, a gradient of 0 gives 0 / 0
    )


def check_decay(weight_decay: float, learning_rate: float, field: str = "weight_decay") -> None:
    """Raises a UserError if a weight decay is negative, or would turn the sign of a weight."""
    wanted = f"at least 0, and at most 1 when multiplied by the learning rate {learning_rate:g}"
    check((field, weight_decay, 0 <= weight_decay * learning_rate <= 1, wanted))


def check_groups(groups: Sequence[Group], learning_rate: float) -> None:
    """Raises a UserError if a group is not (pattern, factor of the rate, weight decay or None).

    A pattern is a regular expression for the end of a path, such as "blocks/.*/kernel". The first group that matches a parameter
    counts; a parameter without a group has factor 1 and the optimizer's decay. A group without parameters is an error when the
    optimizer's state is made. The decay is multiplied by the rate of the group.
    """
    for group in groups:
        if len(group) != 3 or not isinstance(group[0], str):
            raise UserError(f"optimizer.groups has {group!r}; a group is (pattern, factor of the rate, weight decay or None)")
        pattern, factor, weight_decay = group
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"optimizer.groups: {pattern!r} is no regular expression ({error})") from None
        check((f"groups: the factor of {pattern!r}", factor, 0 <= factor <= LARGEST, f"at least 0, and at most {LARGEST:g}"))
        if weight_decay is not None:
            check_decay(weight_decay, learning_rate * max(factor, 1), f"groups: the weight decay of {pattern!r}")


def group_of(groups: Sequence[Group], name: str) -> int | None:
    """The number of the first group that matches the path of a parameter."""
    return next((i for i, (pattern, *_) in enumerate(groups) if re.search(rf"(^|/){pattern}$", name)), None)


def _grouped(groups: Sequence[Group], weight_decay: float, rate: float | optax.Schedule) -> list[optax.GradientTransformation]:
    """Weight decay and rate, the last parts of an optimizer."""
    return [
        decayed(groups, weight_decay),
        optax.scale_by_learning_rate(rate),
        *([scaled(groups)] if groups else []),
    ]


def decayed(groups: Sequence[Group], weight_decay: float) -> optax.GradientTransformation:
    """Adds each parameter times its weight decay to its update."""
    if not groups:
        return optax.add_decayed_weights(weight_decay)

    def add(path, update, param):
        group = group_of(groups, path_name(path))
        own = None if group is None else groups[group][2]
        return update + (weight_decay if own is None else own) * param.astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(add, updates, params))


def scaled(groups: Sequence[Group]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of its group. `init` raises a UserError for a group without parameters."""

    def scale(path, update):
        group = group_of(groups, path_name(path))
        return update if group is None else groups[group][1] * update

    def init(params):
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        numbers = {group_of(groups, name) for name in names}
        for i, (pattern, *_) in enumerate(groups):
            if i not in numbers:
                raise UserError(
                    f"optimizer.groups: {pattern!r} is the first of no parameter; paths are such as {names[0]} and {names[-1]}"
                )
        return optax.EmptyState()

    return optax.GradientTransformation(
        init, lambda updates, state, params=None: (jax.tree_util.tree_map_with_path(scale, updates), state)
    )
