"""Optimizers, as functions of plain numbers."""

import functools
import math
from collections.abc import Callable

import numpy as np
import optax

from dit_jax.errors import UserError

LARGEST, SMALLEST = 1e30, 1e-30  # numbers whose products with those of a training step stay within float32


class Scheduled(optax.GradientTransformationExtraArgs):
    """An optimizer that knows its learning rate.

    Fields:
        rate: number of finished steps -> the rate of the next step. A function of the host, which waits for no device.
        is_bounded: finite float32 parameters and gradients give finite new parameters.
    """

    rate: Callable[[int], float]
    is_bounded: bool


def rate_after(step: int, learning_rate: float, warmup_steps: int, decay_steps: int | None) -> float:
    """The rate of `adamw` after `step` finished steps."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    if decay_steps is None:
        return learning_rate
    part = min((step - warmup_steps) / max(decay_steps - warmup_steps, 1), 1.0)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * part))


def adamw(
    learning_rate: float = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    clip_norm: float | None = None,
) -> Scheduled:
    """AdamW with optional warm-up, decay of the rate, and clipping by the global norm.

    The defaults are the paper's (Peebles & Xie 2023, section 4). Decoupled decay: Loshchilov & Hutter 2019.

    Args:
        learning_rate: the highest rate.
        b1, b2: decay of Adam's first and second moment per step.
        eps: added to the square root of the second moment.
        weight_decay: per step, times the rate; 0 is the paper's. The product is at most 1.
        warmup_steps: steps over which the rate rises linearly.
        decay_steps: the step at which the rate reaches zero, by a half cosine from warmup_steps on; None keeps it constant.
        clip_norm: a gradient with a larger global norm is scaled to this norm; None does not clip.

    Raises:
        UserError: a value is out of its range.
    """
    for name, value, good, wanted in (
        ("learning_rate", learning_rate, 0 < learning_rate <= LARGEST, f"positive, and at most {LARGEST:g}"),
        ("b1", b1, b1 >= 0 and np.float32(b1) < 1, "in [0, 1), and below 1 in float32"),  # its bias correction divides by 1 - b1
        ("b2", b2, b2 >= 0 and np.float32(b2) < 1, "in [0, 1), and below 1 in float32"),
        ("eps", eps, SMALLEST <= eps <= LARGEST, f"{SMALLEST:g} to {LARGEST:g}"),  # below, a gradient of 0 gives 0 / 0
        (
            "weight_decay",
            weight_decay,
            0 <= weight_decay * learning_rate <= 1,
            f"at least 0, and at most 1 when multiplied by the learning rate {learning_rate:g}",
        ),
        ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
        ("decay_steps", decay_steps, decay_steps is None or decay_steps > 0, "at least 1, or None for a constant rate"),
        ("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "positive, or None for no clipping"),
    ):
        if not good:
            raise UserError(f"optimizer.{name} is {value}; it must be {wanted}")
    rate = learning_rate
    if decay_steps is not None:
        rate = optax.cosine_decay_schedule(learning_rate, max(decay_steps - warmup_steps, 1))
    elif warmup_steps:
        rate = optax.constant_schedule(learning_rate)
    if warmup_steps:
        rise = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
        rate = optax.join_schedules([rise, rate], [warmup_steps])
    update = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay)
    update = update if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), update)
    scheduled = Scheduled(*update)
    scheduled.is_bounded = True
    scheduled.rate = functools.partial(
        rate_after, learning_rate=learning_rate, warmup_steps=warmup_steps, decay_steps=decay_steps
    )
    return scheduled
