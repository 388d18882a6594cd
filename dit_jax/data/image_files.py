"""Decodes image files with Pillow.

Letters: H, W are the height and width of an image.
"""

import io
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dit_jax.errors import UserError

MODES = {1: "L", 3: "RGB"}
# Accepted formats. Pillow has more readers, one of which runs Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 178_956_970  # Pillow's default limit for an error
# Pillow warns above this number and raises above twice this number; images of up to MAX_PIXELS should not cause warnings.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
UPRIGHT: dict[int | None, Image.Transpose] = {  # the operation that undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_size(image: np.ndarray | bytes | BinaryIO, name: str = "image", upright: bool = False) -> tuple[int, int]:
    """(height, width) of an image; of a file from its header.

    Args:
        upright: as of `decode`.

    Raises:
        UserError: as `decode`.
    """
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    try:
        picture = _opened(image, name)
        turned = upright and picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{name} is not a readable image ({type(error).__name__}: {error}): restore it") from error
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def decode(image: np.ndarray | bytes, channels: int, name: str = "image", upright: bool = False) -> Image.Image:
    """Decodes an image to a Pillow image of mode L (channels 1) or RGB (channels 3).

    The content of a file determines its format, not its name:

    | file | result |
    |---|---|
    | JPEG, PNG, WebP, GIF, BMP, TIFF, PPM under any name | an image |
    | another format, text, no bytes, a truncated file, more than 178,956,970 pixels | UserError |
    | grey | for 3 channels: three equal ones |
    | colour | for 1 channel: the ITU-R 601 luma |
    | transparency, of a channel, a palette or one colour | dropped; the underlying colour is used |
    | palette | looked up |
    | CMYK | (255 - C)(255 - K) / 255 and so on; a JPEG's components are taken as inverted, as Adobe writes them |
    | YCCK JPEG | CMYK, then as above |
    | 16-bit grey v (PNG, TIFF, PPM) | round(v / 257) |
    | 16-bit grey with alpha, 16-bit colour | the high byte |
    | 32-bit grey, floating point | UserError: the range is unknown |
    | animated GIF, WebP, PNG; TIFF with pages | the first image |
    | EXIF orientation | ignored unless `upright`; a TIFF's is always applied |
    | colour profile (ICC), gamma | ignored |

    Except for 16-bit grey, ADM, DiT and torchvision get the same result from Pillow.

    Args:
        image: bytes of an image file, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        channels: 1 or 3.
        name: name of the image in error messages, such as a file name.
        upright: whether to rotate the image according to its EXIF orientation.

    Raises:
        UserError: see the table.
        ValueError: the array has another shape or dtype, or `channels` is neither 1 nor 3.
    """
    if channels not in MODES:
        raise ValueError(f"channels={channels} must be 1 (grey) or 3 (RGB)")
    if isinstance(image, np.ndarray):
        picture = _from_array(image, name)
        return picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])
    try:
        picture = _load(image, name)
        if upright:
            turn = UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation))
            picture = picture if turn is None else picture.transpose(turn)
        return _convert(picture, MODES[channels], name)
    except (UserError, MemoryError):  # lack of memory is not a fault of the file
        raise
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ... for damaged files
        raise UserError(f"{name} is not a readable image ({type(error).__name__}: {error}): restore it") from error


def _load(image: bytes, name: str) -> Image.Image:
    picture = _opened(image, name)
    picture.load()
    return picture


def _opened(image: bytes | BinaryIO, name: str) -> Image.Image:
    """The image with its header read."""
    file = io.BytesIO(image) if isinstance(image, bytes) else image
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        if not (begin := file.read(16)):
            raise UserError(f"{name} is not a readable image (0 bytes): restore it") from None
        raise UserError(
            f"{name} is not a readable image (not one of {', '.join(FORMATS)}; it begins with {begin!r}): "
            "restore it, or save it in one of these formats"
        ) from None
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from None
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_large(name, f"{picture.width} x {picture.height}")
    return picture


def _too_large(name: str, size: str) -> UserError:
    return UserError(f"{name} is too large to decode ({size}; the limit is {MAX_PIXELS:,} pixels): scale it down")


def _convert(picture: Image.Image, mode: str, name: str) -> Image.Image:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        # Pillow's own conversion to 8 bits clips at 255, which gives a white image.
        wide = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit pixels (mode {picture.mode}) of unknown range: save it with 8 or 16 bits per channel")
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # converting directly to RGB gives the same colours, but a warning per image
    return picture if picture.mode == mode else picture.convert(mode)


def _from_array(image: np.ndarray, name: str) -> Image.Image:
    shape = image.shape
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and shape[2] in (1, 3, 4))) or 0 in shape:
        raise ValueError(f"{name} is {image.dtype}{list(shape)}, but an array image must be uint8 [H, W] or [H, W, 1 | 3 | 4]")
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and shape[2] == 1 else image)
