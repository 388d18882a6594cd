"""Few-step samplers and schedules against diffusers, whose schedulers are fed the same tiny network on the same times."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import samplers
from dit_jax.diffusion.flow import Flow, shifted
from dit_jax.diffusion.gaussian import Gaussian, betas
from dit_jax.diffusion.process import Memoryless

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

START = np.random.default_rng(0).normal(size=(2, 4, 4, 2)).astype(np.float32)
MIX = np.array([[0.9, -0.4], [0.3, 0.8]], np.float32)
NUM_STEPS = 8


def network(x, t, xp):
    """A smooth function of x and of t in 0..1, for arrays of either library."""
    return xp.tanh(x @ (MIX if xp is jnp else torch.from_numpy(MIX)) + t) + 0.3 * xp.sin(3 * x)


class OnGrid:
    """A process whose sampling grid is given: diffusers' grids start or end elsewhere."""

    def __init__(self, process, times):
        self.process, self.times = process, np.asarray(times, np.float64)

    def __getattr__(self, name):
        return getattr(self.process, name)

    def grid(self, num_steps, spacing="even"):
        return self.times


def ours(process, sampler):
    sign = -1 if process.continuous else 1  # our velocity points to the data, diffusers' to the noise

    def denoise(x, t):
        return process.predict(sign * network(x, t, jnp), x, t)

    return jax.jit(lambda x: sampler(process, Memoryless(denoise), x, None))(START)


def theirs(scheduler, times):
    x = torch.from_numpy(START)
    for timestep, t in zip(scheduler.timesteps, times, strict=True):
        x = scheduler.step(network(x, float(t), torch), timestep, x, return_dict=False)[0]
    return x.numpy()


GAUSSIAN = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "epsilon"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "name, sampler, fields",
    [
        ("DPMSolverMultistepScheduler", samplers.DPMSolverPlusPlus2M(NUM_STEPS), {}),
        ("UniPCMultistepScheduler", samplers.UniPC(NUM_STEPS), {}),
        (
            "DDIMScheduler",
            samplers.DDIM(NUM_STEPS),
            {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"},
        ),
    ],
)
def test_gaussian(name, sampler, fields):
    """A coefficient, order or last step that differs from diffusers'."""
    scheduler = getattr(diffusers, name)(**GAUSSIAN, **fields)
    scheduler.set_timesteps(NUM_STEPS)
    times = (scheduler.timesteps.numpy() + 1) / 1000
    process = OnGrid(Gaussian(variance="fixed_small"), [*times, 0.0])
    np.testing.assert_allclose(ours(process, sampler), theirs(scheduler, times), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("DPMSolverMultistepScheduler", samplers.DPMSolverPlusPlus2M(NUM_STEPS)),
        ("UniPCMultistepScheduler", samplers.UniPC(NUM_STEPS)),
        ("FlowMatchEulerDiscreteScheduler", samplers.Euler(NUM_STEPS)),
    ],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow(name, sampler, shift):
    """The same for a flow, from t = 0.999 on, and a resolution shift that goes the other way."""
    grid = shifted(np.linspace(0.999, 0, NUM_STEPS + 1), shift)
    if name.startswith("FlowMatch"):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        scheduler = getattr(diffusers, name)(**FLOW, flow_shift=shift)
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, NUM_STEPS + 1)[:-1])
    else:  # its own grid is the same
        scheduler.set_timesteps(NUM_STEPS)
    np.testing.assert_allclose(scheduler.sigmas, grid, atol=1e-6)
    np.testing.assert_allclose(ours(OnGrid(Flow(), grid), sampler), theirs(scheduler, grid[:-1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [4, 28])
def test_grid_of_sd3(num_steps, shift):
    """Catches a grid other than the one of diffusers' SD3 pipeline, and a time of the network that differs from its timesteps."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    process = Flow(shift=shift, convention="sd3", sampling_grid="sd3")
    np.testing.assert_allclose(process.grid(num_steps), scheduler.sigmas, atol=1e-6)
    np.testing.assert_allclose(process.network_time(process.grid(num_steps)[:-1]), scheduler.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    "ours, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("scaled_linear", "scaled_linear")]
)
def test_betas(ours, theirs):
    """A noise schedule that is not the one of its name."""
    fields = {"beta_start": 8.5e-4, "beta_end": 1.2e-2} if ours == "scaled_linear" else {}
    np.testing.assert_allclose(betas(ours, 1000), diffusers.DDPMScheduler(1000, beta_schedule=theirs, **fields).betas, rtol=2e-6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_betas_with_ends(schedule):
    """Catches ends that are ignored, scaled by T, or squared: latent diffusion's class-conditional model has other ones."""
    process = Gaussian(schedule, 500, beta_start=1.5e-3, beta_end=1.95e-2)
    scheduler = diffusers.DDPMScheduler(500, 1.5e-3, 1.95e-2, schedule)
    np.testing.assert_allclose(process.alpha_bar[1:], scheduler.alphas_cumprod, rtol=1e-4)


def test_v_prediction():
    """A v of another sign, or read without its weights."""
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    process = Gaussian(variance="fixed_small", prediction="v")
    noise, x0 = START, START[::-1].copy()
    for timestep in (0, 500, 999):
        t = jnp.float32((timestep + 1) / 1000)
        x_t = process.perturb(x0, noise, t)
        velocity = scheduler.get_velocity(torch.from_numpy(x0), torch.from_numpy(noise), torch.tensor([timestep] * 2)).numpy()
        prediction = process.predict(velocity, x_t, t)
        np.testing.assert_allclose(prediction.x0, x0, atol=1e-5)
        np.testing.assert_allclose(prediction.noise, noise, atol=1e-5)
        assert float(process.loss(velocity, x0, noise, t)[0].max()) < 1e-10
