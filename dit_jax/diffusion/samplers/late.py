"""Starts a sampler at a time below 1: the rest of its own grid, from data that is perturbed to that time (SDEdit)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dit_jax import registry
from dit_jax.diffusion.process import Denoise, Process
from dit_jax.errors import UserError


@dataclass(frozen=True)
class LastSteps:
    """A process whose sampling grids lack their first `skipped` steps; all else is the process's."""

    process: Process
    skipped: int

    def grid(self, num_steps: int, spacing: str = "even") -> np.ndarray:
        return self.process.grid(num_steps + self.skipped, spacing)[self.skipped :]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "process":  # of an object that is being copied
            raise AttributeError(name)
        return getattr(self.process, name)


@dataclass(frozen=True)
class Started:
    """A sampler that runs its last steps only; called with x_t at `start_time` in place of noise.

    Fields:
        rest: the sampler with as many steps as remain.
        skipped: number of steps that are left out.
    """

    rest: Any
    skipped: int

    @property
    def num_steps(self) -> int:
        return self.rest.num_steps

    def evaluations(self, process: Process) -> int | None:
        return self.rest.evaluations(LastSteps(process, self.skipped))

    def times(self, process: Process) -> np.ndarray:
        return self.rest.times(LastSteps(process, self.skipped))

    def __call__(self, process: Process, denoise: Denoise, x: jax.Array, keys: jax.Array) -> jax.Array:
        return self.rest(LastSteps(process, self.skipped), denoise, x, keys)


def start_time(sampler: Any, process: Process) -> float:
    """The t of the first evaluation of a sampler; of one without `times`, the first of the process's grids."""
    return float((sampler.times(process) if can_start(sampler) else process.grid(2))[0])


def can_start(sampler: Any) -> bool:
    """Whether a sampler (or its class) can start below t = 1: it has `times(process)`, from which it derives all else."""
    return callable(getattr(sampler, "times", None))


def started(sampler: Any, process: Process, t: float) -> Any:
    """The sampler from the first time of its own grid that is at most t on; the sampler itself if that is the grid's first.

    Raises:
        UserError: the sampler cannot start below t = 1; no step is left, or too few for the sampler.
    """
    if not can_start(sampler):
        names = ", ".join(name for name in registry.names("sampler") if can_start(registry.get("sampler", name)))
        raise UserError(
            f"sampler {type(sampler).__name__} cannot start from a given image: it has no grid of times; choose one of {names}"
        )
    times = sampler.times(process)
    noisy = times[:-1] if times[-1] == 0 else times
    skipped = int(np.searchsorted(-times, -(t + 1e-9)))
    if skipped >= len(noisy):
        raise UserError(
            f"strength={t:g} is below the last noisy time of the sampler's grid, {noisy[-1]:.4g}; take a greater strength, or "
            "more steps"
        )
    if not skipped:
        return sampler
    try:
        rest = dataclasses.replace(sampler, num_steps=sampler.num_steps - skipped)
    except UserError as error:
        raise UserError(f"strength={t:g} leaves {sampler.num_steps - skipped} of {sampler.num_steps} steps: {error}") from None
    late = Started(rest, skipped)
    if not np.array_equal(late.times(process), times[skipped:]):
        raise UserError(
            f"sampler {type(sampler).__name__} cannot start from a given image: its times are not the grid of its num_steps"
        )
    return late
