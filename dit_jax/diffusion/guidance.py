"""Condition dropout and guidance, as functions around a network.

B batch, C data channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dit_jax.diffusion.process import Network, expand
from dit_jax.errors import UserError

SCHEDULES = ("constant", "power_cosine")


def replace_condition(dropped: jax.Array, cond: Any, null_cond: Any) -> Any:
    """Replaces the condition of each example where `dropped`, bool[B], by the null condition, all entries together.

    Args:
        cond, null_cond: pytrees of arrays [B, ...] with the same keys and shapes.

    Source: Ho & Salimans 2022, algorithm 1.
    """
    return jax.tree.map(lambda x, null: jnp.where(expand(dropped, x), null, x), cond, null_cond)


def run_pairs(network: Network, x: jax.Array, time: jax.Array, cond: Any, null_cond: Any) -> tuple[jax.Array, jax.Array]:
    """Outputs of the network with cond and with null_cond, from one call on 2B examples."""
    # The pairs are interleaved, not concatenated, so that a batch split over devices does not move.
    pairs = jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), cond, null_cond)
    both = network(jnp.repeat(x, 2, axis=0), jnp.repeat(time, 2), pairs)
    return both[::2], both[1::2]


def run_all(network: Network, x: jax.Array, time: jax.Array, *conds: Any) -> list[jax.Array]:
    """Outputs of the network with each of n conditions, from one call on n B examples, which are interleaved."""
    count = len(conds)
    joined = jax.tree.map(lambda *each: jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:]), *conds)
    out = network(jnp.repeat(x, count, axis=0), jnp.repeat(time, count), joined)
    return [out[i::count] for i in range(count)]


@dataclass(frozen=True)
class Guidance:
    """Extrapolates the network's output from a weaker one: weak + scale (strong - weak) on the data channels.

    The weaker output is the same network's without condition (classifier-free guidance), or that of a second network with the
    same condition (autoguidance). The learned variance is that of the strong output.

    Fields:
        scale: at least 0. 1 turns guidance off; the network then runs once. 0 ignores the condition.
        channels: number of data channels to guide, from the first; None for all. DiT's released samples used 3 of 4.
        low, high: guide only where low <= t <= high (Kynkaanniemi et al. 2024); where no example is inside, the network runs
            once.
        schedule: of the scale over t, one of SCHEDULES, see `scale_at`. It applies to the guided channels and inside the
            interval; outside of it the scale is 1.
        power: of "power_cosine", positive; 4 in DiffiT. A greater power guides less at noisy times.
        skip_layers: numbers of the network's blocks, from 0, without which it is called once more: skip-layer guidance adds
            skip_scale (strong - the output without these blocks) to the guided channels. () turns it off. Stable Diffusion 3.5
            medium has 7, 8, 9.
        skip_scale: of skip-layer guidance, at least 0.
        skip_low, skip_high: shares of the sampler's steps; skip-layer guidance acts at step i of n with
            skip_low n < i < skip_high n, counted from noise. It does not depend on low, high and schedule.
        image_scale: at least 0, of the given part of a clip (the job animate and its like). With text T and given part G the
            output is v(0, 0) + image_scale (v(G, 0) - v(0, 0)) + scale (v(G, T) - v(G, 0)), from one call on 3B examples. 1 turns
            it off: the given part is then in both conditions.

    Source: Ho & Salimans 2022, equation 6 (their w is scale - 1); Karras et al. 2024 (autoguidance); the released sampling code
    of Stable Diffusion 3.5 (skip-layer guidance), with the steps of diffusers; Open-Sora 2 (arXiv 2503.09642) for two scales,
    after Brooks et al. 2023 (InstructPix2Pix), equation 3.
    """

    scale: float = 1.0
    channels: int | None = None
    low: float = 0.0
    high: float = 1.0
    schedule: str = "constant"
    power: float = 4.0
    skip_layers: tuple[int, ...] = ()
    skip_scale: float = 2.8
    skip_low: float = 0.01
    skip_high: float = 0.2
    image_scale: float = 1.0

    def __post_init__(self):
        given = self.skip_layers  # a config that was read from JSON gives a list
        object.__setattr__(self, "skip_layers", (given,) if isinstance(given, int) else tuple(given))
        if not 0 <= self.scale < float("inf"):
            raise UserError(
                f"guidance.scale is {self.scale}; it must be at least 0 (1 turns guidance off, 0 ignores the condition)"
            )
        if not 0 <= self.image_scale < float("inf"):
            raise UserError(
                f"guidance.image_scale is {self.image_scale}; it must be at least 0 (1 turns it off, 0 ignores the given part)"
            )
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(f"guidance.low is {self.low} and guidance.high {self.high}; 0 <= low <= high <= 1 is required")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"guidance.channels is {self.channels}; it must be at least 1, or None for all")
        if self.schedule not in SCHEDULES:
            raise UserError(f"guidance.schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}")
        if not 0 < self.power < float("inf"):
            raise UserError(f"guidance.power is {self.power}; it must be positive")
        if not all(type(layer) is int and layer >= 0 for layer in self.skip_layers):
            raise UserError(f"guidance.skip_layers is {self.skip_layers}; it must be numbers of blocks, from 0, as in (7, 8, 9)")
        if not 0 <= self.skip_scale < float("inf"):
            raise UserError(f"guidance.skip_scale is {self.skip_scale}; it must be at least 0")
        if not 0 <= self.skip_low < self.skip_high <= 1:
            raise UserError(
                f"guidance.skip_low is {self.skip_low} and guidance.skip_high {self.skip_high}; 0 <= skip_low < skip_high <= 1 "
                "is required"
            )

    @property
    def active(self) -> bool:
        return self.scale != 1.0

    @property
    def guides_by_given(self) -> bool:
        """Whether the given part of a clip has a scale of its own."""
        return self.image_scale != 1.0

    @property
    def is_partial(self) -> bool:
        """Whether some times are not guided."""
        return (self.low, self.high) != (0.0, 1.0)

    def scale_at(self, t: ArrayLike, first_time: float = 0.0) -> jax.Array | float:
        """The scale w(t), shaped as t; `scale` for "constant".

        "power_cosine": w(t) = 1 + (scale - 1) (1 - cos(pi (1 - s)^power)) / 2 with s = t - first_time: 1 at noise, `scale` at
        data. In the published code s = timestep / T with timesteps 0 to T - 1, which is t less the first time, 1 / T.

        Source: Gao et al. 2023 (MDT), section 3.4, and its released sampling code; Hatamizadeh et al. 2023 (DiffiT), whose
        ImageNet-256 samples have scale 4.4 and power 4; Gupta et al. 2023 (W.A.L.T).
        """
        if self.schedule == "constant":
            return self.scale
        rest = jnp.clip(1 - (jnp.asarray(t, jnp.float32) - first_time), 0, 1)
        return 1 + (self.scale - 1) * (1 - jnp.cos(jnp.pi * rest**self.power)) / 2

    def skip_times(self, times: np.ndarray) -> tuple[float, float]:
        """The times between which skip-layer guidance acts, for the grid [n + 1] of a sampler.

        They lie halfway between the times of two steps, so that rounding does not move a step over an end.

        Raises:
            UserError: no step lies between skip_low and skip_high.
        """
        n = len(times) - 1
        acts = [i for i in range(n) if n * self.skip_low < i < n * self.skip_high]
        if not acts:
            raise UserError(
                f"guidance.skip_low {self.skip_low} to skip_high {self.skip_high} has none of the {n} sampling steps, 0 to "
                f"{n - 1}; raise skip_high or take more steps"
            )
        first, last = acts[0], acts[-1]
        high = float("inf") if first == 0 else (times[first - 1] + times[first]) / 2
        return float((times[last] + times[last + 1]) / 2), float(high)

    def __call__(
        self,
        network: Network,
        cond: Any,
        null_cond: Any,
        weak: Network | None = None,
        first_time: float = 0.0,
        skipped: Network | None = None,
        skip_times: tuple[float, float] = (0.0, 1.0),
        bare_cond: Any = None,
    ) -> Callable:
        """Binds the conditions.

        Args:
            network: (x [B, ..., C], network time f32[B], cond) -> [B, ..., C or more].
            cond, null_cond: dicts of arrays [B, ...] with the same keys.
            weak: the second network of autoguidance; null_cond is then not used.
            first_time: the process's `min_time`, see `scale_at`.
            skipped: the network without `skip_layers`; None for no skip-layer guidance.
            skip_times: see the method of that name.
            bare_cond: null_cond without the given part, for image_scale; None where nothing is given, and image_scale has no
                effect.

        Returns:
            (x, t, network_time; both scalars or f32[B]) -> the guided output, shaped as the network's.
        """

        def unguided(x, time):
            return network(x, time, cond)

        by_given = self.guides_by_given and bare_cond is not None
        if by_given and weak:
            raise UserError(
                f"guidance.image_scale is {self.image_scale} and a second network guides (autoguidance); choose one, or set the "
                "image scale to 1"
            )

        def guided(x, t, time, inside):
            if by_given:
                strong, weaker, bare = run_all(network, x, time, cond, null_cond, bare_cond)
                out = self.extrapolate(strong, weaker, inside, x.shape[-1], self.scale_at(t, first_time))
                count = self.channels or x.shape[-1]
                more = jnp.where(expand(inside, out), (self.image_scale - 1) * (weaker - bare), 0)
                return out.at[..., :count].add(more[..., :count]), strong
            strong, weaker = (unguided(x, time), weak(x, time, cond)) if weak else run_pairs(network, x, time, cond, null_cond)
            return self.extrapolate(strong, weaker, inside, x.shape[-1], self.scale_at(t, first_time)), strong

        def both(x, t, time):
            """(guided output, the strong output)."""
            if not self.active and not by_given:
                return (unguided(x, time),) * 2
            if not self.is_partial:
                return guided(x, t, time, True)
            inside = jnp.asarray((self.low <= t) & (jnp.minimum(t, 1) <= self.high))  # t is above 1 where a sampler adds noise
            used = slice(1 if skipped is None else 2)  # without skip-layer guidance the strong output is not kept
            outputs = jax.lax.cond(
                inside.any(), lambda: guided(x, t, time, inside)[used], lambda: (unguided(x, time),) * len(range(2)[used])
            )
            return outputs[0], outputs[-1]

        def call(x, t, network_time):
            time = jnp.broadcast_to(jnp.asarray(network_time, jnp.float32), x.shape[:1])
            output, strong = both(x, t, time)
            if skipped is None:
                return output
            inside = jnp.asarray((skip_times[0] <= t) & (t <= skip_times[1]))

            def without_layers():
                count = self._count(x.shape[-1])
                more = self.skip_scale * (strong - skipped(x, time, cond))[..., :count]
                return output.at[..., :count].add(jnp.where(expand(inside, more), more, 0))

            return jax.lax.cond(inside.any(), without_layers, lambda: output)

        return call

    def _count(self, channels: int) -> int:
        """Number of guided channels of data with `channels`."""
        if self.channels is not None and self.channels > channels:
            raise UserError(
                f"guidance.channels is {self.channels} and the data has {channels}; ask for at most {channels}, or None for all"
            )
        return self.channels or channels

    def extrapolate(
        self, strong: jax.Array, weak: jax.Array, inside: ArrayLike, channels: int, scale: jax.Array | float
    ) -> jax.Array:
        """strong [B, ..., C or more], its guided channels extrapolated from weak where `inside` (bool or bool[B]).

        scale: of `scale_at`, a scalar or [B].
        """
        count = self._count(channels)
        scale = scale if self.schedule == "constant" else expand(scale, strong)
        guided = weak[..., :count] + scale * (strong[..., :count] - weak[..., :count])
        guided = jnp.where(expand(inside, guided), guided, strong[..., :count])
        return jnp.concatenate([guided, strong[..., count:]], axis=-1)
