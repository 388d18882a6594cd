"""The pictures of a two-number latent."""

import numpy as np
import pytest
from scipy import stats

from dit_jax.training.latent_plane import PALETTE, grid_coordinates, latent_plane, plane_picture, scatter


def show_latents(points):
    """Images whose left half shows z1 and whose right half shows z2, divided by 4."""
    assert points.dtype == np.float32
    return np.repeat(points[:, None, :, None] / 4, 2, axis=1).astype(np.float32)


def colours_near(picture, colour, tolerance=25):
    """Rows and columns of the pixels of about this colour."""
    return np.nonzero(np.abs(picture.astype(int) - colour).sum(-1) < tolerance)


def test_the_grid_is_normal_quantiles():
    """Equal steps in z instead of in probability."""
    found = grid_coordinates(9, 1.7)
    p = stats.norm.cdf(1.7)
    np.testing.assert_allclose(found, stats.norm.ppf(np.linspace(1 - p, p, 9)), atol=1e-9)
    assert found[0] == pytest.approx(-1.7) and found[4] == pytest.approx(0, abs=1e-9)


def test_z1_goes_right_and_z2_goes_up():
    """A picture transposed or upside down against the scatter beside it."""
    images = latent_plane(show_latents, 5, 2.0)
    assert images.shape == (5, 5, 2, 2, 1) and images.dtype == np.uint8
    z = (images[:, :, 0, :, 0].astype(float) - 128) / 127.5 * 4
    np.testing.assert_allclose(z[0, 0], [-2, 2], atol=0.05)
    np.testing.assert_allclose(z[0, 4], [2, 2], atol=0.05)
    np.testing.assert_allclose(z[4, 0], [-2, -2], atol=0.05)
    np.testing.assert_allclose(z[2, 3], [grid_coordinates(5, 2.0)[3], 0], atol=0.05)


def test_dots_lie_where_the_means_are():
    """A dot mirrored, in another class's colour, or left out because it lies far away."""
    means = np.array([[1.0, 3.0], [-2.0, 0.5]])
    picture = scatter(means, np.array([4, 2]), 6, 400)
    assert picture.dtype == np.uint8 and picture.shape[0] == 400 and 400 < picture.shape[1] < 500
    limit = 3.0 * 1.06
    for mean, label in zip(means, (4, 2), strict=True):
        y, x = (0.5 - mean[1] / limit / 2) * 400, (0.5 + mean[0] / limit / 2) * 400
        rows, columns = colours_near(picture[:, :400], 0.75 * PALETTE[label] + 0.25 * 255)
        assert len(rows) > 4
        assert np.abs(rows + 0.5 - y).max() < 4 and np.abs(columns + 0.5 - x).max() < 4


def test_the_legend_has_every_class():
    """A class without a colour or under another's name: the order from top to bottom is that of the labels."""
    picture = scatter(np.zeros((1, 2)), np.zeros(1, int), 10, 400)[:, 400:420]  # without the names
    heights = [colours_near(picture, colour)[0] for colour in PALETTE]
    assert all(len(rows) > 10 for rows in heights)
    assert np.all(np.diff([rows.mean() for rows in heights]) > 10)


def test_names_widen_the_legend():
    """A long class name cut off."""
    narrow, wide = (scatter(np.zeros((1, 2)), np.zeros(1, int), 1, 400, names=[name]) for name in ("a", "golden retriever"))
    assert wide.shape[1] > narrow.shape[1] + 50
    assert (wide[:, -3:] == 255).all()


def test_crowds_are_darker_than_single_dots_and_the_order_is_fixed():
    """Opaque dots that hide how many there are, or a picture that changes from call to call."""
    rng = np.random.default_rng(0)
    means = np.concatenate([np.zeros((200, 2)), [[2.0, 2.0]], rng.normal(size=(300, 2))])
    labels = np.concatenate([np.zeros(201, int), rng.integers(0, 10, 300)])
    np.testing.assert_array_equal(scatter(means, labels, 10, 300), scatter(means, labels, 10, 300))
    crowd = scatter(np.array([[1.0, 1.0]] * 9 + [[-1.0, 1.0]]), np.zeros(10, int), 1, 400)
    place = round(400 * (0.5 - 1 / 2.12))
    lone, many = crowd[place, place], crowd[place, 399 - place]
    assert (many.astype(int) <= lone).all() and many.sum() < lone.sum() - 60


def test_both_pictures_side_by_side():
    """Decoded images of another part of the plane than the square drawn in the scatter, or one picture over the other."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(50, 2))
    picture = plane_picture(show_latents, means, rng.integers(0, 10, 50), 10, side=4, extent=1.5, size=320)
    right = scatter(means, rng.integers(0, 10, 50), 10, 320, 1.5)
    margin = round(320 * 0.07)
    assert picture.shape == (320 + 2 * margin, 2 * margin + 320 + right.shape[1], 3)
    expected = latent_plane(show_latents, 4, 1.5)
    for row in range(4):
        for column in range(4):
            y, x = margin + row * 80 + 20, margin + column * 80 + 20
            assert (picture[y, x] == expected[row, column, 0, 0, 0]).all()
            assert (picture[y, x + 40] == expected[row, column, 0, 1, 0]).all()
    assert (picture[margin : margin + 320, margin + 320 : 2 * margin + 320] == 255).all()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"means": np.zeros((0, 2))}, "N >= 1"),
        ({"means": np.zeros((3, 3))}, "N >= 1"),
        ({"means": np.full((3, 2), np.nan)}, "finite"),
        ({"labels": np.zeros(2, int)}, "one integer for each"),
        ({"labels": np.zeros(3)}, "one integer for each"),
        ({"labels": np.array([0, 1, 10])}, "do not lie"),
        ({"num_classes": 11}, "distinct colours"),
        ({"num_classes": 0}, "distinct colours"),
        ({"size": 50}, "200"),
        ({"names": ["a"]}, "1 names for 10"),
    ],
)
def test_bad_points(changes, text):
    """Two classes of one colour, a NaN drawn in a corner, or a picture too small to read."""
    arguments = {"means": np.zeros((3, 2)), "labels": np.zeros(3, int), "num_classes": 10, "size": 300} | changes
    with pytest.raises(ValueError, match=text):
        scatter(**arguments)


@pytest.mark.parametrize(
    "decode, side, extent, text",
    [
        (show_latents, 1, 2.0, "side is 1"),
        (show_latents, 4, 0.0, "extent 0"),
        (show_latents, 4, 9.0, "extent 9"),
        (lambda z: np.zeros((3, 2, 2, 1)), 4, 2.0, "for 16 latents"),
        (lambda z: np.zeros((16, 2, 2, 1), np.uint8), 4, 2.0, "must return floats"),
        (lambda z: np.full((16, 2, 2, 1), np.nan), 4, 2.0, "NaN"),
    ],
)
def test_bad_planes(decode, side, extent, text):
    """uint8 scaled a second time, or NaN drawn as black."""
    with pytest.raises(ValueError, match=text):
        latent_plane(decode, side, extent)
