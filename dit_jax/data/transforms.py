"""Decodes and crops stored images to uint8 arrays of a fixed size for training.

Letters: H, W, C are the height, width and channels of an image, F the frames of a clip.
"""

import dataclasses
import io
from typing import Any, BinaryIO

import grain
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dit_jax.data.sources.source import Example
from dit_jax.errors import UserError

MODES = {1: "L", 3: "RGB"}
# Accepted formats. Pillow has more readers, one of which runs Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 178_956_970  # Pillow's default limit for an error
# Pillow warns above this number and raises above twice this number; images of up to MAX_PIXELS should not cause warnings.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
ELONGATED = 32  # from this ratio of the sides on, only the kept part of the long side is enlarged
UPRIGHT: dict[int | None, Image.Transpose] = {  # the operation that undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def center_crop(image: Image.Image, size: tuple[int, int], at: tuple[float, float] | None = None) -> Image.Image:
    """Scales the image to cover `size` and crops its centre.

    Halves the image with a box filter while both sides are at least twice those of `size`, resizes it with a bicubic filter so
    that one side fits and the other covers, and crops. The extra pixel of an odd margin is on the right and bottom. An image of
    that size is returned unchanged. The result of a square equals that of the published code bit for bit with the same Pillow.
    Pillow 13 filters some portrait images along y first, which changed 1 of 400 photographs at 64 px, by a level or two in some
    pixels.

    Args:
        image: mode L or RGB, sides from 1.
        size: (height, width), at least 1.
        at: (y, x) in [0, 1), which crop is taken of the possible ones, evenly; None for the centre.
    Source: Dhariwal & Nichol 2021, their published code (image_datasets.py), and by it Peebles & Xie 2023.
    Deviation: they crop to squares only; other shapes follow the same steps.
    """
    target_height, target_width = size
    while image.width >= 2 * target_width and image.height >= 2 * target_height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(target_width / image.width, target_height / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - target_width) // 2, (height - target_height) // 2
    if at is not None:
        top, left = int(at[0] * (height - target_height + 1)), int(at[1] * (width - target_width + 1))
    # The sides of the scaled image over those of `size`: the larger is how many times what is kept would be made.
    across, down = image.width * target_height, image.height * target_width
    if scale > 1 and max(across, down) > ELONGATED * min(across, down):
        return _enlarge_elongated(image, size, width if across > down else height, max(left, top))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + target_width, top + target_height))


def _enlarge_elongated(image: Image.Image, size: tuple[int, int], scaled: int, first: int) -> Image.Image:
    """Computes only the kept pixels of an image enlarged so that one side fits and the long one has `scaled` pixels.

    Pillow enlarges along x first, then along y, and rounds to 8 bits in between. It takes the border of a window in
    single precision only, so the pass along the long side is restated here with its arithmetic: bicubic weights
    (a = -1/2) over the pixels within 2 of the centre, divided by their sum, in units of 2**-22.

    Args:
        size: (height, width).
        first: pixel of the long side that becomes pixel 0.
    """
    height, width = size
    wide = image.width * height > image.height * width
    length, kept = (image.width, width) if wide else (image.height, height)
    centre = (np.arange(first, first + kept) + 0.5) * (length / scaled)
    low = np.maximum((centre - 2 + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + 2 + 0.5).astype(np.int64), length)
    start, stop = int(low[0]), int(high[-1])
    taps = low[:, None] + np.arange(5)
    x = np.abs(taps - centre[:, None] + 0.5)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5)
    weights = np.where((x < 2) & (taps < high[:, None]), weights, 0)
    weights /= weights.sum(1, keepdims=True)
    weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
    if wide:
        part = np.asarray(image.crop((start, 0, stop, image.height))).swapaxes(0, 1)
    else:
        part = np.asarray(image.crop((0, start, image.width, stop)).resize((width, stop - start), Image.Resampling.BICUBIC))
    taps = np.minimum(taps, stop - 1) - start
    total = sum(np.expand_dims(weights[:, k], tuple(range(1, part.ndim))) * part[taps[:, k]] for k in range(5))
    pixels = np.clip((total + 2**21) >> 22, 0, 255).astype(np.uint8)
    if wide:
        return Image.fromarray(pixels.swapaxes(0, 1)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(pixels)


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


@dataclasses.dataclass(frozen=True)
class ImageTransform(grain.transforms.RandomMap):
    """Example -> {"image": uint8 [H, W, C], "label": int32}: decodes, crops the centre, and mirrors half of the images.

    A clip, uint8 [F, h, w, C], becomes uint8 [F, H, W, C]: all frames are cropped and mirrored in the same way.

    Args:
        resolution: side of a square in pixels, at least 1.
        channels: C, 1 or 3.
        flip: mirror left-right with probability 1/2 in `random_map`; false for data where left and right differ, such
            as digits.
        upright: turn photographs as their EXIF orientation asks before the crop. False is what the paper's code does.
        size: (H, W), which takes precedence over the resolution; None means a square.

    Raises:
        UserError: resolution, channels or size out of range.
    """

    resolution: int
    channels: int
    flip: bool
    upright: bool = False
    size: tuple[int, int] | None = None

    def __post_init__(self):
        if self.resolution < 1:
            raise UserError(f"transform.resolution={self.resolution} must be at least 1")
        if self.channels not in MODES:
            raise UserError(f"transform.channels={self.channels} must be 1 (grey) or 3 (RGB)")
        if self.size is not None:
            size = tuple(self.size)  # a config that was read from JSON gives a list
            if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
                raise UserError(
                    f"transform.size={size} must be (height, width), both at least 1 pixel, as in --config.transform.size=256,384"
                )
            object.__setattr__(self, "size", size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the resulting images."""
        return *(self.size or (self.resolution, self.resolution)), self.channels

    def describe(self) -> dict:
        """The settings that determine the pixels, except for random flips, as JSON; "size" only if not square."""
        height, width, channels = self.shape
        size = {"resolution": height} if height == width else {"resolution": None, "size": [height, width]}
        return {**size, "channels": channels, "upright": self.upright, "crop": "adm_center"}

    def __call__(self, example: Example) -> dict[str, Any]:
        """The deterministic part: decodes and crops, never mirrors."""
        image, name = example["image"], example.get("name", "image")
        if isinstance(image, np.ndarray) and image.ndim == 4:
            pixels = np.stack([self._pixels(frame, name) for frame in image])
        else:
            pixels = self._pixels(image, name)
        return {"image": pixels, "label": np.int32(example["label"])}

    def _pixels(self, image: np.ndarray | bytes, name: str) -> np.ndarray:
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == self.shape:
            return image
        return np.asarray(center_crop(decode(image, self.channels, name, self.upright), self.shape[:2])).reshape(self.shape)

    def random_map(self, element: Example, rng: np.random.Generator) -> dict[str, Any]:
        """Returns `self(element)`, mirrored if `flip` is set and rng's first uniform number is below 1/2."""
        example = self(element)
        if self.flip and rng.random() < 0.5:
            example["image"] = example["image"][..., ::-1, :]
        return example
