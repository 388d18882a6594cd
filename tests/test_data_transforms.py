"""Transforms: the paper's crop byte for byte, and every pixel format a photo folder holds."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.transforms import ImageTransform, center_crop, decode
from dit_jax.errors import UserError


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A uint8 [height, width, 3] picture with structure at several scales."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    big = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR), np.int32)
    noise = np.random.default_rng(seed + 1).integers(-20, 21, (height, width, 3))
    return np.clip(big + noise, 0, 255).astype(np.uint8)


def file(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cubic_matrix(old: int, new: int) -> np.ndarray:
    """[new, old] weights of antialiased cubic convolution, a = -1/2 (Keys 1981), the support stretched to shrink."""
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    x = np.abs((np.arange(old) + 0.5)[None] - centre[:, None]) / stretch
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weight = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return weight / weight.sum(1, keepdims=True)


def restated_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The recipe in float64 NumPy: mean of 2x2 while the short side is at least 2 size, bicubic, centre cut.

    For sides that stay even while they are halved.
    """
    x = pixels.astype(np.float64)
    while min(x.shape[:2]) >= 2 * size:
        x = np.floor((x[:, 0::2] + x[:, 1::2]) / 2 + 0.5)  # 8 bits between the two passes, as in Pillow
        x = np.floor((x[0::2] + x[1::2]) / 2 + 0.5)
    height, width = (round(s * size / min(x.shape[:2])) for s in x.shape[:2])
    x = np.clip(np.floor(np.einsum("Ww,hwc->hWc", cubic_matrix(x.shape[1], width), x) + 0.5), 0, 255)
    x = np.clip(np.floor(np.einsum("Hh,hwc->Hwc", cubic_matrix(x.shape[0], height), x) + 0.5), 0, 255)
    top, left = (height - size) // 2, (width - size) // 2
    return x[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (32, 32, 32),
        (40, 61, 32),
        (64, 96, 32),
        (128, 200, 32),
        (150, 100, 32),
        (20, 31, 32),
        (63, 63, 32),
        (68, 64, 16),
    ],
)
def test_center_crop_follows_the_recipe(height, width, size):
    """Catches one halving too many or too few, another filter, a crop off by a pixel, height and width swapped."""
    pixels = smooth(height, width)
    result = np.asarray(center_crop(Image.fromarray(pixels), size))
    assert result.shape == (size, size, 3)
    # Pillow's fixed-point weights differ from float64 by at most one level, and that rarely.
    difference = np.abs(result.astype(np.int32) - restated_crop(pixels, size))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_crop_margin_and_threshold():
    """Catches an uneven margin cut on the wrong side, and a bicubic step instead of box halving at exactly 2 size."""
    ramp = np.tile(np.arange(7, dtype=np.uint8) * 30, (4, 1))
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(ramp), 4)), ramp[:, 1:5])
    checks = np.kron(np.eye(4, dtype=np.uint8), np.array([[0, 200], [100, 100]], np.uint8))
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(checks), 4)), 100 * np.eye(4, dtype=np.uint8))


def test_exact_size_is_untouched():
    """Catches a resampling of images that already have the resolution asked for."""
    pixels = smooth(16, 16)
    transform = ImageTransform(16, 3, False)
    for image in (pixels, file(Image.fromarray(pixels), "PNG")):
        np.testing.assert_array_equal(transform({"image": image, "label": 3})["image"], pixels)


def test_transform_output():
    """Catches wrong dtypes and a lost channel axis for grey images."""
    example = ImageTransform(8, 1, False)({"image": np.full((20, 30), 7, np.uint8), "label": 4})
    assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8
    assert example["label"] == 4 and example["label"].dtype == np.int32


def test_flip_follows_the_generator():
    """Catches a flip that is constant, upside down, lopsided, or drawn from anything but the generator handed over."""
    pixels = smooth(8, 8)
    transform = ImageTransform(8, 3, True)
    flipped = 0
    for seed in range(200):
        first, again = (
            transform.random_map({"image": pixels, "label": 0}, np.random.default_rng(seed))["image"] for _ in range(2)
        )
        np.testing.assert_array_equal(first, again)
        mirrored = np.array_equal(first, pixels[:, ::-1])
        assert mirrored or np.array_equal(first, pixels)
        flipped += mirrored
    assert 70 < flipped < 130  # 100 +- 4 sigma
    still = ImageTransform(8, 3, False)
    assert all(
        np.array_equal(still.random_map({"image": pixels, "label": 0}, np.random.default_rng(s))["image"], pixels)
        for s in range(8)
    )
    np.testing.assert_array_equal(transform({"image": pixels, "label": 0})["image"], pixels)


def test_sixteen_bit_grey_is_scaled():
    """Catches Pillow's own conversion, which clips everything above 255 to white."""
    wide = np.array([[0, 128, 129, 257], [1000, 30000, 65407, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1], [4, 117, 255, 255]], np.uint8)
    for channels in (1, 3):
        picture = np.asarray(decode(file(Image.fromarray(wide), "PNG"), channels)).reshape(2, 4, channels)
        np.testing.assert_array_equal(picture, np.repeat(expected[:, :, None], channels, 2))


def test_formats_become_rgb():
    """Catches palettes read as numbers, inverted CMYK, alpha left as a fourth channel, and a warning per image."""
    red = Image.new("RGB", (4, 4), (200, 30, 40))
    palette = red.quantize(4)
    transparent = file(palette, "PNG", transparency=b"\x80" * 4)
    alpha = Image.new("RGBA", (4, 4), (200, 30, 40, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = [
            file(palette, "PNG"),
            transparent,
            file(alpha, "PNG"),
            file(red.convert("CMYK"), "JPEG", quality=100),
            np.array(alpha),
        ]
        for image in files:
            picture = decode(image, 3)
            assert picture.mode == "RGB"
            np.testing.assert_allclose(np.asarray(picture)[0, 0], (200, 30, 40), atol=3)
    assert decode(file(red, "PNG"), 1).getpixel((0, 0)) == red.convert("L").getpixel((0, 0))
    grey = decode(file(Image.new("LA", (4, 4), (90, 10)), "PNG"), 3)
    assert grey.getpixel((1, 1)) == (90, 90, 90)
    assert decode(file(Image.new("1", (4, 4), 1), "PNG"), 1).getpixel((0, 0)) == 255


@pytest.mark.parametrize("damage", ["empty", "text", "truncated jpeg", "truncated png", "32 bit"])
def test_bad_bytes_name_the_file(damage):
    """Catches Pillow's own errors without a file name, half-grey truncated JPEGs, and float images cut to 8 bits."""
    picture = Image.fromarray(smooth(40, 40))
    jpeg, png = file(picture, "JPEG"), file(picture, "PNG")
    image = {
        "empty": b"",
        "text": b"<html>404</html>",
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "truncated png": png[: len(png) // 2],
        "32 bit": file(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    }[damage]
    with pytest.raises(UserError, match=r"cats/7\.jpg .*(restore it|save it)"):
        ImageTransform(8, 3, False)({"image": image, "label": 0, "name": "cats/7.jpg"})


def test_bad_arguments():
    """Catches float or channels-first arrays read as pixels, and sizes no image has."""
    for array in (np.zeros((8, 8, 3)), np.zeros((3, 8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="must be uint8"):
            decode(array, 3)
    with pytest.raises(ValueError, match="channels=4"):
        ImageTransform(8, 4, False)
    with pytest.raises(ValueError, match="resolution=0"):
        ImageTransform(0, 3, False)
