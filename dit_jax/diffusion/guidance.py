"""Label dropout and guidance: small functions around a network, which knows of neither.

B batch, C data channels.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dit_jax.errors import UserError


def drop_labels(key, labels, null_label: int, rate: float):
    """Replaces each label by the null label with probability `rate`.

    Args:
        labels: int32[B].

    Source: Ho & Salimans 2022, algorithm 1.
    """
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null_label, labels)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: uncond + scale (cond - uncond) on the data channels of the network's output.

    Fields:
        scale: 1 is off, and then the network runs once.
        channels: guide only the first so many data channels; None for all. DiT's released samples used 3 of 4.
        low, high: guide only where low <= t <= high (Kynkaanniemi et al. 2024); outside, the network runs once.

    Source: Ho & Salimans 2022, equation 6 (their w is scale - 1).
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

    def __call__(self, network, cond, null_cond):
        """Binds the conditions.

        Args:
            network: (x [B, ..., C], network time f32[B], cond) -> [B, ..., C or more].
            cond, null_cond: dicts of arrays [B, ...] with the same keys.

        Returns:
            (x, t scalar, network_time scalar) -> the guided output, shaped as the network's.
        """
        def plain(x, network_time):
            return network(x, jnp.full(x.shape[0], network_time, jnp.float32), cond)

        if not self.active:
            return lambda x, t, network_time: plain(x, network_time)

        # Pairs stand next to each other, not in two halves, so that a batch split over devices stays where it is.
        pairs = jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), cond, null_cond)

        def guided(x, network_time):
            both = network(jnp.repeat(x, 2, axis=0), jnp.full(2 * x.shape[0], network_time, jnp.float32), pairs)
            with_label, without = both[::2], both[1::2]
            guided_channels = x.shape[-1] if self.channels is None else self.channels
            mask = jnp.arange(both.shape[-1]) < guided_channels  # learned variances stay those of the condition
            return jnp.where(mask, without + self.scale * (with_label - without), with_label)

        if (self.low, self.high) == (0.0, 1.0):
            return lambda x, t, network_time: guided(x, network_time)
        return lambda x, t, network_time: jax.lax.cond(
            (self.low <= t) & (t <= self.high), guided, plain, x, network_time)
