"""Fixed sine-cosine position tables.

D width of the embedding, h x w grid of tokens.
"""

import numpy as np


def sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """[sin(p f_0), .., sin(p f_k), cos(p f_0), .., cos(p f_k)] with f_i = 10000^(-i / (width / 2)).

    Args:
        width: even number of columns.
        positions: [M] floats.

    Returns:
        [M, width] float64.

    Source: Vaswani et al. 2017, section 3.5, with sines first as in MAE (He et al. 2021).
    """
    frequencies = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(width: int, rows: int, columns: int, trained: tuple[int, int] | None = None) -> np.ndarray:
    """Position table of a rows x columns grid in row-major order: the first half encodes the column, the second the row.

    Args:
        width: a multiple of 4.
        trained: (rows, columns) to which the positions are scaled: row i of R has the position i / (R / trained rows), so that
            the grid covers the same range, as in diffusers' DiT. None, or the grid itself: whole numbers.

    Returns:
        [rows * columns, width] float32.

    Raises:
        ValueError: width is not a multiple of 4.

    Source: Peebles & Xie 2023, section 3.2, with MAE's order of the two halves.
    """
    if width % 4:
        raise ValueError(f"a 2-d sine-cosine table needs a width that is a multiple of 4, got {width}")
    base_rows, base_columns = trained or (rows, columns)
    y, x = np.meshgrid(np.arange(rows) / (rows / base_rows), np.arange(columns) / (columns / base_columns), indexing="ij")
    halves = [sincos_1d(width // 2, x.reshape(-1)), sincos_1d(width // 2, y.reshape(-1))]
    return np.concatenate(halves, axis=1).astype(np.float32)
