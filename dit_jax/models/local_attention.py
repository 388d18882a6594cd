"""Attention within windows or neighbourhoods of a grid of tokens.

B batch, h x w grid, H heads, E width of a head; n queries and m keys of a block. Queries are scaled by the caller.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# (rows, columns) of the blocks of queries that share their keys in `neighborhood_attention`. Smaller ones have fewer masked keys
# and more copies of each key. With 7 x 7 neighbourhoods (4, 8) is the fastest on a CPU; accelerators may prefer (8, 8).
QUERY_BLOCK = (4, 8)


def window_attention(q: jax.Array, k: jax.Array, v: jax.Array, size: int, shift: jax.Array | int = 0) -> jax.Array:
    """Attention within windows of size x size tokens, of a grid that is rolled by `shift` along both axes.

    Tokens that the roll brings from the other end of the grid do not see their new neighbours. shift = 0 is plain windows.

    Args:
        q, k, v: [B, h, w, H, E]; size divides h and w.
        shift: int32 scalar from 0 to below size.

    Returns:
        [B, h, w, H, E] in the dtype of q.

    Source: Liu et al. 2021 (Swin), section 3.2, rolled to the other side as in k-diffusion.
    """
    _, h, w, _, _ = q.shape
    by = jnp.stack([jnp.asarray(shift)] * 2)
    parts = [_blocks(jnp.roll(_heads_first(x), by, (2, 3)), (size, size)) for x in (q, k, v)]
    rows, columns = _side_of_seam(h, size, shift), _side_of_seam(w, size, shift)
    mask = _both(rows[:, :, None] == rows[:, None], columns[:, :, None] == columns[:, None])
    y = _unblocks(_attend(*parts, mask), (size, size))
    return _heads_last(jnp.roll(y, -by, (2, 3)))


def _side_of_seam(n: int, size: int, shift: jax.Array | int) -> jax.Array:
    """bool[n / size, size]: whether a token of a rolled axis comes from its other end; only the first window has such tokens."""
    place = jnp.arange(n).reshape(-1, size)
    return place < shift


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def neighborhood_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, size: int, block: tuple[int, int] = QUERY_BLOCK
) -> jax.Array:
    """Attention of each token to the size x size tokens around it; at the border the neighbourhood is moved inside the grid.

    The neighbourhood of token i of an axis of n begins at clip(i - size // 2, 0, n - size). Blocks of queries share a block of
    keys that covers all of their neighbourhoods, and a mask selects those of each query: matrix products in place of a gather.
    A loop over rows of blocks keeps the copies of the keys and the scores of one row; the gradient computes them again and
    accumulates those of k and v in float32.

    Args:
        q, k, v: [B, h, w, H, E]; h and w are at least size.
        size: odd.
        block: (rows, columns) of the blocks of queries; it changes the time, not the result.

    Returns:
        [B, h, w, H, E] in the dtype of q.

    Source: Hassani et al. 2023 (Neighborhood Attention Transformer), equations 1 to 3, and NATTEN at the border.
    """
    rows, columns = _axes(q, size, block)

    def row_of_blocks(r, y):  # y has the queries of the rows to come
        key_blocks, value_blocks = (_keys(x, r, rows, columns) for x in (k, v))
        scores = _scores(_queries(y, r, rows, columns), key_blocks, _mask(r, rows, columns))
        weights = jnp.exp(scores - scores.max(-2, keepdims=True))
        sums = weights.sum(-2)[..., None]  # divides the result: E numbers of a query in place of m
        return _put(y, _product(weights.astype(v.dtype), value_blocks, -2, -2) / sums, r, rows, columns)

    y = jax.lax.fori_loop(0, rows.blocks, row_of_blocks, _padded(q, rows, columns))
    return y[:, : rows.n, : columns.n]


def _neighborhood_forward(q, k, v, size, block):
    return neighborhood_attention(q, k, v, size, block), (q, k, v)


def _neighborhood_backward(size, block, residuals, dy):
    q, k, v = residuals
    rows, columns = _axes(q, size, block)
    dy = _padded(dy, rows, columns)

    def row_of_blocks(r, gradients):  # the first has the queries of the rows to come
        query_blocks, dy_blocks = (_queries(x, r, rows, columns) for x in (gradients[0], dy))
        key_blocks, value_blocks = (_keys(x, r, rows, columns) for x in (k, v))
        weights = _weights(query_blocks, key_blocks, _mask(r, rows, columns))
        dq, dk, dv = _gradients(query_blocks, key_blocks, value_blocks, weights, dy_blocks)
        dk, dv = (_add_keys(x, d, r, rows, columns) for x, d in zip(gradients[1:], (dk, dv), strict=True))
        return _put(gradients[0], dq, r, rows, columns), dk, dv

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
    dq, dk, dv = jax.lax.fori_loop(0, rows.blocks, row_of_blocks, (_padded(q, rows, columns), *zeros))
    return dq[:, : rows.n, : columns.n], dk.astype(k.dtype), dv.astype(v.dtype)


neighborhood_attention.defvjp(_neighborhood_forward, _neighborhood_backward)


class Axis(NamedTuple):
    """The blocks of an axis of tokens.

    Fields:
        n: tokens.
        block: queries of a block; the last block may reach beyond n.
        begin: int[blocks], the first key of each block.
        length: keys of a block.
        inside: bool[blocks, length, block], whether a key lies in the neighbourhood of a query.
    """

    n: int
    block: int
    begin: np.ndarray
    length: int
    inside: np.ndarray

    @property
    def blocks(self) -> int:
        return len(self.begin)


def _axis(n: int, size: int, block: int) -> Axis:
    queries = np.arange(-(-n // block) * block).reshape(-1, block)
    start = np.clip(queries - size // 2, 0, n - size)
    length = int((start[:, -1] + size - start[:, 0]).max())
    begin = np.minimum(start[:, 0], n - length)
    keys = begin[:, None] + np.arange(length)
    start, keys = start[:, None, :], keys[:, :, None]
    return Axis(n, block, begin, length, (start <= keys) & (keys < start + size))


def _axes(x: jax.Array, size: int, block: tuple[int, int]) -> tuple[Axis, Axis]:
    return _axis(x.shape[1], size, block[0]), _axis(x.shape[2], size, block[1])


def _padded(x: jax.Array, rows: Axis, columns: Axis) -> jax.Array:
    """Queries [B, h, w, H, E] with zeros up to whole blocks."""
    return jnp.pad(x, [(0, 0), *((0, axis.blocks * axis.block - axis.n) for axis in (rows, columns)), (0, 0), (0, 0)])


def _mask(r: jax.Array, rows: Axis, columns: Axis) -> jax.Array:
    """bool[C, 1, m, n] of a row of blocks, with an axis for the heads."""
    return _both(jnp.asarray(rows.inside)[r][None], jnp.asarray(columns.inside))[0][:, None]


def _queries(x: jax.Array, r: jax.Array, rows: Axis, columns: Axis) -> jax.Array:
    """[B, .., .., H, E] -> [B, C, H, n, E]: the queries of a row of blocks."""
    return _slices(x, r * rows.block, np.arange(columns.blocks) * columns.block, (rows.block, columns.block))


def _keys(x: jax.Array, r: jax.Array, rows: Axis, columns: Axis) -> jax.Array:
    """[B, h, w, H, E] -> [B, C, H, m, E]: the keys of a row of blocks."""
    return _slices(x, jnp.asarray(rows.begin)[r], columns.begin, (rows.length, columns.length))


def _slices(x: jax.Array, row: jax.Array, columns: np.ndarray, sides: tuple[int, int]) -> jax.Array:
    """[B, .., .., H, E] -> [B, C, H, rows columns, E]: slices that begin at a row and at each of C columns."""
    b, _, _, heads, e = x.shape

    def cut(column):
        return jax.lax.dynamic_slice(x, (0, row, column, 0, 0), (b, *sides, heads, e))

    cuts = jax.vmap(cut, out_axes=1)(jnp.asarray(columns))
    return cuts.transpose(0, 1, 4, 2, 3, 5).reshape(b, len(columns), heads, -1, e)


def _put(x: jax.Array, y: jax.Array, r: jax.Array, rows: Axis, columns: Axis) -> jax.Array:
    """Replaces the queries of a row of blocks by y [B, C, H, n, E]."""
    b, _, width, heads, e = x.shape
    y = y.reshape(b, columns.blocks, heads, rows.block, columns.block, e).transpose(0, 3, 1, 4, 2, 5)
    y = y.reshape(b, rows.block, width, heads, e).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, y, r * rows.block, 1)


def _add_keys(x: jax.Array, d: jax.Array, r: jax.Array, rows: Axis, columns: Axis) -> jax.Array:
    """Adds d [B, C, H, m, E] where `_keys` took the keys of a row of blocks. Overlaps are sums of padded arrays, no scatter."""
    b, count, heads, _, e = d.shape
    d = d.reshape(b, count, heads, rows.length, columns.length, e)
    sides = [(int(begin), int(columns.n - columns.length - begin)) for begin in columns.begin]
    parts = [jnp.pad(d[:, c], [(0, 0), (0, 0), (0, 0), side, (0, 0)]) for c, side in enumerate(sides)]
    whole = functools.reduce(jnp.add, parts)
    row = jnp.asarray(rows.begin)[r]
    old = jax.lax.dynamic_slice_in_dim(x, row, rows.length, 1)
    return jax.lax.dynamic_update_slice_in_dim(x, old + whole.transpose(0, 2, 3, 1, 4), row, 1)


def _both(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """bool[R, C, m, n] of a grid of blocks, from bool[R, .., ..] of its rows and bool[C, .., ..] of its columns."""
    (r, a, b), (c, d, e) = rows.shape, columns.shape
    return (rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]).reshape(r, c, a * d, b * e)


def _heads_first(x: jax.Array) -> jax.Array:
    """[B, h, w, H, E] -> [B, H, h, w, E]."""
    return x.transpose(0, 3, 1, 2, 4)


def _heads_last(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 3, 1, 4)


def _blocks(x: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """[B, H, h, w, E] -> [B, H, h / rows, w / columns, rows columns, E] for blocks of sides (rows, columns)."""
    b, heads, h, w, e = x.shape
    rows, columns = sides
    x = x.reshape(b, heads, h // rows, rows, w // columns, columns, e).transpose(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, heads, h // rows, w // columns, rows * columns, e)


def _unblocks(x: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """The inverse of `_blocks`."""
    b, heads, r, c, _, e = x.shape
    rows, columns = sides
    x = x.reshape(b, heads, r, c, rows, columns, e).transpose(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, heads, r * rows, c * columns, e)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T) v with the softmax in float32.

    Scores are [m, n], and the gradient is written out: a CPU needs no transposed copies of the keys, which are most of the bytes.

    Args:
        q: [B, H, R, C, n, E]; k, v: [B, H, R, C, m, E].
        mask: bool[R, C, m, n], at least one key of each query.
    """
    return _product(_weights(q, k, mask).astype(q.dtype), v, -2, -2).astype(q.dtype)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """f32[.., m, n]. The mask is a sum: XLA's CPU compiler fuses it better than a selection."""
    return _product(k, q, -1, -1) + jnp.where(mask, 0.0, -jnp.inf)


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(_scores(q, k, mask), axis=-2)


def _product(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The matrix products of two arrays of blocks over one axis of each, in float32."""
    axes, blocks = ((x_axis % x.ndim,), (y_axis % y.ndim,)), tuple(range(x.ndim - 2))
    return jax.lax.dot_general(x, y, (axes, (blocks, blocks)), preferred_element_type=jnp.float32)


def _gradients(q, k, v, weights, dy):
    """Those of q, k and v in float32."""
    dweights = _product(v, dy, -1, -1)
    dscores = (weights * (dweights - (weights * dweights).sum(-2, keepdims=True))).astype(q.dtype)
    return _product(dscores, k, -2, -2), _product(dscores, q, -1, -2), _product(weights.astype(q.dtype), dy, -1, -2)


def _attend_forward(q, k, v, mask):
    weights = _weights(q, k, mask)
    return _product(weights.astype(q.dtype), v, -2, -2).astype(q.dtype), (q, k, v, weights)


def _attend_backward(residuals, dy):
    q, k, v, weights = residuals
    gradients = zip(_gradients(q, k, v, weights, dy), (q, k, v), strict=True)
    return *(d.astype(x.dtype) for d, x in gradients), None


_attend.defvjp(_attend_forward, _attend_backward)
