"""Picks frames of stored clips and crops them to uint8 arrays of a fixed size for training.

Letters: F is the number of frames of the result, H, W, C its height, width and channels; n the frames of the stored clip.
"""

import dataclasses
from typing import Any

import grain
import numpy as np

from dit_jax.data.image_files import decode
from dit_jax.data.sources.source import Example
from dit_jax.data.stored_clips import StoredClip, is_animation
from dit_jax.data.transforms import ImageTransform, center_crop
from dit_jax.errors import UserError

CROPS = ("center", "random")


@dataclasses.dataclass(frozen=True)
class ClipTransform(grain.transforms.RandomMap):
    """Example -> {"image": uint8 [F, H, W, C], "label": int32}: F frames of a clip, scaled and cropped.

    The frames are every stride-th of the stored ones, with stride = max(1, round(stored rate / fps)), from a first frame that is
    uniform over all that leave enough. All frames have one crop and one flip. A stored image is a clip of one frame. An example
    that is too short is an error, which the loader counts as a bad record.

    Args:
        frames: F, at least 1.
        resolution: side of a square in pixels, at least 1.
        channels: C, 1 or 3.
        flip: mirror left-right with probability 1/2 in `random_map`; false where left and right differ, as in digits or motion
            that captions name.
        fps: wanted frames per second; None takes all frames as they are stored.
        crop: one of CROPS; where the scaled clip is cropped in `random_map`.
        size: (H, W), which takes precedence over the resolution; None means a square.

    Raises:
        UserError: a field is out of range.
    """

    frames: int
    resolution: int
    channels: int
    flip: bool
    fps: float | None = None
    crop: str = "center"
    size: tuple[int, int] | None = None

    def __post_init__(self):
        if self.frames < 1:
            raise UserError(f"transform.frames={self.frames} must be at least 1")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UserError(f"transform.fps={self.fps} must be above 0 frames per second, or None for the stored rate")
        if self.crop not in CROPS:
            raise UserError(f"transform.crop={self.crop!r} must be one of {', '.join(CROPS)}")
        frame = ImageTransform(self.resolution, self.channels, self.flip, size=self.size)  # checks them
        object.__setattr__(self, "size", frame.size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, C) of the resulting clips."""
        return self.frames, *(self.size or (self.resolution, self.resolution)), self.channels

    def describe(self) -> dict:
        """The settings that determine the pixels, except for what is drawn, as JSON; "size" only if not square."""
        image = ImageTransform(self.resolution, self.channels, False, size=self.size).describe()
        return {**image, "frames": self.frames, "fps": self.fps}

    def stride(self, fps: float, name: str) -> int:
        """The distance of two frames of the result in the stored clip, for its frames per second.

        Raises:
            UserError: the rate is wanted, and that of the clip is unknown.
        """
        if self.fps is None or self.frames == 1:
            return 1
        if not fps:
            raise UserError(f"{name} has no frame rate, and transform.fps is {self.fps}; set it to None to take frames as stored")
        return max(1, round(fps / self.fps))

    def __call__(self, example: Example) -> dict[str, Any]:
        """The deterministic part: the middle of the clip, cropped in the centre, never mirrored."""
        return self._made(example, 0.5, None)

    def random_map(self, element: Example, rng: np.random.Generator) -> dict[str, Any]:
        """As `__call__` with what rng draws: the first frame, the crop if it is random, the flip if `flip` is set."""
        start = rng.random()
        at = (rng.random(), rng.random()) if self.crop == "random" else None
        result = self._made(element, start, at)
        if self.flip and rng.random() < 0.5:
            result["image"] = result["image"][..., ::-1, :]
        return result

    def _made(self, example: Any, start: float, at: tuple[float, float] | None) -> dict[str, Any]:
        name = example.get("name", "clip")
        video, fps = self._stored(example, name)
        stored = len(video)
        span = (self.frames - 1) * (stride := self.stride(fps, name)) + 1
        if stored < span:
            raise UserError(
                f"{name} has {stored} frames, and {self.frames} with a stride of {stride} need {span}: leave it out, or lower "
                "transform.frames"
            )
        first = min(int(start * (stored - span + 1)), stored - span)
        pixels = [self._pixels(frame, name, at) for frame in video[first : first + span : stride]]
        return {"image": np.stack(pixels), "label": np.int32(example["label"])}

    def _stored(self, example: Any, name: str) -> tuple[Any, float]:
        """(the frames of an example, their rate); an image is a clip of one frame, an animated GIF or WebP one of several."""
        if "video" in example:
            return example["video"], example.get("fps") or 0.0
        image = example["image"]
        if isinstance(image, bytes) and is_animation(image):
            clip = StoredClip(image, name)
            return clip, clip.fps
        return (image if isinstance(image, np.ndarray) and image.ndim == 4 else [image]), example.get("fps") or 0.0

    def _pixels(self, frame: np.ndarray | bytes, name: str, at: tuple[float, float] | None) -> np.ndarray:
        shape = self.shape[1:]
        if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.shape == shape:
            return frame
        return np.asarray(center_crop(decode(frame, self.channels, name), shape[:2], at)).reshape(shape)
