"""Optimizers, as functions of plain numbers."""

import optax

from dit_jax.errors import UserError


def adamw(learning_rate: float = 1e-4, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
          warmup_steps: int = 0, clip_norm: float | None = None) -> optax.GradientTransformation:
    """AdamW with a constant rate after a linear warm-up, and optional clipping by the global norm.

    The defaults are the paper's (Peebles & Xie 2023, section 4). Decoupled decay: Loshchilov & Hutter 2019.

    Raises:
        UserError: a value is out of its range.
    """
    for name, value, good, wanted in (
        ("learning_rate", learning_rate, learning_rate > 0, "positive"),
        ("b1", b1, 0 <= b1 < 1, "in [0, 1)"),
        ("b2", b2, 0 <= b2 < 1, "in [0, 1)"),
        ("eps", eps, eps > 0, "positive"),
        ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
        ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
        ("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "positive, or None for no clipping"),
    ):
        if not good:
            raise UserError(f"optimizer.{name} is {value}; it must be {wanted}")
    rate = learning_rate
    if warmup_steps:
        rate = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    update = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay)
    return update if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), update)
