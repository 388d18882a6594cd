import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dit_jax import build
from dit_jax.codecs.causal_vae import CausalVAE
from dit_jax.codecs.discriminator import PatchDiscriminator
from dit_jax.codecs.kl_vae import split_moments
from dit_jax.errors import UserError
from dit_jax.parallel.mesh import make_mesh, shard_batch
from dit_jax.pixels import to_float
from dit_jax.tasks import autoencoder
from dit_jax.tasks.autoencoder import AutoencoderTask
from dit_jax.tasks.compiled_step import compile_step
from dit_jax.tasks.state import abstract_state
from dit_jax.tasks.task import named_key

MESHES = [
    # tests/parallel/test_sharded_steps.py compares one mesh in CI.
    pytest.param(mesh, marks=pytest.mark.exhaustive)
    for mesh in ((2, 2, 2), (8, 1, 1), (1, 4, 2))
]
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
BATCH = {"image": IMAGES, "label": np.zeros(16, np.int32)}
# The discriminator plays from step 1 on. Compiling is nearly all of the time: the tests share their programs.
FIELDS = {"task__kl_weight": 0.1, "task__discriminator_start_step": 1}


@functools.cache
def task_of(**fields):
    return build.Run(tiny.autoencoder(**FIELDS | fields)).task


@functools.cache
def program(shape=(1, 1, 1), **fields):
    """state, on the host -> (state, sums) after the step that the training loop takes with seed 0, on a mesh of that shape."""
    task, mesh = task_of(**fields), make_mesh(*shape, jax.devices()[: math.prod(shape)])
    like, batch = abstract_state(task, mesh), shard_batch(mesh, BATCH)
    step, zeros, _ = compile_step(task, mesh, 0, like, {}, batch)

    def run(state):
        placed = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x, s.dtype), s.sharding), state, like)
        return jax.device_get(step(placed, zeros(), {}, batch))

    return run


@functools.cache
def gradients():
    return jax.jit(task_of().gradients)


def randomized(step=1, **fields):
    """A state whose weights are not those of an initialisation; without a discriminator, the codec's are the same."""
    like = jax.eval_shape(task_of(**fields).init, jax.random.key(0))
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), like.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    average = {"codec": jax.tree.map(lambda x: x + 0.01, params["codec"])}
    return zeros.replace(step=np.asarray(step, like.step.dtype), params=params, ema_params=average)


@pytest.mark.parametrize("shape", MESHES)
def test_one_device_is_every_mesh(shape):
    """A split of the convolutions under which XLA gives other numbers; a batch norm or mean taken per device."""
    state, sums = program()(randomized())
    sharded, sharded_sums = program(shape)(randomized())
    # Adam's moments are the gradient. Biases before a norm have none: what they hold is rounding.
    assert tiny.distance(sharded.opt_state, state.opt_state, floor=1e-4) < 1e-4
    assert tiny.distance(sharded.ema_params, state.ema_params) < 1e-5
    assert tiny.distance(sharded_sums, sums) < 1e-4


@pytest.mark.slow
def test_gradient_is_that_of_the_stated_loss():
    """A term that is dropped, doubled or divided by the wrong count on its way through the hand-made backward pass."""
    task, params = task_of(), randomized().params
    images, noise = to_float(IMAGES), jax.random.normal(jax.random.key(3), (16, 4, 4, 2))

    def terms(codec_params):
        mean, log_variance = split_moments(task.codec.encode(codec_params, images))
        decoded = task.codec.decode(codec_params, mean + jnp.exp(log_variance / 2) * noise)
        kl = (0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)).sum() / images.size
        fooled = -task.discriminator.apply({"params": params["discriminator"]}, decoded).mean()
        return jnp.stack([jnp.abs(images - decoded).mean(), kl, fooled])

    def last(gradient):
        return float(jnp.linalg.norm(gradient["decoder"]["conv_out"]["kernel"]))

    (found_l1, found_kl, _), each = jax.jit(lambda p: (terms(p), jax.jacrev(terms)(p)))(params["codec"])
    l1, kl, fooled = (jax.tree.map(lambda x, i=i: x[i], each) for i in range(3))
    weight = 0.5 * last(l1) / (last(fooled) + 1e-4)
    wanted = jax.tree.map(lambda a, b, c: a + 0.1 * b + weight * c, l1, kl, fooled)
    found, values = gradients()(params, {}, images, noise, True)
    assert tiny.distance(found["codec"], wanted, floor=1e-4) < 1e-4
    np.testing.assert_allclose(values["adversarial_weight"][0], weight, rtol=1e-4)
    np.testing.assert_allclose(values["loss"].mean(), found_l1 + 0.1 * found_kl, rtol=1e-5)


@pytest.mark.slow
def test_discriminator_waits_for_its_step():
    """A game that begins at once, where the autoencoder's first blurred images would win it for the discriminator."""
    state = randomized(step=0)
    first, sums = program()(state)
    assert tiny.distance(first.params["discriminator"], state.params["discriminator"]) == 0
    assert sums["adversarial_weight"][0] == 0
    second, sums = program()(first)
    assert tiny.distance(second.params["discriminator"], first.params["discriminator"]) > 0
    assert sums["adversarial_weight"][0] > 0


@pytest.mark.exhaustive
def test_before_the_discriminators_step_it_does_nothing():
    """A push of weight zero that still changes the autoencoder."""
    state, none = randomized(step=0), {"task__discriminator_weight": 0.0}
    first, _ = program()(state)
    expected, _ = program(**none)(randomized(step=0, **none).replace(params={"codec": state.params["codec"]}))
    assert tiny.distance(first.params["codec"], expected.params["codec"]) < 1e-5


@pytest.mark.slow
def test_microbatches_change_nothing():
    """Gradients that are summed instead of averaged, or other noise per part."""
    none = {"task__discriminator_weight": 0.0}
    (whole, sums), (parts, part_sums) = (program(**none, **more)(randomized(**none)) for more in ({}, {"microbatches": 4}))
    assert tiny.distance(parts.opt_state, whole.opt_state, floor=1e-4) < 1e-4
    assert tiny.distance(part_sums, sums) < 1e-5


@pytest.mark.slow
def test_skips_a_step_that_is_not_finite():
    """A NaN of the discriminator alone that reaches the moments, or the autoencoder through its push."""
    state = randomized()
    state.params["discriminator"]["conv_out"]["bias"] += np.nan
    new, sums = program()(state)
    assert new.step == state.step + 1 and sums["skipped"][0] == 1 and sums["loss"][1] == 0
    assert tiny.distance(new.params["codec"], state.params["codec"]) == 0
    assert tiny.distance(new.opt_state, state.opt_state) == 0


@pytest.mark.slow
def test_posterior_is_sampled_anew():
    """Training on the posterior's mean, or with one noise for all steps: the decoder would never meet the noise it must bear."""
    losses = [float(program()(randomized(step))[1]["l1"][0]) for step in (1, 2)]
    noise = jax.random.normal(named_key(jax.random.fold_in(jax.random.key(0), 1), "posterior"), (16, 4, 4, 2))
    _, values = gradients()(randomized().params, {}, to_float(IMAGES), noise, True)
    assert losses[0] != losses[1]
    np.testing.assert_allclose(values["l1"].sum(), losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"task__kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"task__perceptual_weight": 1.0}, "LPIPS needs images of at least 16"),
        ({"task__discriminator": {"base_features": 8, "num_layers": 3, "norm_groups": 4}}, "num_layers is 3"),
        ({"transform__channels": 3}, "must be equal"),
        ({"transform__resolution": 9}, "not a positive multiple"),
    ],
)
def test_bad_values(changes, text):
    """A mistake that is only found when the first batch reaches the network, or never."""
    with pytest.raises(UserError, match=text):
        build.Run(tiny.autoencoder(**changes)).task


@pytest.mark.slow
def test_one_scale_for_each_channel():
    """Latents of an autoencoder that is normalised channel by channel, scaled by one number or not at all."""
    numbers = task_of().codec
    scale, shift = (np.linspace(start, 2, numbers.latent_channels) for start in (0.5, -1))
    per_channel = dataclasses.replace(task_of(), codec=dataclasses.replace(numbers, scale=scale.tolist(), shift=shift.tolist()))
    params, images = randomized().params["codec"], to_float(jnp.asarray(IMAGES[:2]))
    noise = jnp.zeros((2, *numbers.latent_shape(IMAGES.shape[1:])))
    plain, _ = task_of().encode(params, images, noise)
    found, _ = per_channel.encode(params, images, noise)
    mean = plain / numbers.scale + numbers.shift
    np.testing.assert_allclose(found, (mean - shift) * scale, rtol=1e-5, atol=1e-5)


def clip_task(shape, **fields):
    """A task on clips or images of this shape, with a discriminator."""
    codec = CausalVAE(base=4, mult=(1, 2), blocks=1, z=2, temporal=(True,), image_channels=1)
    discriminator = PatchDiscriminator(base_features=8, num_layers=1, norm_groups=4)
    return AutoencoderTask(
        codec, optax.sgd(0.1), shape, kl_weight=0.1, discriminator=discriminator, discriminator_weight=0.5, **fields
    )


def test_losses_of_clips_are_means_over_their_frames(monkeypatch):
    """LPIPS or a discriminator that sees a clip as one image, or a sum over frames in place of a mean."""
    monkeypatch.setattr(autoencoder, "lpips", lambda params, x, y, dtype: jnp.square(x - y).mean((1, 2, 3)))
    clips, images = clip_task((5, 16, 16, 1), perceptual_weight=0.5), clip_task((16, 16, 1), perceptual_weight=0.5)
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 2, 5, 16, 16, 1)).astype(np.float32)
    frames = [z.reshape(10, 16, 16, 1) for z in (x, y)]
    constants = {"perceptual": {}}
    (total, parts), (flat_total, flat) = clips.fidelity(constants, x, y), images.fidelity(constants, *frames)
    np.testing.assert_allclose(total, flat_total, rtol=1e-6)
    for name in parts:
        assert parts[name].shape == (2,)
        np.testing.assert_allclose(parts[name], flat[name].reshape(2, 5).mean(1), rtol=1e-6)
    params = jax.jit(clips.discriminator.init)(jax.random.key(0), frames[0])["params"]

    def last(gradient):
        return gradient.sum()

    gradient, _, numbers = clips.adversarial(params, x, y, jnp.ones_like(x), last)
    flat_gradient, _, flat_numbers = images.adversarial(params, *frames, jnp.ones_like(frames[0]), last)
    np.testing.assert_allclose(gradient.reshape(flat_gradient.shape), flat_gradient, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(numbers["discriminator"], flat_numbers["discriminator"], rtol=1e-6)


@pytest.mark.slow
def test_a_step_on_clips_is_a_step_on_images_for_one_frame():
    """A task that refuses clips, or a loss of a clip that is not that of its only frame."""
    clips, images = clip_task((1, 8, 8, 1)), clip_task((8, 8, 1))
    params = {"codec": clips.codec.init(jax.random.key(0))}
    params["discriminator"] = clips.discriminator.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))["params"]
    noise = jax.random.normal(jax.random.key(2), (16, 1, 4, 4, 2))
    grads, values = jax.jit(clips.gradients)(params, {}, to_float(IMAGES[:, None]), noise, True)
    wanted, flat = jax.jit(images.gradients)(params, {}, to_float(IMAGES), noise[:, 0], True)
    assert tiny.distance(grads, wanted, floor=1e-4) < 1e-4
    assert tiny.distance(values, flat) < 1e-5
