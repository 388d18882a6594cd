"""Crops stored images to uint8 arrays of a fixed size for training.

Letters: H, W, C are the height, width and channels of an image, F the frames of a clip.
"""

import dataclasses
from typing import Any

import grain
import numpy as np
from PIL import Image

from dit_jax.data.image_files import MODES, decode
from dit_jax.data.sources.source import Example
from dit_jax.errors import UserError

ELONGATED = 32  # from this ratio of the sides on, only the kept part of the long side is enlarged


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
        name = example.get("name", "image")
        if "image" not in example:
            raise UserError(f"{name} is a clip, and transform.name is 'image': set --config.transform.name=clip")
        image = example["image"]
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
