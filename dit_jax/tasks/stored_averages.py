"""Reads the parameters of a run from its checkpoints: the weights themselves, or one of their moving averages."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.errors import UserError
from dit_jax.runtime.console import say
from dit_jax.storage.checkpoints import restore_subtree
from dit_jax.storage.step_folder import steps_in
from dit_jax.tasks import averages
from dit_jax.tasks.averages import Average, Power
from dit_jax.tasks.state import TrainState

NAMES = {"default": "ema_params", "none": "params"}  # of the entries of every training state
MOST_ERROR = 0.1  # of an average that is made afterwards, see `averages.combine`


def check_name(name: str) -> None:
    """Raises a UserError if `name` is neither one of NAMES nor an average, see `averages.parse`."""
    if name not in NAMES:
        try:
            averages.parse(name)
        except UserError as error:
            raise UserError(f"average={name!r} is not one of {', '.join(NAMES)}: {error}") from None


def read(
    root: Path, state: TrainState, stored: Iterable[Average], name: str = "default", step: int | None = None
) -> tuple[Any, int]:
    """(parameters, their step).

    A power-function average that is not stored is made from those that are, of all checkpoints up to the step.

    Args:
        root: folder of the checkpoints.
        state: ShapeDtypeStructs with the shardings that are wanted.
        stored: the averages of the run, that in `ema_params` first.
        name: one of NAMES, or an average.
        step: None for the newest checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        UserError: the run does not have the average, or its checkpoints are too few to make it.
    """
    stored = tuple(stored)
    entry = _entry(root.parent, stored, name)
    if entry is None:
        powers = [one for one in stored if isinstance(one, Power)]
        return _combined(root, state, powers, averages.parse(name), step)
    field, *inner = entry
    tree = getattr(state, field)
    wanted = {field: tree if not inner else {inner[0]: tree[inner[0]]}}
    restored, _, step = restore_subtree(root, wanted, step)
    for part in entry:
        restored = restored[part]
    return restored, step


def _entry(folder: Path, stored: tuple[Average, ...], name: str) -> tuple[str, ...] | None:
    """The path of an average in the training state; None for a power-function average that is not stored.

    Raises:
        UserError: the run in the folder does not have it.
    """
    if name in NAMES:
        return (NAMES[name],)
    wanted = averages.parse(name)
    if wanted in stored:
        return ("averages", averages.key(wanted)) if stored.index(wanted) else ("ema_params",)
    if isinstance(wanted, Power) and any(isinstance(one, Power) for one in stored):
        return None
    have = ", ".join(one.name for one in stored)
    raise UserError(
        f"average={name!r}: {folder} has {have}; 'none' takes the weights themselves. A power-function average of any "
        "width can be made from a run with --config.averages=('power:0.05','power:0.1')"
    )


def _combined(root: Path, state: TrainState, powers: list[Power], wanted: Average, step: int | None) -> tuple[Any, int]:
    """An average that is made from the power-function averages of all checkpoints up to the step."""
    steps = [at for at in steps_in(root) if step is None or at <= step]
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"no checkpoint {'' if step is None else f'of step {step} '}in {root}")
    known = [(one, at) for at in steps for one in powers]
    factors, error = averages.combine(known, wanted, steps[-1])
    if error > MOST_ERROR:
        raise UserError(
            f"average={wanted.name!r} cannot be made from {' and '.join(one.name for one in powers)} of {len(steps)} "
            f"checkpoints in {root}: the weights of the steps would be off by {error:.0%}; keep more checkpoints with "
            "checkpoint.keep_every_steps"
        )
    say(f"{wanted.name} of step {steps[-1]} from {len(steps)} checkpoints, weights of the steps off by {error:.1%}")
    total = None
    for at in steps:
        keys = {averages.key(one): state.averages[averages.key(one)] for one in powers}
        tree = restore_subtree(root, {"averages": keys}, at)[0]["averages"]
        for one in powers:
            total = _add(tree[averages.key(one)], factors[known.index((one, at))], total)
    return total, steps[-1]


@jax.jit
def _add(part: Any, factor: float, total: Any) -> Any:
    """factor * part + total, in float32."""
    scaled = jax.tree.map(lambda x: factor * x, part)
    return scaled if total is None else jax.tree.map(jnp.add, scaled, total)
