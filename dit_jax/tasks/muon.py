"""Muon: momentum whose singular values are made equal, for the matrices of a network."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_jax.parallel.rules import path_name
from dit_jax.tasks.optimizer import (
    LARGEST,
    Group,
    Schedule,
    Scheduled,
    check,
    check_adam,
    check_decay,
    check_groups,
    decayed,
    finished,
    scaled,
)


def muon(
    matrices: Mapping[str, str],
    learning_rate: float = 0.02,
    beta: float = 0.95,
    nesterov: bool = True,
    num_iterations: int = 5,
    consistent_rms: float | None = None,
    adam_learning_rate: float = 1e-3,
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
    """Muon for the network's matrices, AdamW for the other parameters.

    The update of a matrix is its momentum with all singular values made about 1 (`orthogonalize`), times
    sqrt(max(1, outputs / inputs)): activations then change by about the rate at any width. Source: Jordan et al. 2024.

    Args:
        matrices: {pattern of paths: kinds of the trailing axes}, `Network.matrices`.
        learning_rate: the highest rate of the matrices. That of the other parameters rises and falls with it.
        warmup_steps: steps over which the rate rises linearly.
        decay_steps: the step at which the rate reaches zero; None keeps it constant.
        decay: the shape of the fall, cosine (half a period) or linear.
        decay_start: the step at which the fall begins; None for the end of the warm-up. Linear from a late step on is WSD.
        beta: decay of the momentum.
        nesterov: look one step ahead.
        num_iterations: iterations of Newton and Schulz.
        consistent_rms: the root mean square of an update in place of the factor above, such that AdamW's rates fit: 0.2 in
            Liu et al. 2025 (Moonlight, equation 4).
        adam_learning_rate: the highest rate of AdamW, for the other parameters.
        b1, b2: decay of Adam's first and second moment per step.
        eps: added to the square root of the second moment.
        weight_decay: per step, times the rate of the parameter.
        clip_norm: a gradient with a larger global norm is scaled to this norm; None does not clip.
        groups: (pattern, factor, weight decay) of parameters that have another rate or decay, see `check_groups`.

    Raises:
        UserError: a value is out of its range.
    """
    schedule = Schedule(learning_rate, warmup_steps, decay_steps, decay, decay_start)
    check_adam(b1, b2, eps)
    check(
        ("beta", beta, 0 <= beta < 1, "in [0, 1)"),
        ("num_iterations", num_iterations, num_iterations >= 1, "at least 1"),
        ("consistent_rms", consistent_rms, consistent_rms is None or consistent_rms > 0, "positive, or None"),
        ("adam_learning_rate", adam_learning_rate, 0 < adam_learning_rate <= LARGEST, f"positive, and at most {LARGEST:g}"),
    )
    check_decay(weight_decay, max(learning_rate, adam_learning_rate))
    check_groups(groups, max(learning_rate, adam_learning_rate))

    def part(params):
        def of(path, x):
            return "muon" if kinds_of(matrices, path_name(path)) else "adam"

        return jax.tree_util.tree_map_with_path(of, params)

    parts = {
        "muon": optax.chain(
            scale_by_muon(matrices, beta, nesterov, num_iterations, consistent_rms), decayed(groups, weight_decay)
        ),
        "adam": optax.chain(
            optax.scale_by_adam(b1, b2, eps), decayed(groups, weight_decay), optax.scale(adam_learning_rate / learning_rate)
        ),
    }
    update = optax.chain(
        optax.partition(parts, part), optax.scale_by_learning_rate(schedule.traced()), *([scaled(groups)] if groups else [])
    )
    return finished(update, clip_norm, schedule, is_bounded=False)


# Coefficients of Jordan et al. 2024: five iterations bring singular values of 0.001 to 1 to between 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: jax.Array, num_iterations: int = 5) -> jax.Array:
    """[..., m, n] matrices with their singular values moved to about 1, by x <- a x + (b x x^T + c (x x^T)^2) x in float32.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers", `zeropower_via_newtonschulz5`.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    y = x.astype(jnp.float32)
    y = jnp.swapaxes(y, -1, -2) if tall else y
    y = y / (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(num_iterations):
        square = y @ jnp.swapaxes(y, -1, -2)
        y = a * y + (b * square + c * square @ square) @ y
    return (jnp.swapaxes(y, -1, -2) if tall else y).astype(x.dtype)


def kinds_of(matrices: Mapping[str, str], name: str) -> str | None:
    """The kinds of a parameter's trailing axes by its path: "i" inputs, "o" outputs, "s" separate matrices; None: no matrix."""
    return next((kinds for pattern, kinds in matrices.items() if re.search(rf"(^|/){pattern}$", name)), None)


def as_matrices(x: jax.Array, kinds: str) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """([..., m, n] matrices of an array, the function that gives its layout back). Axes before those in `kinds` are separate."""
    kinds = "s" * (x.ndim - len(kinds)) + kinds
    axes = [i for kind in "sio" for i in range(x.ndim) if kinds[i] == kind]
    moved = x.transpose(axes)
    separate, inputs = kinds.count("s"), kinds.count("i")
    shape = moved.shape
    flat = (*shape[:separate], math.prod(shape[separate : separate + inputs]), math.prod(shape[separate + inputs :]))
    return moved.reshape(flat), lambda y: y.reshape(shape).transpose(np.argsort(axes))


def scale_by_muon(
    matrices: Mapping[str, str], beta: float, nesterov: bool, num_iterations: int, consistent_rms: float | None
) -> optax.GradientTransformation:
    """The updates of `muon` before the rate; its state is the momentum. All leaves must be matrices."""

    def update(updates, state, params=None):
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.trace, updates)
        ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, updates) if nesterov else momentum

        def one(path, x):
            flat, back = as_matrices(x, kinds_of(matrices, path_name(path)) or "io")
            m, n = flat.shape[-2:]
            scale = math.sqrt(max(1, n / m)) if consistent_rms is None else consistent_rms * math.sqrt(max(m, n))
            return back(scale * orthogonalize(flat, num_iterations))

        return jax.tree_util.tree_map_with_path(one, ahead), optax.TraceState(momentum)

    return optax.GradientTransformation(lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)), update)
