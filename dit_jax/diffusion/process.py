"""The protocol of diffusion processes: how noise is added, the training loss, and the meaning of the network's output.

Time t is float32: t = 0 is data, t = 1 is noise, where sampling starts. Training may draw t above 1.
x_t = alpha(t) x0 + sigma(t) noise.
B batch; every array may have any rank after its batch axis ([B, H, W, C], [B, F, H, W, C], ...), channels last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Prediction(NamedTuple):
    """The network's prediction of x0 and noise for x_t.

    Fields:
        x0, noise: [B, ..., C], consistent: x_t = alpha x0 + sigma noise.
        variance_fraction: where the step's log variance lies between its two bounds, 0 = posterior variance (small),
            1 = beta (large); an array [B, ..., C] when learned (Nichol & Dhariwal 2021, equation 15), else a constant.
    """

    x0: jax.Array
    noise: jax.Array
    variance_fraction: jax.Array | float


Network = Callable[..., jax.Array]  # (network input, f32[B] network time, cond, control=None) -> [B, ..., output channels]
Memory = Any  # a pytree of arrays; () for a denoiser without state


class Denoise(Protocol):
    """What a sampler calls: the network with its parameters, condition and guidance bound.

    A denoiser may carry state from one call to the next (forecasts, self-conditioning). A sampler passes the memory that one
    call returns to the next call.
    """

    def init(self, x: jax.Array) -> Memory:
        """The memory before the first call, for samples like x [B, ...]."""

    def __call__(self, x_t: jax.Array, t: jax.Array, memory: Memory) -> tuple[Prediction, Memory]:
        """The prediction for x_t at t (a scalar or f32[B]), and the memory for the next call."""


@dataclass(frozen=True)
class Memoryless:
    """A `Denoise` without state, from a function (x_t, t) -> Prediction."""

    function: Callable[[Any, Any], Prediction]

    def init(self, x: jax.Array) -> Memory:
        return ()

    def __call__(self, x_t: jax.Array, t: jax.Array, memory: Memory) -> tuple[Prediction, Memory]:
        return self.function(x_t, t), memory


@dataclass(frozen=True)
class Watched:
    """A `Denoise` that also calls watch(number of the evaluation, t, predicted x0) at every evaluation."""

    denoise: Denoise
    watch: Callable[[jax.Array, ArrayLike, jax.Array], None]

    def init(self, x: jax.Array) -> Memory:
        return self.denoise.init(x), jnp.int32(0)

    def __call__(self, x_t: jax.Array, t: jax.Array, memory: Memory) -> tuple[Prediction, Memory]:
        memory, number = memory
        prediction, memory = self.denoise(x_t, t, memory)
        self.watch(number, t, prediction.x0)
        return prediction, (memory, number + 1)


class Process(Protocol):
    """A frozen dataclass; every method is pure and can be traced.

    Fields:
        min_time: the smallest t at which samplers run the network.
        continuous: whether the network is trained for all t from min_time to 1, not only for discrete timesteps. A continuous
            process has a method `coefficients` (as `Flow`).
    """

    @property
    def min_time(self) -> float: ...

    @property
    def continuous(self) -> bool: ...

    def output_channels(self, channels: int) -> int:
        """Number of channels that the network must return for data of `channels`."""

    def sample_time(self, key: jax.Array, batch: int) -> jax.Array:
        """f32[batch] training times."""

    def perturb(self, x0: jax.Array, noise: jax.Array, t: ArrayLike) -> jax.Array:
        """alpha(t) x0 + sigma(t) noise; t is f32[B]."""

    def network_input(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        """The network's input for x_t: x_t itself, or x_t scaled (Karras et al. 2022, EDM, equation 7)."""

    def loss(
        self, output: jax.Array, x0: jax.Array, noise: jax.Array, t: ArrayLike, weight: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss per example f32[B], and its named parts, also f32[B].

        weight: broadcasts to x0; it multiplies the error of each element before the mean over an example. A mask of zeros
            and ones leaves elements out; the mean is still over all elements. None weights all elements equally.
        """

    def predict(self, output: jax.Array, x_t: jax.Array, t: ArrayLike) -> Prediction:
        """Converts the network's output to a `Prediction`; t is f32[B] or a scalar."""

    def network_time(self, t: ArrayLike) -> jax.Array:
        """The network's time input for t."""

    def grid(self, num_steps: int, spacing: str = "even") -> np.ndarray:
        """float64[num_steps + 1] descending sampling times from noise to 0."""

    def start(self, noise: jax.Array, t: ArrayLike) -> jax.Array:
        """x_t of standard normal noise alone, from which sampling starts at the scalar t, the first time of a grid."""

    def alpha_sigma(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) in float64 at sampling times, from which a sampler derives its coefficients."""

    def time_of(self, ratio: np.ndarray) -> np.ndarray:
        """The float64 times at which sigma / alpha is `ratio`, or the nearest that the process has."""

    def ode(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scale, clock) in float64: the ODE of the process is d (x / scale) / d clock = slope."""

    def slope(self, prediction: Prediction, t: ArrayLike) -> jax.Array:
        """The right-hand side of the ODE, [B, ..., C]; t is f32[B] or a scalar."""


def expand(c: ArrayLike, x: jax.Array) -> jax.Array:
    """Reshapes c [B] (or a scalar) to the rank of x [B, ...], so that they broadcast."""
    c = jnp.asarray(c)
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim)) if c.ndim else c


def mean_over_example(x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean of weight * x over all but the first axis: [B, ...] -> f32[B].

    weight: broadcasts to x; None weights all elements equally.
    """
    x = x.astype(jnp.float32)
    x = x if weight is None else x * weight
    return x.reshape(x.shape[0], -1).mean(-1)


def noise_like(keys: jax.Array, shape: tuple[int, ...], step: ArrayLike | None = None) -> jax.Array:
    """Standard normal noise, one key per example: the noise of an example does not depend on its batch.

    Args:
        keys: [B] typed keys.
        shape: of one example, without B.
        step: if given, it is folded into each key, so that every sampler step has its own noise.

    Returns:
        f32[B, *shape].
    """
    if step is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
