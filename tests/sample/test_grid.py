"""Pictures of images side by side, and of clips."""

import numpy as np
import pytest
from PIL import Image

from dit_jax.sample import samples_file
from dit_jax.sample.grid import GAP, write_image_grid


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_images_that_are_not_square_lie_row_by_row(tmp_path):
    """Height and width swapped, rows and columns swapped, an image that is stretched."""
    x = images(5, 32, 64, 3)
    grid = write_image_grid(tmp_path / "x.png", x, columns=2)
    assert grid.shape == (3 * (32 + GAP) + GAP, 2 * (64 + GAP) + GAP, 3)
    np.testing.assert_array_equal(grid[GAP + 36 : GAP + 68, GAP + 68 : GAP + 132], x[3])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), grid)


@pytest.mark.parametrize("columns", [None, 10])
def test_clips_are_rows_of_frames(tmp_path, columns):
    """Frames of two clips in one row; clips from top to bottom in time."""
    clips = images(3, 4, 64, 32, 1)
    grid = write_image_grid(tmp_path / "x.png", clips, columns)
    assert grid.shape == (3 * (64 + GAP) + GAP, 4 * (32 + GAP) + GAP, 1)
    np.testing.assert_array_equal(grid[GAP + 68 : GAP + 132, GAP + 72 : GAP + 104], clips[1, 2])


@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 3, 4, 8, 8, 1), (2, 8, 8, 2), (0, 8, 8, 1)])
def test_other_arrays_are_refused(tmp_path, shape):
    """An array that is reshaped until it fits."""
    with pytest.raises(ValueError, match="a grid needs"):
        write_image_grid(tmp_path / "x.png", images(*shape))


def test_clips_travel_in_an_npz(tmp_path):
    """An npz whose header has another rank than its bytes, or whose hash is of something else."""
    clips, labels = images(3, 4, 8, 12, 3), np.arange(3, dtype=np.int32)
    samples_file.write(tmp_path / "x.npz", clips, labels, {"seed": 1})
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], clips)
    assert samples_file.is_sound(tmp_path / "x.npz", samples_file.made_by_of(tmp_path / "x.npz"))
