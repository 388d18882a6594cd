"""Kernel Inception Distance: the squared maximum mean discrepancy under a cubic kernel, averaged over subsets.

N images against M, F features, m images a subset.
"""

import numpy as np

from dit_jax.errors import UserError

SUBSETS = 100


def kernel_distance(
    features: np.ndarray, reference: np.ndarray, subsets: int = SUBSETS, subset_size: int = 1_000, seed: int = 2020
) -> tuple[float, float]:
    """(mean, standard deviation over subsets) of the unbiased estimate; it may be a little below 0.

    The subsets are those of torch-fidelity: m of the N and m of the M drawn without replacement by NumPy's RandomState(seed), in
    turn. Products of features are float32, everything after them float64.

    Args:
        features: [N, F]; reference: [M, F].
        subset_size: m, at least 2.
    Raises:
        UserError: fewer than m images on a side, fewer than 1 subset, m below 2; features that are not finite.
        ValueError: two widths.
    Source: Binkowski et al. 2018, equation 4 and section 4: k(x, y) = (x . y / F + 1)^3.
    """
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of {features.shape[1]} and of {reference.shape[1]} numbers cannot be compared")
    check(subsets, subset_size)
    if min(len(features), len(reference)) < subset_size:
        raise UserError(
            f"KID subsets of {subset_size} images need as many on each side, and there are {len(features)} samples "
            f"and {len(reference)} reference images: draw more, or take smaller subsets and say so"
        )
    if not (np.isfinite(features).all() and np.isfinite(reference).all()):
        raise UserError("features hold NaN or infinity; the images or the extractor's weights are broken")
    rng = np.random.RandomState(seed)
    found = np.empty(subsets)
    for i in range(subsets):
        x = features[rng.choice(len(features), subset_size, replace=False)]
        y = reference[rng.choice(len(reference), subset_size, replace=False)]
        found[i] = unbiased_mmd2(np.asarray(x, np.float32), np.asarray(y, np.float32))
    return float(found.mean()), float(found.std())


def check(subsets: int, subset_size: int):
    """Raises a UserError if there are no such subsets."""
    if subsets < 1 or subset_size < 2:
        raise UserError(f"{subsets} KID subsets of {subset_size} images; at least 1 of at least 2 is needed")


def unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of the squared discrepancy of x [m, F] and y [n, F]: pairs of an image with itself left out."""
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
