"""The discrete Gaussian process of DDPM, as in DiT.

T timesteps; index i = 0..T is t = i / T, with alpha_bar[0] = 1 (data). The paper's timestep i - 1 is our index i.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dit_jax.diffusion.process import Prediction, expand, mean_over_example
from dit_jax.errors import UserError

SCHEDULES = ("linear", "cosine", "scaled_linear")
PREDICTIONS = ("noise", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def betas(schedule: str, num_timesteps: int, start: float | None = None, end: float | None = None) -> np.ndarray:
    """float64[T] variances of the forward steps, from `start` to `end`; None is the schedule's own.

    linear: 1e-4 to 2e-2 at T = 1000, scaled by 1000 / T otherwise (Ho et al. 2020).
    cosine: from alpha_bar = cos^2((i/T + 0.008) / 1.008 * pi / 2), capped at 0.999 (Nichol & Dhariwal 2021, equation 17).
    scaled_linear: linear in the square root, 8.5e-4 to 1.2e-2 (Rombach et al. 2022, Stable Diffusion; class-conditional LDM has
        1.5e-3 to 1.95e-2).
    """
    if schedule == "linear":
        scale = 1000 / num_timesteps
        start, end = (own if given is None else given for own, given in ((scale * 1e-4, start), (scale * 2e-2, end)))
        return np.linspace(start, end, num_timesteps, dtype=np.float64)
    if schedule == "scaled_linear":
        start, end = (own if given is None else given for own, given in ((8.5e-4, start), (1.2e-2, end)))
        return np.linspace(start**0.5, end**0.5, num_timesteps, dtype=np.float64) ** 2
    edges = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def with_zero_terminal_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """float64[T] alpha_bar whose root is shifted and scaled, so that its last entry is 0 and its first stays.

    Source: Lin et al. 2023 (arXiv 2305.08891), algorithm 1.
    """
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def even_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` of 0..T-1, evenly spaced, both ends included (the respacing of Nichol & Dhariwal 2021, section 4).

    The stride is accumulated, not multiplied, as in the paper's code: its rounding errors decide how halves are rounded.
    """
    stride = (num_timesteps - 1) / max(num_steps - 1, 1)
    kept, at = [], 0.0
    for _ in range(num_steps):
        kept.append(round(at))
        at += stride
    return kept


def normal_kl(
    mean_1: jax.Array | float, log_variance_1: jax.Array | float, mean_2: jax.Array | float, log_variance_2: jax.Array | float
) -> jax.Array:
    """KL(N(mean_1, e^log_variance_1) || N(mean_2, e^log_variance_2)) in nats, elementwise."""
    return 0.5 * (
        log_variance_2
        - log_variance_1
        - 1
        + jnp.exp(log_variance_1 - log_variance_2)
        + jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2)
    )


def discretized_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log-probability in nats of x in bins of width 2/255 under N(mean, e^log_scale); the first and last bin extend to infinity.

    Uses the tanh approximation of the normal cdf, as the paper's code does.
    Source: Ho et al. 2020, equation 13.
    """

    def cdf(z):
        u = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
        # XLA's float32 tanh is off by up to 4 units in the last place, which 1 + tanh magnifies in the tails.
        far = jnp.sign(u) * (1 - 2 * jax.nn.sigmoid(-2 * jnp.abs(u)))
        return 0.5 * (1 + jnp.where(jnp.abs(u) > 0.3, far, jnp.tanh(u)))

    inverse = jnp.exp(-log_scale)
    upper, lower = cdf((x - mean + 1 / 255) * inverse), cdf((x - mean - 1 / 255) * inverse)
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


@dataclass(frozen=True)
class Gaussian:
    """DDPM with T discrete steps (Ho et al. 2020), learned-range variance (Nichol & Dhariwal 2021).

    Fields:
        schedule: of the noise: one of SCHEDULES.
        num_timesteps: T; samplers take at most so many steps.
        prediction: what the first C output channels are: "noise", "x0", or "v" = alpha noise - sigma x0
            (Salimans & Ho 2022).
        variance: of the reverse steps: the posterior variance ("fixed_small"), beta ("fixed_large"), or a fraction between
            their logarithms that the network returns in C more channels ("learned_range", trained by the variational
            bound with the mean frozen).
        min_snr_gamma: weights the squared error by min(SNR, gamma) in x0 terms (Hang et al. 2023); None for weight 1.
        beta_start, beta_end: the first and last beta of "linear" and "scaled_linear"; None is the schedule's own (`betas`).
        zero_terminal_snr: rescale the schedule so that nothing of the data is left at the last timestep, where samplers start.
            It needs prediction "v" or "x0", and a sampler such as ddim, ddpm or dpmpp (`with_zero_terminal_snr`).
    """

    schedule: str = "linear"
    num_timesteps: int = 1000
    prediction: str = "noise"
    variance: str = "learned_range"
    min_snr_gamma: float | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self):
        for name, allowed in (("schedule", SCHEDULES), ("prediction", PREDICTIONS), ("variance", VARIANCES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"process.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.num_timesteps < 2:
            raise UserError(f"process.num_timesteps is {self.num_timesteps}; it must be at least 2")
        self._check_betas()
        if self.zero_terminal_snr and self.prediction == "noise":
            raise UserError(
                "process.zero_terminal_snr is True and process.prediction is 'noise', from which the data cannot be predicted "
                "where nothing of it is left; set process.prediction to 'v' or 'x0'"
            )
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise UserError(f"process.min_snr_gamma is {self.min_snr_gamma}; it must be positive, or None for no weighting")

    def _check_betas(self) -> None:
        given = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        for name, beta in given.items():
            if beta is not None and self.schedule == "cosine":
                raise UserError(
                    f"process.{name} is {beta}, and schedule 'cosine' has none; leave it out, or choose scaled_linear"
                )
            if beta is not None and not 0 < beta < 1:
                raise UserError(f"process.{name} is {beta}; it must lie between 0 and 1")
        if self.schedule == "linear" and self.beta_end is None and self.num_timesteps <= 20:
            raise UserError(
                f"process.num_timesteps is {self.num_timesteps}; linear betas end at 20 / T, which "
                "is below 1 only for T > 20; take more timesteps, or set process.schedule to cosine"
            )
        if self.schedule != "cosine":
            start, *_, end = betas(self.schedule, self.num_timesteps, self.beta_start, self.beta_end)
            if start > end:
                raise UserError(f"the betas fall from {start:g} to {end:g}; process.beta_start must be at most process.beta_end")

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        """float64[T + 1] products of (1 - beta), rescaled with `zero_terminal_snr`; alpha_bar[0] = 1."""
        products = np.cumprod(1 - betas(self.schedule, self.num_timesteps, self.beta_start, self.beta_end))
        return np.concatenate([[1.0], with_zero_terminal_snr(products) if self.zero_terminal_snr else products])

    @property
    def learned(self) -> bool:
        return self.variance == "learned_range"

    @property
    def min_time(self) -> float:
        return 1 / self.num_timesteps

    @property
    def continuous(self) -> bool:
        return False

    def output_channels(self, channels: int) -> int:
        return 2 * channels if self.learned else channels

    def index(self, t: ArrayLike) -> jax.Array:
        """t -> int32 index 0..T of the nearest timestep."""
        return jnp.round(jnp.asarray(t) * self.num_timesteps).astype(jnp.int32)

    def alpha(self, t: ArrayLike) -> jax.Array:
        return jnp.asarray(np.sqrt(self.alpha_bar), jnp.float32)[self.index(t)]

    def sigma(self, t: ArrayLike) -> jax.Array:
        return jnp.asarray(np.sqrt(1 - self.alpha_bar), jnp.float32)[self.index(t)]

    def sample_time(self, key: jax.Array, batch: int) -> jax.Array:
        return jax.random.randint(key, (batch,), 1, self.num_timesteps + 1).astype(jnp.float32) / self.num_timesteps

    def network_time(self, t: ArrayLike) -> jax.Array:
        """The paper's timesteps, 0..T-1, as float32."""
        return (self.index(t) - 1).astype(jnp.float32)

    def perturb(self, x0: jax.Array, noise: jax.Array, t: ArrayLike) -> jax.Array:
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def predict(self, output: jax.Array, x_t: jax.Array, t: ArrayLike) -> Prediction:
        channels = x_t.shape[-1]
        mean, rest = output[..., :channels], output[..., channels:]
        alpha, sigma = expand(self.alpha(t), x_t), expand(self.sigma(t), x_t)
        if self.prediction == "noise":
            x0, noise = (x_t - sigma * mean) / alpha, mean
        elif self.prediction == "x0":
            x0, noise = mean, (x_t - alpha * mean) / sigma
        else:
            x0, noise = alpha * x_t - sigma * mean, sigma * x_t + alpha * mean
        fraction = (rest + 1) / 2 if self.learned else float(self.variance == "fixed_large")
        return Prediction(x0, noise, fraction)

    def network_input(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        return x_t

    def loss(
        self, output: jax.Array, x0: jax.Array, noise: jax.Array, t: ArrayLike, weight: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean squared error of the prediction, plus the variational bound with the mean frozen if the variance is learned.

        Returns:
            (f32[B], {"mse": f32[B], "vb": f32[B] in bits per dimension}); "vb" only for learned variance.

        Source: Nichol & Dhariwal 2021, equations 14 to 16, with the two terms weighted 1 : 1 as in DiT (mse and vb are means
        over dimensions).
        """
        channels = x0.shape[-1]
        alpha, sigma = expand(self.alpha(t), x0), expand(self.sigma(t), x0)
        target = {"noise": noise, "x0": x0, "v": alpha * noise - sigma * x0}[self.prediction]
        mean = output[..., :channels]
        mse = mean_over_example(jnp.square(target - mean), weight)
        if self.min_snr_gamma is not None:
            mse = mse * self.min_snr_weight(t)
        if not self.learned:
            return mse, {"mse": mse}
        frozen = jnp.concatenate([jax.lax.stop_gradient(mean), output[..., channels:]], axis=-1)
        vb = self.bound(frozen, x0, self.perturb(x0, noise, t), t, weight)
        return mse + vb, {"mse": mse, "vb": vb}

    def min_snr_weight(self, t: ArrayLike) -> jax.Array:
        """f32 weight of the squared error: min(SNR, gamma) divided by the weight that the prediction type implies.

        Source: Hang et al. 2023, equation 6 and section 3.4.
        """
        snr = jnp.square(self.alpha(t) / self.sigma(t))
        implied: dict[str, jax.Array | float] = {"noise": snr, "x0": 1.0, "v": snr + 1}
        return jnp.minimum(snr, jnp.float32(self.min_snr_gamma)) / implied[self.prediction]

    @cached_property
    def posterior_tables(self) -> dict[str, np.ndarray]:
        """float64[T + 1] coefficients of q(x_{i-1} | x_i, x0) by index i (Ho et al. 2020, equation 7); entry 0 is unused.

        The posterior variance at i = 1 is zero; its logarithm is replaced by that of i = 2, as in the paper's code.
        """
        previous, now = self.alpha_bar[:-1], self.alpha_bar[1:]
        beta = 1 - now / previous
        variance = beta * (1 - previous) / (1 - now)
        tables = {
            "x0": np.sqrt(previous) * beta / (1 - now),
            "x_t": np.sqrt(now / previous) * (1 - previous) / (1 - now),
            "log_small": np.log(np.concatenate([variance[1:2], variance[1:]])),
            "log_large": np.log(beta),
        }
        return {name: np.concatenate([[0.0], table]) for name, table in tables.items()}

    def bound(self, output: jax.Array, x0: jax.Array, x_t: jax.Array, t: ArrayLike, weight: jax.Array | None = None) -> jax.Array:
        """One term of the variational bound, f32[B] in bits per dimension: KL to the posterior, or the decoder's NLL at i = 1.

        Source: Ho et al. 2020, equation 5; the decoder is equation 13.
        """
        c = {name: expand(jnp.asarray(table, jnp.float32)[self.index(t)], x0) for name, table in self.posterior_tables.items()}
        prediction = self.predict(output, x_t, t)
        fraction = prediction.variance_fraction
        log_variance = fraction * c["log_large"] + (1 - fraction) * c["log_small"]
        if self.variance == "fixed_large":  # as in Ho et al.'s code, the first step keeps the small variance
            log_variance = jnp.where(expand(self.index(t), x0) == 1, c["log_small"], log_variance)
        mean = c["x0"] * prediction.x0 + c["x_t"] * x_t
        kl = normal_kl(c["x0"] * x0 + c["x_t"] * x_t, c["log_small"], mean, log_variance)
        log_scale = jnp.broadcast_to(0.5 * log_variance, x0.shape)
        nll = -discretized_log_likelihood(x0, mean, log_scale)
        return mean_over_example(jnp.where(expand(self.index(t), x0) == 1, nll, kl), weight) / math.log(2)

    def prior_bound(self, x0: jax.Array) -> jax.Array:
        """KL(q(x_T | x0) || N(0, 1)), f32[B] in bits per dimension: the term of the bound that does not depend on the network."""
        alpha_bar = self.alpha_bar[-1]
        kl = normal_kl(math.sqrt(alpha_bar) * x0, math.log(1 - alpha_bar), 0.0, 0.0)
        return mean_over_example(kl) / math.log(2)

    def grid(self, num_steps: int, spacing: str = "even") -> np.ndarray:
        """Descending times of `num_steps` of the T timesteps, then 0.

        spacing: "even" spaces them evenly with both ends, as the paper does; "stride" takes every k-th from the first on with an
            integer k, as DDIM does (Song et al. 2021), and exists only for some numbers of steps.

        Raises:
            UserError: more steps than T, or no stride gives that number of steps.
        """
        T = self.num_timesteps
        if not 1 <= num_steps <= T:
            raise UserError(f"the number of sampling steps is {num_steps}; it must lie in 1 to {T} (process.num_timesteps)")
        if spacing == "even":
            kept = even_timesteps(T, num_steps)
        else:
            stride = next((k for k in range(1, T + 1) if len(range(0, T, k)) == num_steps), None)
            if stride is None:
                raise UserError(
                    f"no integer stride over {T} timesteps gives {num_steps} steps; choose another number, or spacing 'even'"
                )
            kept = list(range(0, T, stride))
        if self.zero_terminal_snr and kept[-1] != T - 1:
            raise UserError(
                f"process.zero_terminal_snr is True, and {num_steps} steps with spacing {spacing!r} leave out the last timestep, "
                "where samples start from noise alone; choose spacing 'even' and at least 2 steps"
            )
        return np.array([*((i + 1) / T for i in reversed(kept)), 0.0])

    def start(self, noise: jax.Array, t: ArrayLike) -> jax.Array:
        return noise

    def time_of(self, ratio: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            known = np.sqrt(1 / self.alpha_bar - 1)  # infinite at a terminal SNR of zero
        above = np.clip(np.searchsorted(known, ratio), 1, self.num_timesteps)
        below = above - 1
        return np.where(ratio - known[below] < known[above] - ratio, below, above) / self.num_timesteps

    def alpha_sigma(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma), float64, at times on the grid."""
        alpha_bar = self.alpha_bar[np.rint(np.asarray(times) * self.num_timesteps).astype(int)]
        return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)

    def ode(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """d (x / alpha) / d (sigma / alpha) = noise (Song et al. 2021, DDIM, equation 14)."""
        alpha, sigma = self.alpha_sigma(times)
        if (alpha == 0).any():
            raise UserError(
                "process.zero_terminal_snr is True, and the sampler integrates over sigma / alpha, which is infinite at the last "
                "timestep; choose ddim, ddpm, dpmpp or unipc"
            )
        return alpha, sigma / alpha

    def slope(self, prediction: Prediction, t: ArrayLike) -> jax.Array:
        return prediction.noise
