"""What clips of rolling digits show, without a learned network: the digit, its motion, and how near they come to the truth.

N clips of F frames, S x S pixels (the side of the torus).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dit_jax.data.sources.digits import WORDS, Digits
from dit_jax.data.sources.rolling_digits import DIRECTIONS, SIDE
from dit_jax.evaluate.digit_recognition import NEIGHBOURS

CHUNK = 64  # frames that are compared at a time


class Asked(NamedTuple):
    """What captions ask for.

    Fields:
        digits: int64[N], -1 where a caption names none.
        moves: int64[N, 2], pixels that each step moves (rows, columns); zero for a still digit.
    """

    digits: np.ndarray
    moves: np.ndarray


def asked(captions: Sequence[str], step: int = 2) -> Asked:
    """The digit and the motion that captions of `data.sources.rolling_digits` name, short or long."""
    words = {"top": "up", "bottom": "down"}  # of the long captions
    digits, moves = [], []
    for caption in captions:
        named = [words.get(word, word) for word in caption.replace(",", " ").split()]
        digits.append(next((WORDS.index(word) for word in named if word in WORDS), -1))
        way = next((word for word in named if word in DIRECTIONS), "still")
        moves.append([step * part for part in DIRECTIONS[way]])
    return Asked(np.array(digits, np.int64), np.array(moves, np.int64).reshape(-1, 2))


def digits_of(clips: np.ndarray) -> np.ndarray:
    """int64[N, F], the digit that each frame shows; -1 for a frame without contrast.

    The vote of the 5 digits of scikit-learn with the highest normalised cross-correlation over all shifts of the torus. Of equal
    counts, the digit with the nearer neighbours wins.

    Args:
        clips: uint8[N, F, S, S, 1], or [N, F, S, S].
    """
    clips = np.asarray(clips)
    count, frames, side = clips.shape[:3]
    data = Digits()
    known = np.stack([np.asarray(data[i]["image"])[..., 0] for i in range(len(data))]).astype(np.float64)
    before = (side - SIDE) // 2
    known = np.pad(known, ((0, 0), *[(before, side - SIDE - before)] * 2))
    spectra = np.conj(np.fft.rfft2(_normalized(known))).astype(np.complex64)  # [D, S, S/2+1]
    given = _normalized(clips.reshape(count * frames, side, side).astype(np.float64))
    found = []
    for start in range(0, len(given), CHUNK):
        part = np.fft.rfft2(given[start : start + CHUNK]).astype(np.complex64)
        for one in part:
            similar = np.fft.irfft2(one[None] * spectra, s=(side, side)).max((1, 2))
            nearest = np.argsort(-similar, kind="stable")[:NEIGHBOURS]
            votes = np.zeros(len(WORDS))
            for place, index in enumerate(nearest):
                votes[data.labels[index]] += 1 + 0.01 * (NEIGHBOURS - place)
            found.append(votes.argmax() if one.any() else -1)
    return np.array(found, np.int64).reshape(count, frames)


def moves_of(clips: np.ndarray) -> np.ndarray:
    """int64[N, F - 1, 2]: how far each frame has moved from the one before, (rows, columns), in -S/2 to S/2 - 1.

    The shift with the greatest cross-correlation of the two frames, their mean removed.

    Args:
        clips: uint8[N, F, S, S, 1], or [N, F, S, S].
    """
    clips = np.asarray(clips)
    count, frames, side = clips.shape[:3]
    x = clips.reshape(count, frames, side, side).astype(np.float64)
    spectra = np.fft.rfft2(x - x.mean((2, 3), keepdims=True))
    correlation = np.fft.irfft2(spectra[:, 1:] * np.conj(spectra[:, :-1]), s=(side, side))
    best = correlation.reshape(count, frames - 1, -1).argmax(-1)
    moves = np.stack([best // side, best % side], axis=-1)
    return (moves + side // 2) % side - side // 2


def psnr(clips: np.ndarray, truth: np.ndarray, unknown: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of all unknown pixels together, 10 log10(255^2 / mean squared error); inf if equal.

    One error for all clips: a clip that fails costs more than in a mean of their own ratios.

    Args:
        clips, truth: uint8, of one shape.
        unknown: bool, broadcasts to them: the pixels that count; None for all.
    """
    error = np.square(clips.astype(np.float64) - truth.astype(np.float64))
    mean = error.mean() if unknown is None else error[np.broadcast_to(unknown, error.shape)].mean()
    return float(10 * np.log10(255**2 / mean)) if mean else float("inf")


class Score(NamedTuple):
    """Shares of clips, in 0 to 1, that are what was asked for.

    Fields:
        digit: of clips whose frames, by majority, show the digit.
        steps: of steps that move as asked.
        motion: of clips all of whose steps move as asked.
        seam: of clips whose step from the last frame back to the first moves as asked.
    """

    digit: float
    steps: float
    motion: float
    seam: float


def score(clips: np.ndarray, wanted: Asked) -> Score:
    """How many clips, uint8[N, F, S, S, 1], show what was asked for. Motions are nan for clips of one frame.

    The digit of a clip is that of most of its frames; of equal counts, the smaller digit.
    """
    clips = np.asarray(clips)
    seen = digits_of(clips)
    votes = (seen[..., None] == np.arange(len(WORDS))).sum(1)  # [N, 10]
    digit = float((np.where(votes.any(1), votes.argmax(1), -1) == wanted.digits).mean())
    if clips.shape[1] == 1:
        return Score(digit, float("nan"), float("nan"), float("nan"))
    moved = moves_of(np.concatenate([clips, clips[:, :1]], axis=1))  # the last step is the seam
    right = _same(moved, wanted.moves[:, None], clips.shape[2])
    return Score(digit, float(right[:, :-1].mean()), float(right[:, :-1].all(1).mean()), float(right[:, -1].mean()))


def _same(moved: np.ndarray, wanted: np.ndarray, side: int) -> np.ndarray:
    """Whether shifts are equal on the torus."""
    return ((moved - wanted) % side == 0).all(-1)


def _normalized(images: np.ndarray) -> np.ndarray:
    """f64[N, S, S] with mean 0 and length 1; zeros for an image without contrast."""
    x = images - images.mean((1, 2), keepdims=True)
    length = np.sqrt(np.square(x).sum((1, 2), keepdims=True))
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)
