"""Kernel Inception Distance: the squared maximum mean discrepancy under a cubic kernel, averaged over subsets.

N samples, M reference images, F features, m images per subset.
"""

import numpy as np

from dit_jax.errors import UserError

SUBSETS = 100


def kernel_distance(
    features: np.ndarray, reference: np.ndarray, subsets: int = SUBSETS, subset_size: int = 1_000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased estimate, which may be slightly below 0.

    The subsets are those of torch-fidelity: NumPy's RandomState(seed) alternately draws m of the N and m of the M images without
    replacement. Products of features are computed in float32, everything after them in float64.

    Args:
        features: [N, F] of the samples.
        reference: [M, F].
        subset_size: m, at least 2.
    Raises:
        UserError: fewer than m images on a side, fewer than 1 subset, m below 2, or features that are not finite.
        ValueError: the numbers of features differ.
    Source: Binkowski et al. 2018, equation 4 and section 4: k(x, y) = (x . y / F + 1)^3.
    """
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of widths {features.shape[1]} and {reference.shape[1]} cannot be compared")
    check(subsets, subset_size)
    if min(len(features), len(reference)) < subset_size:
        raise UserError(
            f"KID subsets of {subset_size} images need that many on each side, but there are {len(features)} samples "
            f"and {len(reference)} reference images: draw more samples, or use smaller subsets and report their size"
        )
    if not (np.isfinite(features).all() and np.isfinite(reference).all()):
        raise UserError("the features contain NaN or infinity; the images or the extractor's weights are broken")
    rng = np.random.RandomState(seed)
    estimates = np.empty(subsets)
    for i in range(subsets):
        x = features[rng.choice(len(features), subset_size, replace=False)]
        y = reference[rng.choice(len(reference), subset_size, replace=False)]
        estimates[i] = unbiased_mmd2(np.asarray(x, np.float32), np.asarray(y, np.float32))
    return float(estimates.mean()), float(estimates.std())


def check(subsets: int, subset_size: int) -> None:
    """Raises UserError unless there is at least 1 subset of at least 2 images."""
    if subsets < 1 or subset_size < 2:
        raise UserError(f"{subsets} KID subsets of {subset_size} images: at least 1 subset of at least 2 images is needed")


def unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate of the squared MMD between x [m, F] and y [n, F]; pairs of an image with itself are excluded."""
    m, n = len(x), len(y)
    among_x, among_y = _kernel(x, x), _kernel(y, y)
    return float(
        (among_x.sum() - np.trace(among_x)) / (m * (m - 1))
        + (among_y.sum() - np.trace(among_y)) / (n * (n - 1))
        - 2 * _kernel(x, y).mean()
    )


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    products = (x @ y.T).astype(np.float64)
    return (products / x.shape[1] + 1) ** 3
