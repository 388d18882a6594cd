"""Resizes of the metrics beside Pillow and beside TensorFlow's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_jax.errors import UserError
from dit_jax.evaluate.extractors import check_shape, load
from dit_jax.metrics.resize import area_average, bicubic_pillow, bilinear_tensorflow, to_rgb


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (1, height, width, channels), np.uint8)


@pytest.mark.parametrize("height, width", [(64, 50), (331, 217), (1, 1), (299, 40)])
def test_bilinear_is_tensorflows(height, width):
    """Half pixels centred, corners aligned, antialiasing, or height and width exchanged."""
    x = noise(height, width)
    found = np.asarray(jax.jit(lambda x: bilinear_tensorflow(x, 299))(x))[0]
    for i, j in [(0, 0), (298, 298), (7, 290), (150, 149), (297, 1)]:
        row, column = i * height / 299, j * width / 299
        top, left = int(row), int(column)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        corners = x[0].astype(np.float64)
        upper = corners[top, left] + (corners[top, right] - corners[top, left]) * (column - left)
        lower = corners[bottom, left] + (corners[bottom, right] - corners[bottom, left]) * (column - left)
        # A place is a float32 in TensorFlow: a part in 10^5 of a pixel off.
        np.testing.assert_allclose(found[i, j], upper + (lower - upper) * (row - top), atol=0.02)


def test_an_image_of_the_right_size_stays_as_it_is():
    """A resize that blurs what needs none."""
    x = noise(299, 299)
    np.testing.assert_array_equal(bilinear_tensorflow(x, 299), x.astype(np.float32))
    np.testing.assert_array_equal(bicubic_pillow(x, 299), x)


@pytest.mark.parametrize("height, width", [(256, 256), (32, 32), (300, 1000), (500, 120), (224, 300), (3, 2)])
def test_bicubic_is_pillows_to_the_last_bit(height, width):
    """Another rounding of coefficients or between the passes, another order of them, no antialiasing."""
    x = noise(height, width)
    # In two calls, because Pillow 13 turns the order round for upright images.
    wanted = Image.fromarray(x[0]).resize((224, height), Image.BICUBIC).resize((224, 224), Image.BICUBIC)
    found = jax.jit(lambda x: bicubic_pillow(x, 224))(x)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], np.asarray(wanted))


def test_sums_that_float32_would_round_are_refused():
    """Many pixels per result, added up inexactly without a word."""
    with pytest.raises(ValueError, match=r"side of 512.*below 512"):
        bicubic_pillow(noise(8, 512), 8)
    x = noise(8, 511)
    wanted = Image.fromarray(x[0]).resize((8, 8), Image.BICUBIC)
    np.testing.assert_array_equal(bicubic_pillow(x, 8)[0], np.asarray(wanted))


def test_grey_is_repeated_and_the_rest_refused():
    """Floats taken for bytes, or channels-first images for wide ones."""
    x = noise(4, 5, 1)
    np.testing.assert_array_equal(to_rgb(x), np.repeat(x, 3, axis=-1))
    for wrong in (x.astype(np.float32), x[0], np.zeros((1, 3, 4, 4), np.uint8), np.zeros((2, 0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            to_rgb(wrong)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (24, 9), (8, 8), (37, 50)])
def test_area_average_against_pillow_and_means(height, width):
    """Catches cells that are shifted, unequal, or not divided by their area; and an average that is a sample."""
    images = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    found = np.asarray(area_average(jnp.asarray(images), 8))
    fine = np.repeat(np.repeat(images.astype(np.float64), 8, 1), 8, 2)  # pixels cut into 8 x 8 equal parts
    exact = fine.reshape(3, 8, height, 8, width, 3).mean((2, 4))
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    with pytest.raises(ValueError, match="a side of 7 pixels"):
        area_average(jnp.zeros((1, 7, 9, 1)), 8)


def test_small_pixels_are_means_in_the_range_of_pixels():
    """Catches features in 0 to 255, a wrong width, and images that are too small for the grid."""
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    features = np.asarray(load("pixels8").extractor({}, jnp.asarray(images))["features"])
    exact = images.reshape(2, 8, 2, 8, 3, 3).mean((2, 4)) / 127.5 - 1
    np.testing.assert_allclose(features, exact.reshape(2, 192), atol=1e-5)
    check_shape("pixels8", (64, 64, 3))
    with pytest.raises(UserError, match="use 'pixels'"):
        check_shape("pixels8", (64, 7, 3))
