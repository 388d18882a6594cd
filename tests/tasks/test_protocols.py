"""Toys of what the protocols allow: EDM's scaled inputs, masked losses, skip-layer guidance, self-conditioning."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dit_jax.codecs.pixels import Pixels
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance
from dit_jax.diffusion.process import Prediction, noise_like
from dit_jax.diffusion.samplers import DDIM, AdamsBashforth, DormandPrince, DPMSolverPlusPlus2M, Euler, EulerMaruyama, Heun, UniPC
from dit_jax.encoders.labels import Labels
from dit_jax.errors import UserError
from dit_jax.tasks.diffusion import DiffusionTask

SHAPE = (3, 4, 4, 2)
KEYS = jax.random.split(jax.random.key(3), SHAPE[0])


class Linear(nn.Module):
    """A network for inputs of any rank that says what it is; `record` is called with what it is fed."""

    out_channels: int
    record: Callable | None = None

    rules = ((r"linear/kernel", (None, None)), (r"linear/bias", ()))

    @nn.compact
    def __call__(self, x_t, t, cond, control=None):
        if self.record is not None:
            jax.debug.callback(self.record, x_t)
        return nn.Dense(self.out_channels, name="linear")(x_t)

    def check(self, latent_shape):
        pass

    def macs(self, latent_shape, cond_shapes):
        return int(np.prod(latent_shape)) * self.out_channels

    def num_tokens(self, latent_shape):
        return int(np.prod(latent_shape[:-1]))

    def describe(self):
        return "a linear layer"


class ScaledFlow(Flow):
    """A flow whose network sees half of x_t, as EDM's sees c_in x_t."""

    def network_input(self, x_t, t):
        return 0.5 * x_t


def task_of(network, process, num_classes=0, shape=SHAPE[1:]):
    labels = Labels(num_classes)
    return DiffusionTask(network, process, Pixels(shape[-1], 0.0, 1.0), labels, optax.sgd(0.1), shape, shape)


def test_network_input():
    """A network that is fed x_t where the process scales it, in training or in sampling."""
    seen = []
    task = task_of(Linear(2, seen.append), ScaledFlow())
    state = task.init(jax.random.key(0))
    seen.clear()
    x0, noise, t = jnp.ones(SHAPE), jnp.full(SHAPE, 3.0), jnp.full(SHAPE[0], 0.5)
    task.loss(state.params, {}, x0, noise, t, {})
    jax.effects_barrier()
    np.testing.assert_allclose(seen[0], 1.0)  # (0.5 x 1 + 0.5 x 3) / 2
    seen.clear()
    task.draw_latents(state.params, {}, KEYS, {}, Euler(2), Guidance())
    jax.effects_barrier()
    first = noise_like(jax.vmap(lambda key: jax.random.fold_in(key, _crc("noise")))(KEYS), SHAPE[1:])
    np.testing.assert_allclose(seen[0], 0.5 * first, rtol=1e-6)


def _crc(name):
    import zlib

    return zlib.crc32(name.encode())


@pytest.mark.parametrize("process", [Flow(), Gaussian(), Gaussian(variance="fixed_small", prediction="v", min_snr_gamma=5.0)])
def test_masked_loss(process):
    """A mask that weighs other elements, or leaves out a part of the loss (the variational bound)."""
    keys = jax.random.split(jax.random.key(0), 3)
    x0, noise = jax.random.normal(keys[0], SHAPE), jax.random.normal(keys[1], SHAPE)
    t = jnp.array([0.25, 0.5, 0.75])
    output = jax.random.normal(keys[2], (*SHAPE[:-1], process.output_channels(2)))
    whole, _ = process.loss(output, x0, noise, t)
    mask = jnp.zeros((1, 4, 4, 1)).at[:, :2].set(1.0)
    upper, parts = process.loss(output, x0, noise, t, mask)
    lower, _ = process.loss(output, x0, noise, t, 1 - mask)
    np.testing.assert_allclose(upper + lower, whole, rtol=2e-5)
    np.testing.assert_allclose(sum(parts.values()), upper, rtol=1e-6)
    other = output.at[:, 2:].add(7.0)  # changes what is masked
    np.testing.assert_allclose(process.loss(other, x0, noise, t, mask)[0], upper, rtol=1e-6)


@dataclass(frozen=True)
class SkipLayerGuidance(Guidance):
    """Leads away from the same network without one of its blocks."""

    skipped: int = 0
    depth: int = 2

    def __call__(self, network, cond, null_cond, weak=None):
        keep = jnp.arange(self.depth) != self.skipped
        return super().__call__(network, cond, null_cond, lambda x, t, cond: network(x, t, cond, {"keep": keep}))


@pytest.mark.slow
def test_skip_layer_guidance():
    """`keep` that leaves out another block, or all of them; guidance that cannot reach the network's control."""
    network = tiny.dit(num_classes=0, out_channels=2, depth=2)
    task = task_of(network, Flow(), shape=(8, 8, 2))
    params = tiny.random_params(jax.eval_shape(task.init, jax.random.key(0)).params)
    x, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 2)), jnp.array([0.3, 0.6])

    def shallow(kept):
        return {**params, "blocks": jax.tree.map(lambda p: p[kept : kept + 1], params["blocks"])}

    for skipped in (0, 1):
        keep = jnp.arange(2) != skipped
        one_block = network.clone(depth=1).apply({"params": shallow(1 - skipped)}, x, t, {})
        np.testing.assert_allclose(task.apply(params, x, t, {}, {"keep": keep}), one_block, rtol=2e-5, atol=2e-5)
    guided = SkipLayerGuidance(2.0)(lambda *args: task.apply(params, *args), {}, {})(x, 0.5, t)
    np.testing.assert_array_equal(task.apply(params, x, t, {}, {}), task.apply(params, x, t, {}))
    strong, weak = task.apply(params, x, t, {}), task.apply(params, x, t, {}, {"keep": jnp.array([False, True])})
    np.testing.assert_allclose(guided, weak + 2.0 * (strong - weak), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cond, control", [({"lable": jnp.zeros(2, jnp.int32)}, None), ({}, {"drop": jnp.ones(2)})])
def test_unknown_entries(cond, control):
    """A condition or a control with a slip of the pen, silently ignored."""
    network, x = tiny.dit(num_classes=0), jnp.zeros((2, 8, 8, 1))
    with pytest.raises(UserError, match=r"has no (cond|control) entry '(lable|drop)'"):
        jax.eval_shape(lambda: network.init(jax.random.key(0), x, jnp.zeros(2), cond, control))


def test_keep_of_another_depth():
    """A `keep` for another network, of which `scan` would speak in terms of its own."""
    network, x = tiny.dit(num_classes=0, depth=2), jnp.zeros((2, 8, 8, 1))
    with pytest.raises(UserError, match=r"keep has shape \(3,\); it must be \(2,\)"):
        jax.eval_shape(lambda: network.init(jax.random.key(0), x, jnp.zeros(2), {}, {"keep": jnp.ones(3, bool)}))


@dataclass(frozen=True)
class SelfConditioned:
    """A denoiser that remembers its last x0 (Chen et al. 2022, Analog Bits) and counts its calls."""

    process: Any

    def init(self, x):
        return jnp.zeros_like(x), jnp.zeros((), jnp.int32)

    def __call__(self, x_t, t, memory):
        before, calls = memory
        prediction = self.process.predict(0.3 * x_t + 0.2 * before, x_t, t)
        return prediction, (prediction.x0, calls + 1)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(4), Euler(4), Heun(4), AdamsBashforth(4), DPMSolverPlusPlus2M(4), UniPC(4), EulerMaruyama(4), DormandPrince()],
)
def test_memory(sampler):
    """A sampler that drops the memory between its steps or between the evaluations of one step."""
    process, calls = Flow(), []

    @dataclass(frozen=True)
    class Recorded(SelfConditioned):
        def __call__(self, x_t, t, memory):
            jax.debug.callback(lambda n, x: calls.append((int(n), float(np.abs(x).sum()))), memory[1], memory[0], ordered=True)
            return super().__call__(x_t, t, memory)

    noise = jax.random.normal(jax.random.key(0), SHAPE)
    jax.block_until_ready(sampler(process, Recorded(process), noise, KEYS))
    jax.effects_barrier()
    assert [n for n, _ in calls] == list(range(len(calls)))
    assert len(calls) == (sampler.evaluations(process) or len(calls)) >= 4
    assert calls[0][1] == 0 and all(size > 0 for _, size in calls[1:])


def test_self_conditioning_steps():
    """What a remembered x0 changes, against the same steps by hand."""
    process = Flow()
    noise = jax.random.normal(jax.random.key(0), SHAPE)
    found = Euler(3)(process, SelfConditioned(process), noise, KEYS)
    x, before = noise, jnp.zeros_like(noise)
    for t, t_next in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        velocity = 0.3 * x + 0.2 * before
        before = process.predict(velocity, x, jnp.float32(t)).x0
        x = x + (t - t_next) * velocity
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6)


def test_rank_5():
    """A task that trains and draws images only: clips [B, F, H, W, C] take the same way."""
    shape = (3, 4, 4, 2)
    task = task_of(Linear(2), Flow(), shape=shape)
    state = task.init(jax.random.key(0))
    batch = {"image": jnp.zeros((2, *shape), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    state, sums = jax.jit(task.step)(state, {"codec": {}}, batch, jax.random.key(1))
    assert int(state.step) == 1 and float(sums["skipped"][0]) == 0
    latents = task.draw_latents(state.params, {}, KEYS[:2], {}, Euler(2), Guidance())
    assert latents.shape == (2, *shape)
    assert task.decode({"codec": {}}, latents).shape == (2, *shape)


def test_guidance_needs_a_trained_null_condition():
    """Guidance by a null label that was never trained."""
    network = tiny.dit(out_channels=2)
    task = task_of(network, Flow(), num_classes=10, shape=(8, 8, 2))
    assert task.has_null_condition
    assert not dataclasses.replace(task, cond_dropout=0.0).has_null_condition
    assert not task_of(tiny.dit(num_classes=0, out_channels=2), Flow(), shape=(8, 8, 2)).has_null_condition
    assert isinstance(Flow().predict(jnp.zeros(SHAPE), jnp.zeros(SHAPE), 0.5), Prediction)
