"""The Frechet distance between Gaussians fitted to two sets of features: FID, sFID or FD-DINOv2, depending on the features.

N images, F features.
"""

from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError


class Moments(NamedTuple):
    """Count (None if the statistics file does not record it), mean float64[F], covariance float64[F, F] (over count - 1)."""

    count: int | None  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Mean and unbiased covariance in float64 of features [N, F].

    Raises:
        UserError: fewer than 2 rows, or a value that is not finite.
    """
    features = np.asarray(features, np.float64)
    return moments_of_sums(len(features), features.sum(0), features.T @ features)


def moments_of_sums(count: int, sums: np.ndarray, products: np.ndarray) -> Moments:
    """Moments of N features from their sum and the sum of their outer products.

    Args:
        sums: float64 [F].
        products: float64 [F, F]. Subtracting the outer product of the means loses about log10(mean^2 / variance) digits, one or
            two of the sixteen of float64. In float32 it would ruin singular covariances.
    Raises:
        UserError: fewer than 2 images, or a value that is not finite.
    """
    if count < 2:
        raise UserError(f"{count} images: a covariance needs at least 2")
    if not (np.isfinite(sums).all() and np.isfinite(products).all()):
        raise UserError("the features contain NaN or infinity; the images or the extractor's weights are broken")
    mean = sums / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    return Moments(count, mean, (covariance + covariance.T) / 2)


def square_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric positive semi-definite matrix; negative eigenvalues (rounding) count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Computed by eigenvalues, so that singular covariances need no added diagonal. It is 0 if it is not larger than its rounding
    error, as for two equal sets.

    Source: Heusel et al. 2017, equation 6; Dowson & Landau 1982.
    """
    root = square_root(a.covariance)
    values = np.linalg.eigvalsh(root @ b.covariance @ root)
    return _distance(a, b, values)


def _distance(a: Moments, b: Moments, values: np.ndarray) -> float:
    roots = np.sqrt(np.maximum(values, 0))
    shift, traces = np.square(a.mean - b.mean).sum(), np.trace(a.covariance) + np.trace(b.covariance)
    distance = float(shift + traces - 2 * roots.sum())
    # An eigenvalue is known to about eps times the largest one. What is below that has a root that is all rounding; the error of
    # the others shrinks with their root.
    eps = np.finfo(np.float64).eps
    kept = values > values[-1] * len(values) * eps
    error = len(values) * eps * traces + 2 * roots[~kept].sum() + (values[-1] * eps / roots[kept]).sum()
    return distance if distance > error else 0.0


class Gradient(NamedTuple):
    """The distance to a reference and its derivatives with respect to the samples' mean float64[F] and covariance [F, F]."""

    distance: float
    by_mean: np.ndarray
    by_covariance: np.ndarray


def frechet_gradient(samples: Moments, reference: Moments) -> Gradient:
    """The distance and its derivatives with respect to the samples' moments.

    Costs one eigendecomposition more than the distance alone. The derivative with respect to the covariance S is
    I - R (R S R)^-1/2 R, where R is the root of the reference's covariance; R (R S R)^-1/2 R is the optimal transport map
    between the Gaussians. If S is singular, the pseudo-inverse replaces the inverse: the derivative within the images' span.

    Source: Bhatia, Jain & Lim 2019 (On the Bures-Wasserstein distance between positive definite matrices), section 4.
    """
    root = square_root(reference.covariance)
    values, vectors = np.linalg.eigh(root @ samples.covariance @ root)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    outer = root @ (vectors[:, kept] / values[kept] ** 0.25)
    return Gradient(
        _distance(samples, reference, values), 2 * (samples.mean - reference.mean), np.eye(len(root)) - outer @ outer.T
    )
