"""Improved precision and recall: the share of samples in the manifold of the reference images, and vice versa.

N samples, M reference images, F features, b rows per block. The manifold of a set is the union of balls around its images; each
ball's radius is the distance to the image's k-th nearest neighbour in the set.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError

BLOCK = 2_048


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Precision and recall: the share of samples in the reference's manifold, and of reference images in the samples'.

    Distances are computed in float32 on the first device, in blocks of 2,048 x 2,048, so that memory grows with N + M only. The
    reference's mean is subtracted first, which does not change the distances and preserves digits. OpenAI's evaluator computes
    distances in float16 where these are finite, and so differs by a few ten-thousandths; torch-fidelity is equal up to rounding.

    Args:
        features: [N, F] of the samples.
        reference: [M, F].
        k: number of neighbours, not counting the image itself; below N and M.
    Raises:
        UserError: k is out of range, or features are not finite.
        ValueError: the numbers of features differ.
    Source: Kynkaanniemi et al. 2019, equations 1 to 3; k = 3 as in Dhariwal & Nichol 2021.
    """
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of widths {features.shape[1]} and {reference.shape[1]} cannot be compared")
    if not 1 <= k < min(len(features), len(reference)):
        raise UserError(
            f"precision and recall with k = {k} neighbours need k >= 1 and more than {max(k, 1)} images on each side; there are "
            f"{len(features)} samples and {len(reference)} reference images"
        )
    center = reference.mean(0, dtype=np.float64)
    samples, others = (_Blocks((x - center).astype(np.float32)) for x in (features, reference))
    if not (np.isfinite(samples.rows).all() and np.isfinite(others.rows).all()):
        raise UserError("the features contain NaN or infinity; the images or the extractor's weights are broken")
    return _share_inside(samples, others, _radii(others, k)), _share_inside(others, samples, _radii(samples, k))


class _Blocks:
    """Rows [N, F], padded and reshaped to blocks [n, b, F]; `valid` [n, b] is False for padding."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.count = rows, len(rows)
        size = min(BLOCK, self.count)
        padding = -self.count % size
        self.blocks = jnp.asarray(np.pad(rows, ((0, padding), (0, 0))).reshape(-1, size, rows.shape[1]))
        self.valid = jnp.asarray(np.arange(self.count + padding).reshape(-1, size) < self.count)


def _radii(x: _Blocks, k: int) -> jax.Array:
    """Squared radius of each image's ball, [n, b]; -1 (an empty ball) for padding."""
    distances = [_kth_neighbours(block, x.blocks, x.valid, k) for block in x.blocks]
    return jnp.where(x.valid, jnp.stack(distances), -1)


def _share_inside(x: _Blocks, manifold: _Blocks, radii: jax.Array) -> float:
    inside = [np.asarray(_inside(block, manifold.blocks, radii)) for block in x.blocks]
    return float(np.concatenate(inside)[: x.count].mean())


def _squared_distances(x, y):
    """[b, F], [c, F] -> [b, c]."""
    products = jnp.einsum("bf,cf->bc", x, y, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.square(x).sum(-1)[:, None] - 2 * products + jnp.square(y).sum(-1), 0)


@functools.partial(jax.jit, static_argnames="k")
def _kth_neighbours(x, blocks, valid, k):
    """Squared distance to the k-th neighbour, [b]; the image itself is the 0-th."""

    def nearest(best, block):
        y, real = block
        distances = jnp.where(real, _squared_distances(x, y), jnp.inf)
        both = jnp.concatenate([best, -jax.lax.top_k(-distances, min(k + 1, len(y)))[0]], axis=1)
        return -jax.lax.top_k(-both, k + 1)[0], None

    best, _ = jax.lax.scan(nearest, jnp.full((len(x), k + 1), jnp.inf), (blocks, valid))
    return best[:, k]


@jax.jit
def _inside(x, blocks, radii):
    """Whether each row of x lies in any ball, bool [b]."""

    def any_of(inside, block):
        y, radius = block
        return inside | (_squared_distances(x, y) <= radius).any(-1), None

    return jax.lax.scan(any_of, jnp.zeros(len(x), bool), (blocks, radii))[0]
