"""From a stored image to the uint8 square a network is trained on.

Letters: H, W, C of the stored image; R is the resolution asked for.
"""

import dataclasses
import io

import grain
import numpy as np
from PIL import Image

from dit_jax.data.sources import Example
from dit_jax.errors import UserError

MODES = {1: "L", 3: "RGB"}


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central size x size square after scaling the short side to `size`.

    Halves with a box filter while the short side is at least 2 size, then bicubic to the short side, then cuts; the
    odd pixel of an uneven margin stays on the right and bottom. A size x size image comes back unchanged.

    Source: Dhariwal & Nichol 2021, their published code (image_datasets.py), and by it Peebles & Xie 2023.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode(image: np.ndarray | bytes, channels: int, name: str = "image") -> Image.Image:
    """A Pillow image of mode L (channels 1) or RGB (channels 3).

    Grey becomes three equal channels; colour becomes grey by the ITU-R 601 luma. Palettes are looked up, CMYK and YCbCr
    converted, transparency dropped (the colour under it shows), a 16-bit grey v becomes round(v / 257). The orientation
    noted by a camera is not applied. All but the 16-bit rule is what ADM, DiT and torchvision do.

    Args:
        image: bytes of an image file, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        channels: 1 or 3.
        name: what the error message calls the image, a file name for instance.

    Raises:
        UserError: bytes that are no image, a truncated one, or 32-bit pixels, whose range is unknown.
        ValueError: an array of another shape or dtype, or another number of channels.
    """
    if channels not in MODES:
        raise ValueError(f"channels={channels} must be 1 (grey) or 3 (RGB)")
    if isinstance(image, np.ndarray):
        picture = _from_array(image, name)
    else:
        try:
            picture = Image.open(io.BytesIO(image))
            picture.load()
        except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ... for broken bytes
            raise UserError(f"{name} is not a readable image ({type(error).__name__}: {error}): restore it; "
                            "a run that has begun needs the data set unchanged, another set of files a new --workdir") from error
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        # Pillow's own conversion to 8 bits clips at 255, which leaves a white image.
        wide = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit pixels (mode {picture.mode}) of unknown range: save it with 8 or 16 bits per channel")
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB gives the same colours and a warning per image
    return picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])


def _from_array(image: np.ndarray, name: str) -> Image.Image:
    shape = image.shape
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and shape[2] in (1, 3, 4))) or 0 in shape:
        raise ValueError(f"{name} is {image.dtype}{list(shape)}, but an array image must be uint8 [H, W] or [H, W, 1 | 3 | 4]")
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and shape[2] == 1 else image)


@dataclasses.dataclass(frozen=True)
class ImageTransform(grain.transforms.RandomMap):
    """Example -> {"image": uint8 [R, R, C], "label": int32}: decode, centre crop, and mirror half of the images.

    Args:
        resolution: R, at least 1.
        channels: C, 1 or 3.
        flip: mirror left-right with probability 1/2 in `random_map`; false for data where left and right differ, such
            as digits.

    Raises:
        UserError: resolution or channels out of range.
    """

    resolution: int
    channels: int
    flip: bool

    def __post_init__(self):
        if self.resolution < 1:
            raise UserError(f"transform.resolution={self.resolution} must be at least 1")
        if self.channels not in MODES:
            raise UserError(f"transform.channels={self.channels} must be 1 (grey) or 3 (RGB)")

    def __call__(self, example: Example) -> dict[str, np.ndarray]:
        """The part without chance: decoded and cropped, never mirrored."""
        image = example["image"]
        shape = (self.resolution, self.resolution, self.channels)
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == shape):
            picture = decode(image, self.channels, example.get("name", "image"))
            image = np.asarray(center_crop(picture, self.resolution)).reshape(shape)
        return {"image": image, "label": np.int32(example["label"])}

    def random_map(self, element: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`self(element)`, mirrored if `flip` and rng's first uniform number is below 1/2."""
        example = self(element)
        if self.flip and rng.random() < 0.5:
            example["image"] = example["image"][:, ::-1]
        return example
