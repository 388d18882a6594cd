"""PSNR and SSIM of reconstructions, per image, in float64.

N images, H x W pixels, C channels.
"""

import numpy as np

from dit_jax.errors import UserError

PEAK = 255.0
SIGMA = 1.5  # pixels
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, float64 [N]: 10 log10(255^2 / mean squared error); infinite for equal images.

    The error is the mean over the pixels and channels of one image. Average these values, as papers do, not the errors. If one
    pair is equal, the average is infinite.

    Args:
        images, reconstructions: uint8 [N, H, W, C]. Pairs are converted to float64 one at a time, so both may be memory-mapped.
    Raises:
        ValueError: another dtype, different shapes, or no images.
    """
    _check(images, reconstructions)
    errors = np.array([np.square(x - y).mean() for x, y in _pairs(images, reconstructions)])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / errors)


def ssim(images: np.ndarray, reconstructions: np.ndarray, window: int = 11) -> np.ndarray:
    """Structural similarity, float64 [N] in [-1, 1], 1 for equal images only.

    Uses a Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, range 255 and biased variances. Only windows inside
    the image count; the values are averaged over positions and over R, G and B. Equal to scikit-image's
    structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1). Papers
    differ: scikit-image's defaults use a uniform window of 7 x 7, torchmetrics also counts positions along the border, with the
    image reflected, and Wang et al. use grey images.

    Args:
        images, reconstructions: uint8 [N, H, W, C]. Pairs are converted to float64 one at a time, so both may be memory-mapped.
        window: side of the Gaussian window, odd. The default is the one of the literature. A smaller window, for images below
            11 pixels, truncates the same Gaussian earlier; its values are comparable only with one another.
    Raises:
        UserError: the window is even, or larger than the images.
        ValueError: another dtype, different shapes, or no images.
    Source: Wang et al. 2004 (Image Quality Assessment: From Error Visibility to Structural Similarity), equation 13, section
        III-C.
    """
    _check(images, reconstructions)
    side = min(images.shape[1:3])
    if window < 1 or window % 2 == 0:
        raise UserError(f"the SSIM window of {window} pixels must be odd and at least 1")
    if window > side:
        raise UserError(
            f"images of {images.shape[1]} x {images.shape[2]} are smaller than the SSIM window of {window} x "
            f"{window}: pass window={side - 1 + side % 2}, and report it with the number"
        )
    taps = np.exp(-0.5 * np.square((np.arange(window) - window // 2) / SIGMA))
    taps /= taps.sum()
    return np.array([_ssim(x, y, taps) for x, y in _pairs(images, reconstructions)])


def _ssim(x, y, taps):
    """Mean SSIM of one pair [H, W, C]."""
    mean_x, mean_y, squares, product = (_filter(z, taps) for z in (x, y, x * x + y * y, x * y))
    product_of_means, squares_of_means = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = product - product_of_means, squares - squares_of_means  # of x and y together
    values = ((2 * product_of_means + C1) * (2 * covariance + C2)) / ((squares_of_means + C1) * (variances + C2))
    return values.mean()


def _filter(x, taps):
    """Separable convolution of [H, W, C] with taps along both axes, without padding."""
    for axis in (0, 1):
        length = x.shape[axis] - len(taps) + 1
        shifted = (x[start : start + length] if axis == 0 else x[:, start : start + length] for start in range(len(taps)))
        x = sum(tap * part for tap, part in zip(taps, shifted, strict=True))
    return x


def _pairs(images, reconstructions):
    return ((x.astype(np.float64), y.astype(np.float64)) for x, y in zip(images, reconstructions, strict=True))


def _check(images, reconstructions):
    for name, array in (("images", images), ("reconstructions", reconstructions)):
        if array.dtype != np.uint8 or array.ndim != 4 or 0 in array.shape:
            raise ValueError(
                f"{name} are {array.dtype}{list(array.shape)}, not uint8 [N >= 1, H, W, C]; convert floats in [-1, 1] with "
                "dit_jax.pixels.to_uint8"
            )
    if images.shape != reconstructions.shape:
        raise ValueError(f"images {list(images.shape)} and reconstructions {list(reconstructions.shape)} differ in shape")
