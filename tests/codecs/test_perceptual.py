"""LPIPS beside a second statement of it in PyTorch, and at its edges."""

import jax
import jax.numpy as jnp
import lpips_weights
import numpy as np
import pytest

from dit_jax.codecs.perceptual import features, lpips, normalize
from dit_jax.interop import lpips as interop
from dit_jax.interop.tensors import write_foreign


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "x.safetensors"
    write_foreign(path, interop.from_package(lpips_weights.tensors(), "random"), {})
    return jax.tree.map(jnp.asarray, interop.load(path))


@pytest.fixture(scope="module")
def distance():
    return jax.jit(lpips, static_argnums=3)


@pytest.fixture(scope="module")
def gradient():
    """By both images. The weights are an argument: as constants XLA would fold them for a minute."""
    return jax.jit(jax.grad(lambda params, x, y: lpips(params, x, y).sum(), (1, 2)))


# Odd sides, little more than the smallest, and mostly one pair: without XLA's optimizations a convolution takes its time.
SHAPE = (1, 17, 19, 3)


def pairs(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.uniform(-1, 1, shape).astype(np.float32) for _ in range(2))


def torch_lpips(x, y):
    """The definition, in PyTorch; x, y: [B, 3, H, W]."""
    import torch
    from torch.nn import functional as F

    weights = {name: torch.from_numpy(array) for name, array in lpips_weights.arrays().items()}
    total, both = 0, []
    for z in (x, y):
        z, found = (z - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"], []
        for stage, places in lpips_weights.PLACES.items():
            z = F.max_pool2d(z, 2) if stage > 1 else z
            for place in places:
                name = f"net.slice{stage}.{place}"
                z = F.relu(F.conv2d(z, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1))
            found.append(z / (z.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        both.append(found)
    for stage, (a, b) in enumerate(zip(*both, strict=True)):
        total = total + F.conv2d((a - b) ** 2, weights[f"lin{stage}.model.1.weight"]).mean((1, 2, 3))
    return total


def test_value_and_gradient_are_pytorchs(params, distance, gradient):
    """A stage taken before its ReLU or after its pooling, rounding of odd sizes, scaling left out, a sum in place of a mean."""
    torch = pytest.importorskip("torch")
    x, y = pairs(2, *SHAPE[1:])
    theirs = [torch.from_numpy(z.transpose(0, 3, 1, 2)).requires_grad_() for z in (x, y)]
    expected = torch_lpips(*theirs)
    expected.sum().backward()
    np.testing.assert_allclose(distance(params, x, y, jnp.float32), expected.detach(), rtol=1e-5)
    for ours, z in zip(gradient(params, x[:1], y[:1]), theirs, strict=True):
        reference = z.grad.numpy().transpose(0, 2, 3, 1)[:1]
        # 4e-6 here; where a rounding error turns a ReLU on or off, two float32 programs differ by 1e-3.
        assert np.linalg.norm(ours - reference) < 1e-4 * np.linalg.norm(reference)


@pytest.mark.slow
def test_equal_images_have_distance_and_gradient_zero(params, distance, gradient):
    """A loss that pulls at a perfect reconstruction."""
    x, y = pairs(*SHAPE)
    assert not np.any(distance(params, x, x, jnp.float32))
    at_rest, pull = (max(float(jnp.abs(g).max()) for g in gradient(params, x, other)) for other in (x, y))
    assert at_rest < 1e-6 * pull  # not 0: the two sides of a difference may be fused otherwise


def test_channels_are_normalised_in_float32_with_a_finite_gradient():
    """The infinite slope of a square root at zero, which makes weights NaN; norms in half precision."""
    x = jnp.array([[0.0, 0.0], [1e-25, 2e-25], [3.0, 4.0]], jnp.bfloat16)
    np.testing.assert_allclose(normalize(x)[2], [0.6, 0.8], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: normalize(x)[:, 0].sum())(x.astype(jnp.float32))).all()


def test_bfloat16_computes_in_bfloat16_and_measures_in_float32(params, distance):
    """Distances in half precision, or a dtype that is ignored."""
    x, y = pairs(*SHAPE)
    full, half = (distance(params, x, y, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(half, full, rtol=0.02)


def test_grey_is_equal_red_green_and_blue(params, distance):
    """One channel scaled as red only."""
    x, y = pairs(*SHAPE[:3], 1)
    np.testing.assert_allclose(
        distance(params, x, y, jnp.float32), distance(params, x.repeat(3, -1), y.repeat(3, -1), jnp.float32), rtol=1e-6
    )


def test_sixteen_pixels_are_enough(params):
    """The limit one step too high, or sizes of odd images rounded up."""
    shapes = [x.shape for x in jax.eval_shape(features, params, jnp.zeros((2, 16, 31, 3)))]
    assert shapes == [(2, 16, 31, 64), (2, 8, 15, 128), (2, 4, 7, 256), (2, 2, 3, 512), (2, 1, 1, 512)]


@pytest.mark.parametrize(
    "x, y, text",
    [
        (np.zeros((1, 15, 40, 3), np.float32), None, "15 x 40.*at least 16 x 16.*enlarge"),
        (np.zeros((1, 16, 16, 3), np.uint8), None, "uint8"),
        (np.zeros((1, 16, 16, 4), np.float32), None, r"\[B, H, W, 3\]"),
        (np.zeros((2, 16, 16, 3), np.float32), np.zeros((1, 16, 16, 3), np.float32), "must be equal"),
    ],
)
def test_bad_images(x, y, text, params):
    """An empty last stage whose mean is NaN, a range of 0 to 255, or one image compared with many."""
    with pytest.raises(ValueError, match=text):
        lpips(params, x, x if y is None else y)
