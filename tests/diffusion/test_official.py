"""Side by side with the official DiT and SiT code on recorded inputs and noise: see golden/make_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN as GOLDEN_FOLDER

from dit_jax.diffusion import likelihood, samplers
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance
from dit_jax.diffusion.process import Memoryless
from dit_jax.diffusion.samplers import ancestral, sde

GOLDEN = dict(np.load(GOLDEN_FOLDER / "diffusion.npz"))
IN = {name.removeprefix("in/"): jnp.asarray(a) for name, a in GOLDEN.items() if name.startswith("in/")}
COND, NULL = {"label": IN["label"]}, {"label": jnp.full_like(IN["label"], 10)}
KEYS = jax.random.split(jax.random.key(0), 2)
LOSS, TRAJECTORY = 1e-5, 1e-4


def network(time_scale, out_channels):
    """The network of make_golden.py."""

    def call(x, t, cond):
        bias = (t / time_scale)[:, None] * IN["w_time"] + IN["w_label"][cond["label"]]
        return (jnp.tanh(x @ IN["w_in"] + bias[:, None, None]) @ IN["w_out"])[..., :out_channels]

    return call


def draw(process, sampler, guidance=None):
    scale = 1 if isinstance(process, Flow) else 1000
    guided = (guidance or Guidance())(network(scale, process.output_channels(4)), COND, NULL)

    def denoise(x, t):
        return process.predict(guided(x, t, process.network_time(t)), x, t)

    denoise = Memoryless(denoise)
    return denoise, jax.jit(lambda x: sampler(process, denoise, x, KEYS))(IN["start"])


def close(ours, name, tolerance):
    np.testing.assert_allclose(ours, GOLDEN[name], rtol=tolerance, atol=tolerance)


def repeated(count):
    """(x0, noise, condition) with the recorded pair of examples `count` times."""
    return (
        jnp.tile(IN["x0"], (count, 1, 1, 1)),
        jnp.tile(IN["noise"][0], (count, 1, 1, 1)),
        {"label": jnp.tile(IN["label"], count)},
    )


@pytest.fixture(autouse=True)
def recorded_noise(monkeypatch):
    for module in (ancestral, sde):
        monkeypatch.setattr(module, "noise_like", lambda keys, shape, step: IN["noise"][step])


LEARNED, LARGE, SMALL = ({"variance": v} for v in ("learned_range", "fixed_large", "fixed_small"))
DIT_LOSSES = {
    "noise_learned": LEARNED,
    "cosine_learned": LEARNED | {"schedule": "cosine"},
    "x0_learned": LEARNED | {"prediction": "x0"},
    "noise_large": LARGE,
    "x0_small": SMALL | {"prediction": "x0"},
}


@pytest.mark.parametrize("name", DIT_LOSSES)
def test_dit_losses(name):
    """A loss term, weight, schedule or decoder that differs from DiT's, at the ends of time too."""
    process = Gaussian(**DIT_LOSSES[name])
    timesteps = (0, 1, 250, 999)
    (x0, noise, labels), t = repeated(4), jnp.repeat((jnp.array(timesteps) + 1) / 1000, 2)
    x_t = process.perturb(x0, noise, t)
    output = network(1000, process.output_channels(4))(x_t, process.network_time(t), labels)
    loss, parts = process.loss(output, x0, noise, t)
    bound = process.bound(output, x0, x_t, t)
    for i, timestep in enumerate(timesteps):
        for term, value in {"loss": loss, **parts}.items():
            close(value[2 * i : 2 * i + 2], f"dit/loss/{name}/{timestep}/{term}", LOSS)
        close(bound[2 * i : 2 * i + 2], f"dit/bound/{name}/{timestep}", LOSS)
    assert set(parts) == ({"mse", "vb"} if process.learned else {"mse"})


def test_dit_bits_per_dimension(monkeypatch):
    """A bound whose terms are in another order or unit, or that forgets the prior."""
    monkeypatch.setattr(likelihood, "noise_like", lambda keys, shape, index: IN["noise"][100 - index])
    process = Gaussian(num_timesteps=100)
    bound = jax.jit(lambda x0: likelihood.bits_per_dimension(process, lambda x, t: network(1000, 8)(x, t, COND), x0, KEYS))(
        IN["x0"]
    )
    for name, value in bound._asdict().items():
        close(value, f"dit/bpd/{name}", LOSS)


@pytest.mark.parametrize(
    "name, fields, sampler, guidance",
    [
        ("ddpm_250", LEARNED, samplers.Ancestral(250), None),
        ("ddpm_7", LEARNED, samplers.Ancestral(7), None),
        ("ddpm_large_20", LARGE, samplers.Ancestral(20), None),
        ("ddpm_small_20", SMALL, samplers.Ancestral(20), None),
        ("ddim_250", LEARNED, samplers.DDIM(250), None),
        ("ddim_250", LEARNED, samplers.Euler(250), None),
        ("ddim_stride_50", LEARNED, samplers.DDIM(50, 0.5, "stride"), None),
        ("ddim_eta_20", LEARNED, samplers.DDIM(20, 1.0), None),
        ("guided_3_250", LEARNED, samplers.Ancestral(250), Guidance(1.5, 3)),
        ("guided_all_250", LEARNED, samplers.Ancestral(250), Guidance(1.5)),
    ],
)
def test_dit_trajectories(name, fields, sampler, guidance):
    """A step, spacing, variance or guidance that differs from DiT's."""
    close(draw(Gaussian(**fields), sampler, guidance)[1], f"dit/{name}", TRAJECTORY)


def test_dit_inversion():
    """DDIM inversion on another grid, or with slopes taken where a step ends."""
    process = Gaussian()
    denoise, _ = draw(process, samplers.DDIM(1))
    close(samplers.ddim_invert(process, denoise, IN["x0"], 50), "dit/invert_50", TRAJECTORY)


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
def test_sit_losses(interpolant):
    """A velocity of another sign or interpolant, or time that runs the other way."""
    process, times = Flow(interpolant, spare_channels=True), (0.0, 0.01, 0.5, 1.0)
    (x0, noise, labels), t = repeated(4), 1 - jnp.repeat(jnp.array(times), 2)
    output = network(1, 8)(process.perturb(x0, noise, t), process.network_time(t), labels)
    loss, _ = process.loss(output, x0, noise, t)
    for i, time in enumerate(times):
        close(loss[2 * i : 2 * i + 2], f"sit/loss/{interpolant}/{time}", LOSS)


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
@pytest.mark.parametrize(
    "method, sampler, tolerance",
    [
        ("euler", samplers.Euler(250), TRAJECTORY),
        ("heun2", samplers.Heun(25), TRAJECTORY),
        ("dopri5", samplers.DormandPrince(1e-5, 1e-6), 5e-4),  # the error is held per example, not over the batch
    ],
)
def test_sit_ode(interpolant, method, sampler, tolerance):
    """An ODE grid or update that differs from SiT's (torchdiffeq's)."""
    close(draw(Flow(interpolant), sampler)[1], f"sit/{method}/{interpolant}", tolerance)


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
@pytest.mark.parametrize(
    "diffusion, last_step", [*((d, "mean") for d in sde.DIFFUSIONS), *(("sigma", last) for last in ("tweedie", "euler", "none"))]
)
def test_sit_sde(interpolant, diffusion, last_step):
    """A diffusion, a grid or a last step that differs from SiT's."""
    sampler = samplers.EulerMaruyama(
        250 if last_step == "mean" else 50, diffusion, 0.7 if diffusion == "decreasing" else 1.0, last_step
    )
    close(draw(Flow(interpolant), sampler)[1], f"sit/sde/{interpolant}/{diffusion}/{last_step}", TRAJECTORY)


@pytest.mark.parametrize("name, channels", [("guided_3", 3), ("guided_all", None)])
def test_sit_guidance(name, channels):
    """Guidance on other channels than SiT's, or on its ignored ones."""
    close(draw(Flow(spare_channels=True), samplers.Euler(50), Guidance(1.5, channels))[1], f"sit/{name}", TRAJECTORY)
