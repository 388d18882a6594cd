"""Self-conditioning: the network sees its own last estimate of x0, as the entry "estimate" of its condition.

Source: Chen et al. 2022 (Analog Bits), section 3.2; Gupta et al. 2023 (W.A.L.T), section 4.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dit_jax.diffusion.process import Denoise, Memory, Prediction

ESTIMATE = "estimate"  # entry of a condition, like x_t


def estimate_if(chosen: jax.Array, predict: Callable[[], jax.Array], x: jax.Array) -> jax.Array:
    """The estimate of x0 for a training step, without a gradient: `predict` of the network without an estimate, else zeros.

    Args:
        chosen: bool scalar; where it is False the network does not run.
        predict: returns x0 [B, ..., C].
        x: [B, ..., C], whose shape the estimate has.
    """
    return jax.lax.stop_gradient(jax.lax.cond(chosen, lambda: predict().astype(x.dtype), lambda: jnp.zeros_like(x)))


@dataclass(frozen=True)
class SelfConditioned:
    """A `Denoise` that hands the predicted x0 of each call to the next one; the first has zeros.

    Fields:
        denoise_with: binds the estimate [B, ..., C] of a call, and returns the denoiser of that call.
    """

    denoise_with: Callable[[jax.Array], Denoise]

    def init(self, x: jax.Array) -> Memory:
        estimate = jnp.zeros_like(x)
        return self.denoise_with(estimate).init(x), estimate

    def __call__(self, x_t: jax.Array, t: ArrayLike, memory: Any) -> tuple[Prediction, Memory]:
        inner, estimate = memory
        prediction, inner = self.denoise_with(estimate)(x_t, jnp.asarray(t), inner)
        return prediction, (inner, prediction.x0.astype(estimate.dtype))
