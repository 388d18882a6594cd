"""PSNR and SSIM beside slow second statements of them."""

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from dit_jax.errors import UserError
from dit_jax.metrics.image_quality import psnr, ssim


def pairs(shape, noise=30.0, seed=0):
    """Smooth images and noisy copies."""
    rng = np.random.default_rng(seed)
    images = ndimage.uniform_filter(rng.uniform(0, 255, shape), (0, 3, 3, 0)).astype(np.uint8)
    return images, np.clip(images + rng.normal(0, noise, shape), 0, 255).astype(np.uint8)


def filtered_ssim(x, y):
    """One pair, by SciPy's Gaussian filter of the whole image and its border cut off, channel by channel."""

    def blur(z):
        return ndimage.gaussian_filter(z, 1.5, truncate=3.5, axes=(0, 1))[5:-5, 5:-5]

    x, y = x.astype(float), y.astype(float)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))


def looped_ssim(x, y, window):
    """One grey pair [H, W], window by window from the weighted moments of its pixels."""
    r = window // 2
    weights = np.array([[np.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-r, r + 1)] for i in range(-r, r + 1)])
    weights /= weights.sum()
    values = []
    for i in range(x.shape[0] - window + 1):
        for j in range(x.shape[1] - window + 1):
            a, b = (z[i : i + window, j : j + window].astype(float) for z in (x, y))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb, cov = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum(), (weights * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + 6.5025) * (2 * cov + 58.5225) / ((ma**2 + mb**2 + 6.5025) * (va + vb + 58.5225)))
    return np.mean(values)


def test_psnr_by_hand():
    """Another peak, a mean over the set before the logarithm, or an infinity that became a number."""
    images = np.full((4, 2, 3, 3), 100, np.uint8)
    other = images.copy()
    other[1] += 1
    other[2, 0, 0, 0] = 0
    other[3] = 100 + np.array([155, -100, 0]).astype(np.uint8)
    expected = [np.inf, 10 * np.log10(255**2), 10 * np.log10(255**2 * 18 / 100**2), 10 * np.log10(255**2 * 3 / (155**2 + 100**2))]
    found = psnr(images, other)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(found, psnr(other, images))


@pytest.mark.parametrize("shape", [(3, 23, 31, 3), (2, 11, 64, 1), (2, 11, 11, 3)])
def test_ssim_is_scipys(shape):
    """A window that leaves the image, a channel or an axis mixed up, another sigma, variances divided by N - 1."""
    images, other = pairs(shape)
    found = ssim(images, other)
    assert found.shape == (shape[0],) and found.dtype == np.float64
    np.testing.assert_allclose(found, [filtered_ssim(*pair) for pair in zip(images, other, strict=True)], rtol=1e-12)


@pytest.mark.parametrize("window", [7, 11])
def test_ssim_is_its_definition(window):
    """Moments of a window other than the paper's equations have them, at any size of window."""
    images, other = pairs((2, 14, 13, 1))
    expected = [looped_ssim(x[..., 0], y[..., 0], window) for x, y in zip(images, other, strict=True)]
    np.testing.assert_allclose(ssim(images, other, window), expected, rtol=1e-10)


def test_ssim_is_scikit_images():
    """Numbers of scikit-image 0.26.0 with the settings that the docstring names."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 20, 3), dtype=np.uint8)
    other = np.clip(images + rng.integers(-60, 60, images.shape), 0, 255).astype(np.uint8)
    np.testing.assert_allclose(ssim(images, other), [0.9160316027100189, 0.9084609530308052], rtol=1e-10)


def test_ssim_knows_equal_and_opposite():
    """1 for equal images, flat ones included, where variances round below zero; below 0 for a negative."""
    images, _ = pairs((2, 16, 16, 3))
    images[1] = 255
    assert ssim(images, images).tolist() == [1, 1]
    assert ssim(images[:1], 255 - images[:1])[0] < 0


def test_images_are_read_one_by_one(tmp_path):
    """A whole set as float64: 80 GB for 50,000 images of 256 px."""
    shape = (40, 64, 64, 3)
    images = np.memmap(tmp_path / "x", np.uint8, "w+", shape=shape)
    tracemalloc.start()
    psnr(images, images)
    ssim(images, images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * images.nbytes / 2


@pytest.mark.parametrize("window, text", [(11, "8 x 9 are smaller.*window=7"), (9, "window=7"), (4, "odd"), (-1, "odd")])
def test_windows_that_do_not_fit(window, text):
    """A mean over no positions, NaN, or a smaller window taken unasked; and a remedy that works."""
    images, other = pairs((1, 8, 9, 1))
    with pytest.raises(UserError, match=text):
        ssim(images, other, window)
    assert 0 < ssim(images, other, 7)[0] < 1


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    "x, y, text",
    [
        (np.zeros((1, 16, 16, 3), np.float32), None, "float32.*uint8"),
        (np.zeros((16, 16, 3), np.uint8), None, "uint8 .N >= 1"),
        (np.zeros((0, 16, 16, 3), np.uint8), None, "uint8 .N >= 1"),
        (np.zeros((2, 16, 16, 3), np.uint8), np.zeros((1, 16, 16, 3), np.uint8), "differ in shape"),
    ],
)
def test_bad_images(metric, x, y, text):
    """Images in [-1, 1] measured against a peak of 255, or one image compared with many."""
    with pytest.raises(ValueError, match=text):
        metric(x, x if y is None else y)
