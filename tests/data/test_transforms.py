"""Transforms: the paper's crop byte for byte, and every pixel format a photo folder holds."""

import io
import json
import struct
import warnings
import zlib

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


def png(pixels: np.ndarray, color_type: int) -> bytes:
    """A PNG of big-endian 16-bit pixels [H, W, C], which Pillow reads and does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def whole_crop(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The published recipe with nothing left out: every image is scaled whole and cut at the end."""
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    factor = max(height / image.height, width / image.width)
    pixels = np.array(image.resize(tuple(round(side * factor) for side in image.size), Image.Resampling.BICUBIC))
    y, x = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[y : y + height, x : x + width]


def cubic_matrix(old: int, new: int) -> np.ndarray:
    """[new, old] weights of antialiased cubic convolution, a = -1/2 (Keys 1981), the support stretched to shrink."""
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    x = np.abs((np.arange(old) + 0.5)[None] - centre[:, None]) / stretch
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weight = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return weight / weight.sum(1, keepdims=True)


def restated_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The recipe in float64 NumPy: mean of 2x2 while both sides are at least twice those of size, bicubic, centre cut.

    For sides that stay even while they are halved.
    """
    x = pixels.astype(np.float64)
    while x.shape[0] >= 2 * size[0] and x.shape[1] >= 2 * size[1]:
        x = np.floor((x[:, 0::2] + x[:, 1::2]) / 2 + 0.5)  # 8 bits between the two passes, as in Pillow
        x = np.floor((x[0::2] + x[1::2]) / 2 + 0.5)
    scale = max(size[0] / x.shape[0], size[1] / x.shape[1])
    height, width = (round(side * scale) for side in x.shape[:2])
    x = np.clip(np.floor(np.einsum("Ww,hwc->hWc", cubic_matrix(x.shape[1], width), x) + 0.5), 0, 255)
    x = np.clip(np.floor(np.einsum("Hh,hwc->Hwc", cubic_matrix(x.shape[0], height), x) + 0.5), 0, 255)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return x[top : top + size[0], left : left + size[1]]


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
        (64, 96, (32, 48)),
        (130, 100, (16, 40)),
        (100, 130, (40, 16)),
        (128, 200, (32, 50)),
        (20, 31, (24, 64)),
    ],
)
def test_center_crop_follows_the_recipe(height, width, size):
    """Catches one halving too many or too few, another filter, a crop off by a pixel, height and width swapped."""
    pixels, size = smooth(height, width), (size, size) if isinstance(size, int) else size
    result = np.asarray(center_crop(Image.fromarray(pixels), size))
    assert result.shape == (*size, 3)
    # Pillow's fixed-point weights differ from float64 by at most one level, and that rarely.
    difference = np.abs(result.astype(np.int32) - restated_crop(pixels, size))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_center_crop_equals_the_whole_recipe():
    """Catches a shortcut that changes bytes: odd sides, tiny ones, elongated ones either way, grey and colour."""
    rng = np.random.default_rng(0)
    sides = [(1, 1), (1, 2), (1, 70), (70, 1), (2, 97), (171, 5), (3, 100), (100, 3), (33, 1), (1000, 30), (31, 1000), (64, 63)]
    for width, height in [*sides, *rng.integers(1, 150, (30, 2)).tolist()]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for size in (1, 7, 16, 41):
            for picture in (image, image.convert("L")):
                what = f"{picture.mode} {width} x {height} to {size}"
                np.testing.assert_array_equal(
                    np.asarray(center_crop(picture, (size, size))), whole_crop(picture, size, size), what
                )
    for sides in ((20_000, 3), (3, 20_000), (20_000, 100), (100, 20_000)):
        image = Image.fromarray(rng.integers(0, 256, sides[::-1], np.uint8))
        np.testing.assert_array_equal(np.asarray(center_crop(image, (12, 12))), whole_crop(image, 12, 12), f"{sides}")


def test_center_crop_to_other_shapes_equals_the_whole_recipe():
    """Catches height and width swapped, an image that does not cover the target, and the shortcut along the wrong axis."""
    rng = np.random.default_rng(1)
    sides = [(1, 1), (1, 70), (70, 1), (97, 2), (171, 5), (3, 100), (1000, 30), (31, 1000), (2, 64), (500, 2), (2, 500)]
    for width, height in [*sides, *rng.integers(1, 150, (30, 2)).tolist()]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for size in ((1, 7), (16, 5), (12, 41), (64, 2), (3, 200)):
            what = f"{width} x {height} to {size}"
            result = np.asarray(center_crop(image, size))
            assert result.shape == (*size, 3), what
            np.testing.assert_array_equal(result, whole_crop(image, *size), what)


def test_elongated_images_stay_small_in_memory(monkeypatch):
    """Catches 20,000 x 3 pixels enlarged whole to 3,413,333 x 512: 7 GB for each thread."""
    areas, resize = [], Image.Image.resize

    def measured(image, size, *args):
        areas.append(size[0] * size[1])
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, "resize", measured)
    for sides in ((20_000, 3), (3, 20_000), (1, 6_000_000), (6_000_000, 1)):
        assert center_crop(Image.new("L", sides, 9), (512, 512)).getextrema() == (9, 9)
    assert max(areas) <= 512 * 512
    for sides, size in (((20_000, 3), (512, 64)), ((3, 20_000), (64, 512)), ((40, 40), (2, 4096)), ((40, 40), (4096, 2))):
        assert center_crop(Image.new("L", sides, 9), size).getextrema() == (9, 9)
    assert max(areas) <= 512 * 512


def test_crop_margin_and_threshold():
    """Catches an uneven margin cut on the wrong side, and a bicubic step instead of box halving at exactly 2 size."""
    ramp = np.tile(np.arange(7, dtype=np.uint8) * 30, (4, 1))
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(ramp), (4, 4))), ramp[:, 1:5])
    checks = np.kron(np.eye(4, dtype=np.uint8), np.array([[0, 200], [100, 100]], np.uint8))
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(checks), (4, 4))), 100 * np.eye(4, dtype=np.uint8))


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


def test_size_wins_over_resolution():
    """Catches a size that is ignored, or taken width first, and a description that changes for squares."""
    transform = ImageTransform(8, 3, False, size=[16, 24])  # a list, as a config that was read from JSON has it
    pixels = smooth(30, 40)
    example = transform({"image": file(Image.fromarray(pixels), "PNG"), "label": 0})
    assert example["image"].shape == transform.shape == (16, 24, 3)
    np.testing.assert_array_equal(example["image"], whole_crop(Image.fromarray(pixels), 16, 24))
    square = {"resolution": 8, "channels": 3, "upright": False, "crop": "adm_center"}
    assert json.dumps(ImageTransform(8, 3, False).describe()) == json.dumps(square)
    assert ImageTransform(16, 3, False, size=(8, 8)).describe() == square
    assert transform.describe() == square | {"resolution": None, "size": [16, 24]}
    for size in ((8,), (8, 0), (8, 8, 3), (8.5, 8)):
        with pytest.raises(UserError, match=r"transform\.size=.* must be \(height, width\)"):
            ImageTransform(8, 3, False, size=size)


def test_clips_are_cropped_and_mirrored_frame_by_frame():
    """Catches a clip mirrored upside down or in time, frames mirrored one by one, and a clip taken for an image."""
    clip = np.stack([smooth(12, 20, seed) for seed in range(5)])
    still, flipped = ImageTransform(8, 3, False), ImageTransform(8, 3, True)
    frames = np.stack([still({"image": frame, "label": 0})["image"] for frame in clip])
    seen = set()
    for seed in range(20):
        found = flipped.random_map({"image": clip, "label": 2}, np.random.default_rng(seed))
        mirrored = np.array_equal(found["image"], frames[:, :, ::-1])
        assert found["image"].shape == (5, 8, 8, 3) and (mirrored or np.array_equal(found["image"], frames))
        seen.add(mirrored)
    assert seen == {True, False}


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


def test_sixteen_bit_files():
    """Catches 16-bit TIFF and PPM read as white, and 16-bit colour or grey with alpha that loses the wrong byte."""
    wide = np.array([[0, 128, 129, 257], [1000, 30000, 65407, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1], [4, 117, 255, 255]], np.uint8)
    pgm = b"P5 4 2 65535\n" + wide.astype(">u2").tobytes()
    for grey in (file(Image.fromarray(wide), "TIFF"), file(Image.fromarray(wide), "TIFF", compression="tiff_lzw"), pgm):
        np.testing.assert_array_equal(np.asarray(decode(grey, 1)), expected)
    colour = np.random.default_rng(0).integers(0, 65536, (5, 6, 4)).astype(np.uint16)
    np.testing.assert_array_equal(np.asarray(decode(png(colour[:, :, :3], 2), 3)), colour[:, :, :3] >> 8)
    np.testing.assert_array_equal(np.asarray(decode(png(colour, 6), 3)), colour[:, :, :3] >> 8)
    np.testing.assert_array_equal(np.asarray(decode(png(colour[:, :, :2], 4), 1)), colour[:, :, 0] >> 8)


def test_cmyk_jpegs():
    """Catches CMYK shown as its negative, and YCCK taken for CMYK, with and without the marker that Adobe writes."""
    cmyk = file(Image.new("CMYK", (16, 16), (100, 120, 140, 40)), "JPEG", quality=100)
    expected = [(255 - c) * (255 - 40) / 255 for c in (100, 120, 140)]
    adobe = cmyk.index(b"\xff\xee\x00\x0eAdobe")
    for data in (cmyk, cmyk[:adobe] + cmyk[adobe + 16 :]):
        np.testing.assert_allclose(np.asarray(decode(data, 3))[0, 0], expected, atol=3)
    # What the file holds is inverted: 155, 135, 115 and 215. Called YCCK, the first three are the Y, Cb, Cr of (C, M, Y).
    y, cb, cr = 155, 135 - 128, 115 - 128
    cmy = np.array([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])
    ycck = cmyk[: adobe + 15] + b"\x02" + cmyk[adobe + 16 :]
    np.testing.assert_allclose(np.asarray(decode(ycck, 3))[0, 0], (255 - cmy) * 215 / 255, atol=3)


def test_animations_show_their_first_picture():
    """Catches a later frame, a blend of frames, and a reader that refuses animations."""
    frames = [Image.new("RGB", (12, 10), color) for color in ((200, 30, 40), (0, 200, 0), (0, 0, 200))]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("PNG", {"default_image": True}), ("TIFF", {})):
        data = file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames >= 2
        picture = decode(data, 3)
        assert picture.size == (12, 10) and np.asarray(picture).tolist() == np.full((10, 12, 3), (200, 30, 40)).tolist(), kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """Catches an orientation applied where the paper's code does not, ignored where asked for, or turned the wrong way."""
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20], upright[:12, 20:], upright[12:, :20] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # Stored pixel [row, column] for the seen one, by the standard: where row 0 and column 0 of what is stored are seen.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0}), ("WEBP", {"lossless": True})):
        data = file(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
        tolerance = 40 if kind == "JPEG" else 0
        np.testing.assert_allclose(np.asarray(decode(data, 3), int), stored, atol=tolerance)
        cropped = ImageTransform(24, 3, False, upright=True)({"image": data, "label": 0})["image"]
        np.testing.assert_allclose(cropped.astype(int), upright[:, 8:32], atol=tolerance)


def test_name_does_not_decide():
    """Catches a reader chosen by suffix: a PNG named .jpg is an image like any other."""
    picture = smooth(16, 16)
    example = {"image": file(Image.fromarray(picture), "PNG"), "label": 0, "name": "cats/7.jpg"}
    np.testing.assert_array_equal(ImageTransform(16, 3, False)(example)["image"], picture)


def test_pixel_limit():
    """Catches a warning for an image within the limit, and a decompression bomb decoded before it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(file(Image.new("1", (9500, 9500), 1), "PNG"), 1).getpixel((0, 0)) == 255  # above half of the limit
    for side in (13_400, 20_000):  # above the limit and, where Pillow itself refuses, above its double
        bomb = png(np.zeros((1, 1, 1)), 0)
        bomb = bomb[:16] + struct.pack(">II", side, side) + bomb[24:]
        bomb = bomb[:29] + struct.pack(">I", zlib.crc32(bomb[12:29])) + bomb[33:]
        with pytest.raises(UserError, match=r"cats/7\.jpg is too large.*178,956,970"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode(bomb, 3, "cats/7.jpg")


DAMAGED = {
    "empty": b"",
    "text": b"<html>404</html>",
    "page description": file(Image.new("RGB", (9, 9)), "EPS"),
    "rare format": file(Image.new("RGB", (9, 9)), "PCX"),
    "32 bit": file(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    **{
        f"truncated {kind}": (data := file(Image.fromarray(smooth(40, 40)), kind))[: len(data) // 2]
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    },
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_bad_bytes_name_the_file(damage):
    """Catches Pillow's own errors without a file name, half-grey JPEGs, float images cut to 8 bits, and readers not asked for."""
    with pytest.raises(UserError, match=r"cats/7\.jpg .*(restore it|save it)") as caught:
        ImageTransform(8, 3, False)({"image": DAMAGED[damage], "label": 0, "name": "cats/7.jpg"})
    assert " at 0x" not in str(caught.value)


def test_bad_arguments():
    """Catches float or channels-first arrays read as pixels, and sizes no image has."""
    for array in (np.zeros((8, 8, 3)), np.zeros((3, 8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="must be uint8"):
            decode(array, 3)
    with pytest.raises(ValueError, match="channels=4"):
        ImageTransform(8, 4, False)
    with pytest.raises(ValueError, match="resolution=0"):
        ImageTransform(0, 3, False)
