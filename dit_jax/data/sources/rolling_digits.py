"""Clips of handwritten digits that roll over a torus, made of scikit-learn's digits: video and text without a download.

F frames, S side of the torus.
"""

import math

import numpy as np

from dit_jax.data.sources.digits import WORDS, Digits
from dit_jax.data.sources.source import Example, fingerprint
from dit_jax.errors import UserError

SIDE = 8  # of a digit
DIRECTIONS = {"still": (0, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns) of a step
LONG = {
    "still": "a handwritten {} stays where it is",
    "left": "a handwritten {} drifts off to the left and returns from the right",
    "right": "a handwritten {} drifts off to the right and returns from the left",
    "up": "a handwritten {} drifts off to the top and returns from below",
    "down": "a handwritten {} drifts off to the bottom and returns from above",
}


def clip_captions(digit: str, direction: str) -> tuple[str, str]:
    """(short, long) caption of a clip, of the words for its digit and direction."""
    short = f"a still {digit}" if direction == "still" else f"{article(digit)} {digit} rolling {direction}"
    return short, LONG[direction].format(digit)


def image_captions(digit: str) -> tuple[str, str]:
    """(short, long) caption of an image of a digit."""
    return f"{article(digit)} {digit}", f"a handwritten {digit}"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def all_captions() -> list[str]:
    """All captions: the short ones of images, those of clips, then the long ones in the same order."""
    pairs = [image_captions(word) for word in WORDS]
    pairs += [clip_captions(word, direction) for direction in DIRECTIONS for word in WORDS]
    return [pair[i] for i in range(2) for pair in pairs]


def rolled(image: np.ndarray, direction: str, step: int, frames: int, phase: int) -> np.ndarray:
    """uint8[F, S, S, 1]: frame f is the image [S, S, 1], rolled by (phase + f) steps of `step` pixels."""
    rows, columns = DIRECTIONS[direction]
    shifts = [(phase + frame) * step for frame in range(frames)]
    return np.stack([np.roll(image, (rows * shift, columns * shift), (0, 1)) for shift in shifts])


class RollingDigits:
    """A digit on a torus, which rolls left, right, up or down by `step` pixels a frame, or stands still.

    Each example is one digit with one direction and one phase, where the clip begins on its way around; example i is a function
    of i. A clip of `period` frames is a perfect loop. Captions are "a three rolling left" and "a handwritten three drifts off to
    the left and returns from the right"; labels are 5 digit + direction, in the order of DIRECTIONS. With frames = 1 the examples
    are the digits themselves, with captions "a three" and "a handwritten three" and the digit as label.

    Args:
        path: must be empty.
        split: as of `Digits`.
        frames: F, of a clip.
        step: pixels of a step; less than `size`.
        size: S; the digit stands in the middle of a larger torus.
        fps: frames per second, which players are told.
        images: adds the digits themselves behind the clips, as clips of one frame with the captions of images: for joint training
            on images and clips by buckets. Their labels are those of still clips.

    Raises:
        UserError: a number is out of range; the split is unknown.
    """

    class_names: tuple[str, ...]
    has_captions = True

    def __init__(
        self,
        path: str = "",
        split: str = "all",
        frames: int = 4,
        step: int = 2,
        size: int = SIDE,
        fps: float = 4.0,
        images: bool = False,
    ):
        if frames < 1:
            raise UserError(f"data.frames is {frames}; it must be at least 1 (1 gives images)")
        if size < SIDE:
            raise UserError(f"data.size is {size}; the digits have {SIDE} x {SIDE} pixels, so it must be at least {SIDE}")
        if not 0 < step < size:
            raise UserError(f"data.step is {step}; it must lie in 1 to data.size - 1 = {size - 1} pixels")
        if not 0 < fps < math.inf:
            raise UserError(f"data.fps is {fps}; it must be positive")
        self._digits, self.frames, self.step, self.size, self.fps = Digits(path, split), frames, step, size, float(fps)
        self._with_images = images and frames > 1
        self.period = size // math.gcd(step, size)
        names = WORDS if frames == 1 else [clip_captions(word, way)[0] for word in WORDS for way in DIRECTIONS]
        self.class_names, self.num_classes = tuple(names), len(names)
        facts = {"frames": frames, "step": step, "size": size, "fps": self.fps, "images": self._with_images}
        self.fingerprint = fingerprint(name="rolling_digits", digits=self._digits.fingerprint, **facts)

    @property
    def _ways(self) -> list[tuple[str, int]]:
        """The (direction, phase) of the examples of a digit; a still one has all phases, so that directions are as frequent."""
        return [("still", 0)] if self.frames == 1 else [(way, phase) for phase in range(self.period) for way in DIRECTIONS]

    @property
    def _num_clips(self) -> int:
        return len(self._digits) * len(self._ways)

    def __len__(self) -> int:
        return self._num_clips + self._with_images * len(self._digits)

    def sizes(self) -> np.ndarray:
        """f64[N, 4]: (frames, height, width, frames per second) of each example, by which buckets choose theirs."""
        sizes = np.tile(np.array([self.frames, self.size, self.size, self.fps]), (len(self), 1))
        sizes[self._num_clips :, 0] = 1
        return sizes

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, way = index % len(self._digits), index // len(self._digits)
        if index >= self._num_clips:
            return self.example(number, "still", 0, frames=1)
        direction, phase = self._ways[way]
        return self.example(number, direction, phase)

    def example(self, number: int, direction: str, phase: int, frames: int | None = None) -> Example:
        """The clip of a digit of the data set with this direction and phase; of one frame, with the captions of an image."""
        frames = frames or self.frames
        digit = self._digits[number]
        before = (self.size - SIDE) // 2
        image = np.pad(digit["image"], ((before, self.size - SIDE - before),) * 2 + ((0, 0),))
        word = WORDS[digit["label"]]
        short, long = image_captions(word) if frames == 1 else clip_captions(word, direction)
        label = digit["label"] if self.frames == 1 else len(DIRECTIONS) * digit["label"] + list(DIRECTIONS).index(direction)
        return {
            "video": rolled(image, direction, self.step, frames, phase),
            "fps": self.fps,
            "label": label,
            "name": f"digit {number}, {direction}, phase {phase}",
            "caption": short,
            "caption_long": long,
        }
