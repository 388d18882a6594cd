import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.gaussian import PREDICTIONS, Gaussian, betas, even_timesteps
from dit_jax.diffusion.samplers.ancestral import posterior_variance
from dit_jax.errors import UserError

X0, NOISE = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 1)).astype(np.float32)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear"])
def test_respacing_to_all_steps_is_the_process(schedule):
    """A respaced posterior that is not the process's own when every timestep is kept."""
    process = Gaussian(schedule)
    times = process.grid(1000)
    np.testing.assert_allclose(times, np.arange(1000, -1, -1) / 1000)
    _, beta, variance = posterior_variance(*process.alpha_sigma(times))
    tables = process.posterior_tables
    np.testing.assert_allclose(np.log(beta[::-1]), tables["log_large"][1:], rtol=1e-9)
    np.testing.assert_allclose(np.log(variance[-2::-1]), tables["log_small"][2:], rtol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 250, 999, 1000])
def test_even_spacing(num_steps):
    """A count that is not kept, repeats, or misses an end."""
    kept = even_timesteps(1000, num_steps)
    assert len(set(kept)) == num_steps and kept == sorted(kept)
    assert kept[0] == 0 and (num_steps == 1 or kept[-1] == 999)


def test_stride_spacing():
    """The paper's ddim50: every 20th timestep from 0."""
    np.testing.assert_allclose(Gaussian().grid(50, "stride"), [*((np.arange(0, 1000, 20)[::-1] + 1) / 1000), 0])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_prediction_cycle(prediction):
    """A target that the prediction does not read back, at both ends too."""
    process = Gaussian(prediction=prediction, variance="fixed_small")
    t = jnp.array([0.001, 0.3, 1.0])
    alpha, sigma = process.alpha(t)[:, None, None, None], process.sigma(t)[:, None, None, None]
    output = {"noise": NOISE, "x0": X0, "v": alpha * NOISE - sigma * X0}[prediction]
    assert process.loss(output, X0, NOISE, t)[0].max() < 1e-12
    read = process.predict(output, process.perturb(X0, NOISE, t), t)
    tolerance = {"noise": (1e-3, 0), "x0": (0, 1e-4), "v": (1e-5, 1e-5)}[prediction]  # one side divides by alpha or sigma
    np.testing.assert_allclose(read.x0, X0, atol=tolerance[0] + 1e-6)
    np.testing.assert_allclose(read.noise, NOISE, atol=tolerance[1] + 1e-6)


def test_min_snr_weighs_all_predictions_alike():
    """Min-SNR in the wrong units: the same error of x0 must cost min(SNR, gamma), whatever is predicted."""
    t = jnp.array([0.001, 0.3, 1.0])
    for prediction in PREDICTIONS:
        process = Gaussian(prediction=prediction, variance="fixed_small", min_snr_gamma=5.0)
        alpha, sigma = process.alpha(t)[:, None, None, None], process.sigma(t)[:, None, None, None]
        x0 = X0 + 0.1  # with x_t given, noise follows
        noise = NOISE - alpha / sigma * 0.1
        output = {"noise": noise, "x0": x0, "v": alpha * noise - sigma * x0}[prediction]
        snr = jnp.square(process.alpha(t) / process.sigma(t))
        np.testing.assert_allclose(process.loss(output, X0, NOISE, t)[0], 0.01 * jnp.minimum(snr, 5.0), rtol=2e-3)


def test_min_snr_leaves_the_bound():
    """A weight that also scales the learned variance's bound."""
    output = jax.random.normal(jax.random.key(0), (3, 2, 2, 2))
    t = jnp.array([0.001, 0.3, 1.0])
    plain, weighted = (Gaussian(min_snr_gamma=gamma).loss(output, X0, NOISE, t)[1] for gamma in (None, 5.0))
    np.testing.assert_array_equal(plain["vb"], weighted["vb"])
    assert (jnp.abs(plain["mse"] - weighted["mse"]) > 1e-3)[0]


def test_variance_gradient_only():
    """A bound that trains the mean: its gradient must be zero on the first half of the channels."""
    output, t = jax.random.normal(jax.random.key(0), (3, 2, 2, 2)), jnp.array([0.001, 0.3, 1.0])
    gradient = jax.jit(jax.grad(lambda output: Gaussian().loss(output, X0, NOISE, t)[1]["vb"].sum()))(output)
    assert (gradient[..., :1] == 0).all() and (gradient[..., 1:] != 0).all()


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"schedule": "sigmoid"}, "linear, cosine"),
        ({"prediction": "eps"}, "noise, x0, v"),
        ({"variance": "learned"}, "learned_range"),
        ({"num_timesteps": 1}, "at least 2"),
        ({"min_snr_gamma": 0.0}, "positive"),
        ({"schedule": "cosine", "beta_end": 0.02}, "beta_end is 0.02, and schedule 'cosine' has none"),
        ({"beta_start": 0.0}, "beta_start is 0.0; it must lie between 0 and 1"),
        ({"schedule": "scaled_linear", "beta_start": 0.02}, "fall from 0.02 to 0.012"),
    ],
)
def test_bad_fields(fields, text):
    """A field that trains something else."""
    with pytest.raises(UserError, match=text):
        Gaussian(**fields)


@pytest.mark.parametrize("num_steps, among", [(21, 499), (250, 999)])
def test_respacing_rounds_as_the_papers_code(num_steps, among):
    """A stride that is multiplied where the paper's code sums it up: at 278 of 1,000 counts a half is rounded the other way."""
    kept = even_timesteps(1000, num_steps)
    assert len(set(kept)) == num_steps and kept[0] == 0 and kept[-1] == 999
    assert among in kept


def test_linear_betas_need_timesteps():
    """Betas of 1 and more, whose square roots are NaN, accepted for few timesteps."""
    with pytest.raises(UserError, match="only for T > 20"):
        Gaussian(num_timesteps=20)
    assert betas("linear", 21).max() < 1
