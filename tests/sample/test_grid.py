"""Pictures of images side by side, and of clips."""

import numpy as np
import pytest
from PIL import Image

from dit_jax.sample import samples_file
from dit_jax.sample.grid import GAP, GAP_LEVEL, label_names, sampling_caption, write_image_grid


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


def test_names_and_caption(tmp_path):
    """A name at the wrong image, a text over an image, a name that runs into its neighbour."""
    x = np.full((6, 64, 64, 1), 7, np.uint8)
    plain = write_image_grid(tmp_path / "x.png", x, columns=3)
    for names in (["0", "1", "2", "0", "1", "2"], ["0", "1", "2", "3", "a very long name", ""]):
        grid = write_image_grid(tmp_path / "x.png", x, 3, names=names, caption="step 5, guidance 1.5 " * 4)
        assert (grid == 7).sum() == (plain == 7).sum() == 6 * 64 * 64 and grid.shape[1] == plain.shape[1]
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), grid[..., 0])
        rows = np.flatnonzero((grid[..., 0] > 100).any(axis=1))
        images_at = np.flatnonzero((grid[..., 0] == 7).any(axis=1))
        assert rows.min() < images_at.min()
        if len(set(names)) > 3:  # names below their images; the last image has none
            last = grid[images_at.max() + 1 :, :, 0] > 100
            assert last[:, 72:136].any() and not last[:, 136:].any()
        else:
            assert rows.max() < images_at.min()
    with pytest.raises(ValueError, match="5 names for 6 images"):
        write_image_grid(tmp_path / "x.png", x, names=["0"] * 5)


def test_a_caption_wider_than_the_picture_is_wrapped(tmp_path):
    """A caption that is cut at the edge, or a word that never fits."""
    narrow = write_image_grid(tmp_path / "x.png", images(1, 8, 8, 3), caption="step 1500, guidance 1.5 Donaudampfschifffahrt")
    assert narrow.shape[:2] > (64 + 2 * GAP, 0) and narrow.shape[1] == 64 + 2 * GAP
    assert (narrow[:, -GAP:] == GAP_LEVEL).all()


def test_a_clip_has_one_name(tmp_path):
    """A name for every frame."""
    clips = np.full((2, 3, 64, 64, 3), 7, np.uint8)
    grid = write_image_grid(tmp_path / "x.png", clips, names=["a", "b"])
    first = write_image_grid(tmp_path / "y.png", clips[:, :1], names=["a", "b"])
    assert grid.shape == (len(first), 3 * 68 + 4, 3)
    assert not (grid[:, 72:] > 100).any()


def test_class_names_that_are_not_utf_8(tmp_path):
    """A run that ends at its first preview because a class folder's name has the byte e9."""
    names = label_names([0, 1], 2, [b"cl\xe9".decode(errors="surrogateescape"), "clé"])
    assert names == ["cl\\udce9", "clé"]
    write_image_grid(tmp_path / "x.png", np.zeros((2, 8, 8, 1), np.uint8), names=names)


def test_names_of_labels():
    """A number where the class has a name, the name of another class for the null label."""
    assert label_names(np.array([1, 0, 2]), 2, ("cat", "dog")) == ["dog", "cat", "none"]
    assert label_names([1, 3], 3) == ["1", "none"] and label_names([0], 3, ("only one",)) == ["0"]
    assert sampling_caption(5, 1.5, {"name": "ddim", "num_steps": 50}, 3) == "step 5, guidance 1.5, ddim with 50 steps, seed 3"
    assert sampling_caption(None, 1.0, {"name": "dopri5"}, 0) == "guidance 1, dopri5, seed 0"
