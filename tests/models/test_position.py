"""Position tables of other grids than that of training."""

import numpy as np
import pytest

from dit_jax.models.position import sincos_2d


def test_scaled_positions_against_diffusers():
    """Catches rows and columns that are exchanged on a grid that is not square, or positions that are scaled the wrong way."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    for rows, columns in ((16, 16), (24, 16), (8, 20)):
        expected = embeddings.get_2d_sincos_pos_embed(32, (rows, columns), base_size=16, output_type="pt").numpy()
        np.testing.assert_allclose(sincos_2d(32, rows, columns, (16, 16)), expected, atol=2e-5)


def test_the_trained_grid_is_unchanged():
    """Catches positions that are rounded where nothing is scaled: images at the trained size must keep their bits."""
    np.testing.assert_array_equal(sincos_2d(32, 6, 10, (6, 10)), sincos_2d(32, 6, 10))
    assert sincos_2d(8, 4, 1, (2, 1))[:, 4].tolist() == pytest.approx(np.sin([0, 0.5, 1, 1.5]).tolist())
