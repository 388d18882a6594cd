"""The patch discriminator and its losses beside a second statement in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.codecs.discriminator import PatchDiscriminator, adaptive_weight, generator_loss, hinge_discriminator_loss
from dit_jax.errors import UserError


def random_params(network, images, seed=0):
    """Parameters large enough that every layer matters, biases and norms included."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    spread = jax.tree.map(lambda x: 1.5 / np.sqrt(max(np.prod(x.shape[:-1]), 4)), shapes)
    return jax.tree.map(lambda x, scale: rng.normal(0.2, scale, x.shape).astype(np.float32), shapes, spread)


def torch_forward(params, images, num_layers, groups):
    import torch
    from torch.nn import functional as F

    def conv(x, name, stride):
        kernel = torch.from_numpy(params[name]["kernel"].transpose(3, 2, 0, 1).copy())
        return F.conv2d(x, kernel, torch.from_numpy(params[name]["bias"]), stride=stride, padding=1)

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    for layer in range(num_layers + 1):
        x = conv(x, f"conv_{layer}", 2 if layer < num_layers else 1)
        if layer and groups:
            norm = {name: torch.from_numpy(value) for name, value in params[f"norm_{layer}"].items()}
            x = F.group_norm(x, groups, norm["scale"], norm["bias"], eps=1e-6)
        x = F.leaky_relu(x, 0.2)
    return conv(x, "conv_out", 1).numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    "num_layers, groups, shape", [(3, 0, (2, 26, 35, 3)), (3, 8, (2, 24, 27, 3)), (1, 4, (3, 8, 8, 1)), (5, 4, (1, 96, 97, 3))]
)
def test_logits_are_pytorchs(num_layers, groups, shape):
    """Padding on one side only, a norm in the first layer, another slope, or a width that grows past 8 times."""
    pytest.importorskip("torch")
    network = PatchDiscriminator(base_features=8, num_layers=num_layers, norm_groups=groups)
    images = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    params = random_params(network, images)
    found = network.apply({"params": params}, images)
    expected = torch_forward(params, images, num_layers, groups)
    height, width = (n // 2**num_layers - 2 for n in shape[1:3])
    assert found.shape == (shape[0], height, width, 1) == expected.shape
    assert params[f"conv_{num_layers}"]["kernel"].shape[-1] == 8 * min(2**num_layers, 8)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_losses_are_the_papers():
    """A sign, the factor 1/2, or a margin on the wrong side; against numbers by hand."""
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0, 0.5])
    assert hinge_discriminator_loss(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3))
    assert generator_loss(fake) == pytest.approx(2.5 / 3)
    assert hinge_discriminator_loss(jnp.zeros(4), jnp.zeros(4)) == 1
    better = jax.grad(lambda r, f: hinge_discriminator_loss(r, f), (0, 1))(real, fake)
    np.testing.assert_allclose(better, [[0, -1 / 6, -1 / 6], [0, 1 / 6, 1 / 6]], rtol=1e-6)
    assert hinge_discriminator_loss(real.astype(jnp.bfloat16), fake.astype(jnp.bfloat16)).dtype == jnp.float32


def test_losses_are_pytorchs():
    """The same over a map of logits, gradients included."""
    torch = pytest.importorskip("torch")
    real, fake = np.random.default_rng(0).normal(0, 2, (2, 3, 5, 4, 1)).astype(np.float32)
    theirs = [torch.from_numpy(x).requires_grad_() for x in (real, fake)]
    loss = 0.5 * (torch.relu(1 - theirs[0]).mean() + torch.relu(1 + theirs[1]).mean()) - theirs[1].mean()
    loss.backward()
    found, gradients = jax.value_and_grad(lambda r, f: hinge_discriminator_loss(r, f) + generator_loss(f), (0, 1))(real, fake)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    for ours, reference in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(ours, reference.grad, atol=1e-8)


def test_adaptive_weight():
    """The ratio upside down, without its bound, differentiated, or the norm of one array of several."""
    nll, gan = np.array([[3.0, 4.0]]), np.array([0.0, 0.5])
    assert adaptive_weight(nll, gan) == pytest.approx(5 / (0.5 + 1e-4))
    assert adaptive_weight({"kernel": nll, "bias": 12 * np.ones(1)}, {"kernel": gan, "bias": np.zeros(1)}) == pytest.approx(
        13 / (0.5 + 1e-4)
    )
    assert adaptive_weight(nll, np.zeros(2)) == 1e4
    assert adaptive_weight(nll, np.zeros(2), max_weight=7.0) == 7
    assert adaptive_weight(0 * nll, gan) == 0
    assert adaptive_weight(nll.astype(jnp.bfloat16), gan.astype(jnp.bfloat16)).dtype == jnp.float32
    assert not np.any(jax.grad(lambda x: adaptive_weight(x, gan))(nll))


def test_images_do_not_see_each_other():
    """Statistics of a batch: a result that depends on how images are put together or split over devices."""
    network = PatchDiscriminator(base_features=8, num_layers=1, norm_groups=4)
    images = np.random.default_rng(1).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    params = random_params(network, images)
    alone = network.apply({"params": params}, images[:1])
    together = network.apply({"params": params}, images * np.array([1, 9, -5], np.float32).reshape(3, 1, 1, 1))
    np.testing.assert_allclose(alone, together[:1], atol=1e-5)


@pytest.mark.slow
def test_it_learns_on_eight_pixels():
    """A network whose first weights are too small to learn from, or a loss that falls the wrong way."""
    network = PatchDiscriminator(base_features=16, num_layers=1, norm_groups=8)
    real = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (16, 8, 8, 1)), jnp.float32)
    fake = 0.7 * real  # paler
    params = network.init(jax.random.key(0), real)["params"]
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state):
        def loss(p):
            return hinge_discriminator_loss(network.apply({"params": p}, real), network.apply({"params": p}, fake))

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    losses = []
    for _ in range(40):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert losses[-1] < 0.1, losses[-1]  # without norms 0.8


def test_bfloat16_keeps_float32_logits_and_parameters():
    """Logits in half precision, or a dtype that is ignored."""
    images = np.random.default_rng(1).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    full, half = (PatchDiscriminator(16, 2, 8, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params = half.init(jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    a, b = full.apply(params, images), half.apply(params, images)
    assert b.dtype == jnp.float32 and not np.array_equal(a, b)
    np.testing.assert_allclose(a, b, atol=0.05 * np.abs(a).max())


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"base_features": 0}, "base_features is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"base_features": 10, "norm_groups": 32}, "does not divide the width 20"),
        ({"norm_groups": -1}, "norm_groups is -1"),
    ],
)
def test_bad_sizes(fields, text):
    """A division by zero from inside the first batch."""
    with pytest.raises(UserError, match=text):
        PatchDiscriminator(**fields)


@pytest.mark.parametrize("num_layers", [2, 3, 4])
def test_the_remedy_for_small_images_works(num_layers):
    """An empty map of logits, whose mean is NaN, or advice that does not help."""
    images = jnp.zeros((1, 8, 9, 3))
    with pytest.raises(UserError, match=f"needs {3 * 2**num_layers} pixels: set num_layers to at most 1"):
        PatchDiscriminator(8, num_layers, 4).init(jax.random.key(0), images)
    network = PatchDiscriminator(8, 1, 4)
    assert network.smallest_side == 6
    assert jax.eval_shape(network.init_with_output, jax.random.key(0), images[:, :6])[0].shape == (1, 1, 2, 1)
    with pytest.raises(UserError, match="enlarge"):
        network.init(jax.random.key(0), images[:, :5])


@pytest.mark.parametrize(
    "images, text",
    [
        (np.zeros((1, 8, 8, 3), np.uint8), "uint8"),
        (np.zeros((8, 8, 3), np.float32), "shape"),
        (np.zeros((1, 8, 8, 4), np.float32), "shape"),
    ],
)
def test_bad_images(images, text):
    """Pixels from 0 to 255, or an image without its batch."""
    with pytest.raises(ValueError, match=text):
        PatchDiscriminator(8, 1, 4).init(jax.random.key(0), images)
