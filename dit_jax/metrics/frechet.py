"""The Frechet distance between Gaussians fitted to two sets of features.

N images, F features.
"""

from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError


class Moments(NamedTuple):
    """count, mean float64[F], covariance float64[F, F] (divided by count - 1)."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Mean and unbiased covariance in float64 of features [N, F].

    Raises:
        UserError: fewer than 2 rows, or a value that is not finite.
    """
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise UserError(f"{len(features)} images: a covariance needs at least 2")
    if not np.isfinite(features).all():
        raise UserError("features hold NaN or infinity; the images or the extractor's weights are broken")
    return Moments(len(features), features.mean(0), np.cov(features, rowvar=False))


def square_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric positive semi-definite matrix; rounding below zero counts as zero."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), by eigenvalues, so singular covariances need no jitter.

    Source: Heusel et al. 2017, equation 6; Dowson & Landau 1982.
    """
    root = square_root(a.covariance)
    values = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.maximum(values, 0)).sum()
    shift = np.square(a.mean - b.mean).sum()
    return float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
