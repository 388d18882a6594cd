"""Attention within windows or neighbourhoods of a grid of tokens.

B batch, h x w grid, H heads, E width of a head; n queries and m keys of a block. Queries are scaled by the caller.
"""

import jax
import jax.numpy as jnp
import numpy as np

# (rows, columns) of the blocks of queries that share their keys in `neighborhood_attention`. Smaller ones have fewer masked keys
# and more copies of each key: on a CPU (4, 4) and (4, 8) are as fast forward, and slower with the gradient.
QUERY_BLOCK = (8, 8)


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


def neighborhood_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, size: int, block: tuple[int, int] = QUERY_BLOCK
) -> jax.Array:
    """Attention of each token to the size x size tokens around it; at the border the neighbourhood is moved inside the grid.

    The neighbourhood of token i of an axis of n begins at clip(i - size // 2, 0, n - size). Blocks of queries share a block of
    keys that covers all of their neighbourhoods, and a mask selects those of each query: matrix products in place of a gather.

    Args:
        q, k, v: [B, h, w, H, E]; h and w are at least size.
        size: odd.
        block: (rows, columns) of the blocks of queries; it changes the time, not the result.

    Returns:
        [B, h, w, H, E] in the dtype of q.

    Source: Hassani et al. 2023 (Neighborhood Attention Transformer), equations 1 to 3, and NATTEN at the border.
    """
    _, h, w, _, _ = q.shape
    q, k, v = (_heads_first(x) for x in (q, k, v))
    padded = [(0, 0), (0, 0), (0, -h % block[0]), (0, -w % block[1]), (0, 0)]
    halos = [_halo(n, size, side) for n, side in zip((h, w), block, strict=True)]
    keys, values = (_halo_blocks(_halo_blocks(x, 2, block[0], halos[0]), 4, block[1], halos[1]) for x in (k, v))
    (_, _, r, m, c, l, e) = keys.shape
    keys, values = (x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(*x.shape[:2], r, c, m * l, e) for x in (keys, values))
    mask = _both(*(jnp.asarray(_inside(n, size, side, halo)) for n, side, halo in zip((h, w), block, halos, strict=True)))
    y = _attend(_blocks(jnp.pad(q, padded), block), keys, values, mask)
    return _heads_last(_unblocks(y, block)[:, :, :h, :w])


def _start(i: np.ndarray, n: int, size: int) -> np.ndarray:
    """The first token of the neighbourhood of token i."""
    return np.clip(i - size // 2, 0, n - size)


def _halo(n: int, size: int, block: int) -> tuple[int, int]:
    """Tokens before and behind a block of queries that cover the neighbourhoods of all blocks."""
    i = np.arange(n)
    first, last = i // block * block, i // block * block + block
    start = _start(i, n, size)
    return int((first - start).max()), max(int((start + size - last).max()), 0)


def _inside(n: int, size: int, block: int, halo: tuple[int, int]) -> np.ndarray:
    """bool[blocks, block with its halo, block]: whether a key lies in the neighbourhood of a query."""
    first = np.arange(0, n, block)[:, None, None]
    start = _start(first + np.arange(block)[None, None], n, size)
    key = first + np.arange(-halo[0], block + halo[1])[None, :, None]
    return (start <= key) & (key < start + size)


def _halo_blocks(x: jax.Array, axis: int, block: int, halo: tuple[int, int]) -> jax.Array:
    """Splits an axis [n] into [blocks, halo + block + halo], zeros outside.

    It is made of shifted copies, whose gradient is cheaper than that of a gather.
    """
    n, length = x.shape[axis], halo[0] + block + halo[1]
    count, copies = -(-n // block), -(-length // block)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (halo[0], (count + copies - 1) * block - halo[0] - n)
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    shifted = [jax.lax.slice_in_dim(x, i, i + count, axis=axis) for i in range(copies)]
    return jax.lax.slice_in_dim(jnp.concatenate(shifted, axis + 1), 0, length, axis=axis + 1)


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
    return _product(_weights(q, k, mask).astype(q.dtype), v, 4, 4).astype(q.dtype)


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """f32[B, H, R, C, m, n]."""
    return jax.nn.softmax(jnp.where(mask, _product(k, q, 5, 5), -jnp.inf), axis=4)


def _product(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The matrix products of two arrays of blocks over one axis of each, in float32."""
    blocks = (0, 1, 2, 3)
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), (blocks, blocks)), preferred_element_type=jnp.float32)


def _attend_forward(q, k, v, mask):
    weights = _weights(q, k, mask)
    return _product(weights.astype(q.dtype), v, 4, 4).astype(q.dtype), (q, k, v, weights)


def _attend_backward(residuals, dy):
    q, k, v, weights = residuals
    dweights = _product(v, dy, 5, 5)
    dscores = (weights * (dweights - (weights * dweights).sum(4, keepdims=True))).astype(q.dtype)
    dq, dk, dv = _product(dscores, k, 4, 4), _product(dscores, q, 5, 4), _product(weights.astype(q.dtype), dy, 5, 4)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
