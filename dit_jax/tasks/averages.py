"""Moving averages of the parameters over training steps, and averages that are made afterwards from stored ones.

The average after t steps is sum_i w_i params_i over the steps i = 0 .. t, where params_0 are the initial parameters.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError

MOST_PARTS = 10_000
SMALLEST_SIGMA, LARGEST_SIGMA = 0.001, 0.28  # the largest is nearly that of the mean over all steps, 12 ** -0.5


class Average(Protocol):
    """How much of the new parameters an average takes in each step."""

    @property
    def name(self) -> str:
        """Its name in a config and after --average."""
        ...

    def gain(self, step: Any) -> Any:
        """The share of the new parameters in the average after step number `step`, from 1; also of a traced step."""
        ...

    def profile(self, steps: int) -> np.ndarray:
        """float64[steps + 1]: the weights w_0 .. w_t of the average after `steps` steps; their sum is 1."""
        ...


@dataclass(frozen=True)
class Exponential:
    """avg <- avg + (1 - d) (params - avg).

    Fields:
        rate: d.
        warmup: d is at most (1 + step) / (10 + step), so that a short run does not average its initial parameters.
    """

    rate: float
    warmup: bool = False

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise UserError(f"the decay of an average is {self.rate}; it must lie in [0, 1)")

    @property
    def name(self) -> str:
        return f"{self.rate!r}{'+warmup' if self.warmup else ''}"

    def gain(self, step: Any) -> Any:
        return jnp.maximum(1 - self.rate, 9 / (10 + step)) if self.warmup else 1 - self.rate

    def profile(self, steps: int) -> np.ndarray:
        at = np.arange(1, steps + 1, dtype=np.float64)
        return _profile(np.minimum(self.rate, (1 + at) / (10 + at)) if self.warmup else np.full(steps, self.rate))


@dataclass(frozen=True)
class Inverse:
    """avg <- avg + (1 - d) (params - avg) with d = min(rate, 1 - step ** -0.75): the initial parameters have no weight.

    Source: k-diffusion's "inverse" schedule, with which HDiT is trained (Crowson et al. 2024); its steps count from 0.

    Fields:
        rate: the largest d.
    """

    rate: float

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise UserError(f"the decay of an average is {self.rate}; it must lie in [0, 1)")

    @property
    def name(self) -> str:
        return f"{self.rate!r}+inverse"

    def gain(self, step: Any) -> Any:
        return jnp.maximum(1 - self.rate, jnp.float32(step) ** -0.75)

    def profile(self, steps: int) -> np.ndarray:
        return _profile(np.minimum(self.rate, 1 - np.arange(1, steps + 1, dtype=np.float64) ** -0.75))


def _profile(decays: np.ndarray) -> np.ndarray:
    """The weights of an average with the decays [steps]."""
    after = np.append(np.cumprod(decays[::-1])[::-1], 1.0)  # product of the decays from step i + 1 on
    return np.append(after[0], (1 - decays) * after[1:])


@dataclass(frozen=True)
class Power:
    """A power-function average: the weight of step i is (i / t) ** (g + 1) - ((i - 1) / t) ** (g + 1).

    Its width is a fixed share of the training so far, and the initial parameters have no weight.
    Source: Karras et al. 2024 (EDM2), equations 125 to 127, made exact for whole steps.

    Fields:
        sigma: relative standard deviation of the weights over time, 0.001 to 0.28; EDM2 stores 0.05 and 0.1.
    """

    sigma: float

    def __post_init__(self):
        if not SMALLEST_SIGMA <= self.sigma <= LARGEST_SIGMA:
            raise UserError(f"power:{self.sigma:g}: the width of an average must lie in [{SMALLEST_SIGMA}, {LARGEST_SIGMA}]")

    @property
    def name(self) -> str:
        return f"power:{self.sigma!r}"

    @functools.cached_property
    def exponent(self) -> float:
        """g, from sigma ** 2 = (g + 1) / ((g + 2) ** 2 (g + 3)): EDM2, equation 126."""
        inverse = self.sigma**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def gain(self, step: Any) -> Any:
        # 1 - (1 - 1 / step) ** (g + 1), without the rounding of 1 - 1 / step in float32: 3 % of the gain at a million steps.
        return -jnp.expm1((self.exponent + 1) * jnp.log1p(-1 / step))

    def profile(self, steps: int) -> np.ndarray:
        if not steps:
            return np.ones(1)
        edges = (np.arange(steps + 1, dtype=np.float64) / steps) ** (self.exponent + 1)
        return np.append(0.0, np.diff(edges))


def parse(text: str | float) -> Average:
    """The average of a name: "0.9999", "0.9999+warmup", "0.9999+inverse" or "power:0.1".

    Raises:
        UserError: it is none, or its number is out of range.
    """
    word = str(text)
    number = word.removeprefix("power:") if word.startswith("power:") else re.sub(r"\+(warmup|inverse)$", "", word)
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"{word!r} is no average; write 0.9999, 0.9999+warmup, 0.9999+inverse or power:0.1") from None
    if word.startswith("power:"):
        return Power(value)
    return Inverse(value) if word.endswith("+inverse") else Exponential(value, word.endswith("+warmup"))


def key(average: Average) -> str:
    """The key of an average in the training state: "power_0_1"."""
    return re.sub(r"\W", "_", average.name)


def parse_all(names: Iterable[str | float]) -> tuple[Average, ...]:
    """The averages of these names.

    Raises:
        UserError: as `parse`; or one is given twice.
    """
    averages = tuple(parse(name) for name in names)
    if len(set(averages)) < len(averages):
        raise UserError(f"averages = {[average.name for average in averages]} has the same one twice")
    return averages


def moving_average(ema_params: Any, params: Any, gain: float | jax.Array) -> Any:
    """ema + gain * (params - ema) in float32."""
    return jax.tree.map(lambda e, p: e + gain * (p.astype(jnp.float32) - e), ema_params, params)


def updated(averages: Iterable[Average], stored: Mapping[str, Any], params: Any, step: jax.Array) -> dict[str, Any]:
    """The stored averages after step number `step`, from 1, whose new parameters are `params`."""
    return {key(average): moving_average(stored[key(average)], params, average.gain(step)) for average in averages}


def progress(average: Average, steps: int) -> dict[str, Any]:
    """How far an average has come after so many steps, for result.json.

    Returns:
        "name"; "initial_weights", the share of the initial parameters; "mean_age_steps", the weighted mean of the number of steps
        since the others.
    """
    profile = average.profile(steps)
    initial = float(profile[0])
    age = float(profile[1:] @ np.arange(steps - 1, -1, -1) / (1 - initial)) if initial < 1 else 0.0
    return {"name": average.name, "initial_weights": initial, "mean_age_steps": age}


def combine(stored: Sequence[tuple[Average, int]], wanted: Average, steps: int) -> tuple[np.ndarray, float]:
    """The combination of stored averages that is nearest to another one: EDM2's post-hoc average (algorithm 3).

    Args:
        stored: each average with the number of steps after which it was stored.
        wanted, steps: the average, and the number of steps after which it is wanted.

    Returns:
        (float64[number of stored] factors, their error: the norm of the difference of the weights over that of `wanted`).

    Raises:
        UserError: none is stored, or none of a step up to `steps`.
    """
    used = [place for place, (_, at) in enumerate(stored) if at <= steps]
    if not used:
        raise UserError(f"{wanted.name} at step {steps} cannot be made: no average of step {steps} or before is stored")
    # Steps are taken in at most MOST_PARTS parts: the weights of two hundred averages over millions of steps need no gigabytes.
    edges = np.unique(np.linspace(0, steps, MOST_PARTS, dtype=int))

    def parts(average, at):
        return np.add.reduceat(np.append(average.profile(at), np.zeros(steps - at)), edges)

    profiles = np.stack([parts(*stored[place]) for place in used], axis=1)
    target = parts(wanted, steps)
    found, *_ = np.linalg.lstsq(profiles, target, rcond=None)
    error = float(np.linalg.norm(profiles @ found - target) / np.linalg.norm(target))
    factors = np.zeros(len(stored))
    factors[used] = found
    return factors, error
