"""Condition dropout and guidance: small functions around a network, which knows of neither.

B batch, C data channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dit_jax.diffusion.process import Network, expand
from dit_jax.errors import UserError


def replace_condition(dropped: jax.Array, cond: Any, null_cond: Any) -> Any:
    """The null condition for each example where `dropped`, bool[B]; the whole condition of an example is dropped or none of it.

    Args:
        cond, null_cond: pytrees of arrays [B, ...] with the same keys and shapes.

    Source: Ho & Salimans 2022, algorithm 1.
    """
    return jax.tree.map(lambda x, null: jnp.where(expand(dropped, x), null, x), cond, null_cond)


def run_pairs(network: Network, x: jax.Array, time: jax.Array, cond: Any, null_cond: Any) -> tuple[jax.Array, jax.Array]:
    """(network's output with cond, with null_cond) in one call on 2B examples."""
    # Pairs stand next to each other, not in two halves, so that a batch split over devices stays where it is.
    pairs = jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), cond, null_cond)
    both = network(jnp.repeat(x, 2, axis=0), jnp.repeat(time, 2), pairs)
    return both[::2], both[1::2]


@dataclass(frozen=True)
class Guidance:
    """Leads the network's output away from a weaker one: weak + scale (strong - weak) on the data channels.

    The weaker output is the same network's without condition (classifier-free guidance), or that of a second network with the
    same condition (autoguidance). Learned variances stay those of the strong output.

    Fields:
        scale: 1 is off, and then the network runs once.
        channels: guide only the first so many data channels; None for all. DiT's released samples used 3 of 4.
        low, high: guide only where low <= t <= high (Kynkaanniemi et al. 2024); where no example is inside, the network runs
            once.

    Source: Ho & Salimans 2022, equation 6 (their w is scale - 1); Karras et al. 2024 (autoguidance).
    """

    scale: float = 1.0
    channels: int | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(f"guidance interval [{self.low}, {self.high}]: 0 <= low <= high <= 1 is needed")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"guidance channels {self.channels}: at least 1 is needed, or None for all")

    @property
    def active(self) -> bool:
        return self.scale != 1.0

    @property
    def is_partial(self) -> bool:
        """Whether some times are not guided."""
        return (self.low, self.high) != (0.0, 1.0)

    def __call__(self, network: Network, cond: Any, null_cond: Any, weak: Network | None = None) -> Callable:
        """Binds the conditions.

        Args:
            network: (x [B, ..., C], network time f32[B], cond) -> [B, ..., C or more].
            cond, null_cond: dicts of arrays [B, ...] with the same keys.
            weak: a second network, for autoguidance; null_cond is then not used.

        Returns:
            (x, t, network_time; both scalars or f32[B]) -> the guided output, shaped as the network's.
        """

        def unguided(x, time):
            return network(x, time, cond)

        def guided(x, time, inside):
            strong, lesser = (unguided(x, time), weak(x, time, cond)) if weak else run_pairs(network, x, time, cond, null_cond)
            return self.lead(strong, lesser, inside, x.shape[-1])

        def call(x, t, network_time):
            time = jnp.broadcast_to(jnp.asarray(network_time, jnp.float32), x.shape[:1])
            if not self.active:
                return unguided(x, time)
            if not self.is_partial:
                return guided(x, time, True)
            inside = jnp.asarray((self.low <= t) & (t <= self.high))
            return jax.lax.cond(inside.any(), lambda: guided(x, time, inside), lambda: unguided(x, time))

        return call

    def lead(self, strong: jax.Array, weak: jax.Array, inside: ArrayLike, channels: int) -> jax.Array:
        """strong [B, ..., C or more] with its first channels led away from weak's where `inside` (bool or bool[B])."""
        if self.channels is not None and self.channels > channels:
            raise UserError(
                f"guidance.channels is {self.channels} and the data has {channels}; ask for at most {channels}, or None for all"
            )
        count = self.channels or channels
        led = weak[..., :count] + self.scale * (strong[..., :count] - weak[..., :count])
        led = jnp.where(expand(inside, led), led, strong[..., :count])
        return jnp.concatenate([led, strong[..., count:]], axis=-1)
