"""Buckets: the shapes of training batches, and which of them each step takes.

A step trains on a batch of one shape. The shapes take turns in a fixed cycle, so that the bucket of a step, and the number of the
batch within its bucket, are functions of the step alone: the same on every host, and after every resume.

Letters: P is the number of steps of a cycle, N the number of examples, K the number of buckets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dit_jax.errors import UserError

MOST_STEPS = 10_000  # of a cycle
UNKNOWN = 0  # frames, height, width or rate of an example that the data set does not know


@dataclass(frozen=True)
class Bucket:
    """One shape of batches.

    Fields:
        frames, height, width: of an example; an image has one frame.
        batch_size: examples of a batch, over all hosts.
        weight: steps of this bucket in a cycle.
    """

    frames: int
    height: int
    width: int
    batch_size: int
    weight: int = 1

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width


@dataclass(frozen=True)
class Buckets:
    """The buckets of a run, and their order.

    Of each cycle of P steps, P being the sum of the weights, every bucket has as many steps as its weight. Step i of the n of a
    bucket stands at (i + 1/2) / n of the cycle, so that each is spread evenly; of two at the same place the earlier bucket comes
    first.

    Every step has the same weight in training, and the loss of a step is the mean over its examples. Batch sizes of about equal
    numbers of tokens therefore make all tokens count about the same; with equal batch sizes, tokens of small examples count more.

    Args:
        classes: (frames, height, width, batch size) of each bucket, or these and its steps in a cycle (1 if left out), as
            ((1,256,256,64,1),(17,256,256,4,3)). Images are of one frame. Empty: all batches have the size of `transform`.

    Raises:
        UserError: a class is not of whole numbers from 1, a shape stands twice, or a cycle has more than MOST_STEPS steps.
    """

    classes: tuple[tuple, ...] = ()

    def __post_init__(self):
        if not self.classes:
            return
        shapes = [bucket.shape for bucket in self.all]
        if twice := {shape for shape in shapes if shapes.count(shape) > 1}:
            raise UserError(
                f"buckets.classes has the shape {'x'.join(map(str, min(twice)))} twice; give it once, with its weight"
            )
        if self.num_steps > MOST_STEPS:
            raise UserError(
                f"the weights of buckets.classes sum to {self.num_steps:,} steps of a cycle, more than {MOST_STEPS:,}; divide "
                "them by a common number"
            )

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def all(self) -> tuple[Bucket, ...]:
        return tuple(_bucket(given) for given in self.classes)

    @property
    def num_steps(self) -> int:
        """P."""
        return sum(bucket.weight for bucket in self.all)

    @cached_property
    def cycle(self) -> "Cycle":
        return Cycle([bucket.weight for bucket in self.all])

    def members(self, sizes: np.ndarray | None, num_examples: int, fps: float | None = None) -> list[np.ndarray]:
        """The numbers of the examples that each bucket draws from, ascending int64.

        An example belongs to a bucket if it has enough frames, and no other bucket of as many frames has a nearer aspect ratio
        (by the ratio of the ratios; of two that are equally near, it belongs to both). A bucket of one frame takes images; if
        there are none for it, single frames of clips. Examples of unknown size belong to all buckets.

        Args:
            sizes: [N, 4] of (frames, height, width, frames per second), UNKNOWN where the data set does not know; None if it
                knows none.
            num_examples: N.
            fps: wanted frames per second, see `clip_transform.ClipTransform`; None takes all frames as they are stored.

        Raises:
            UserError: a bucket has no example.
        """
        if sizes is None:
            return [np.arange(num_examples)] * len(self)
        frames, sides, rates = sizes[:, 0], sizes[:, 1:3], sizes[:, 3]
        strides = np.maximum(1, np.round(rates / fps)) if fps else np.ones(len(sizes))
        known = (sides != UNKNOWN).all(1)
        ratios = np.log(np.where(known[:, None], sides, 1))
        away = np.stack(
            [np.abs(ratios[:, 0] - ratios[:, 1] - np.log(bucket.height / bucket.width)) for bucket in self.all]
        ).round(9)
        members = []
        for number, bucket in enumerate(self.all):
            nearest = away[[k for k, other in enumerate(self.all) if other.frames == bucket.frames]].min(0)
            fits = ((away[number] == nearest) | ~known) & ((frames > (bucket.frames - 1) * strides) | (frames == UNKNOWN))
            if bucket.frames == 1 and (fits & (frames == 1)).any():
                fits &= (frames == 1) | (frames == UNKNOWN)
            members.append(np.flatnonzero(fits))
            if not fits.any():
                raise UserError(
                    f"none of the {num_examples:,} examples belongs to the bucket {bucket}: all have fewer frames, or are nearer "
                    "to the shape of another bucket; leave it out of buckets.classes"
                )
        return members


class Cycle:
    """The order of K buckets with these weights: for each step its bucket, and how many steps of that bucket came before.

    Fields:
        order: int [P], the bucket of each step of a cycle.
    """

    def __init__(self, weights: Sequence[int]):
        self.weights = tuple(weights)
        places = [((i + 0.5) / weight, number) for number, weight in enumerate(self.weights) for i in range(weight)]
        self.order = np.array([number for _, number in sorted(places)])
        self._ranks = np.array([np.count_nonzero(self.order[:i] == number) for i, number in enumerate(self.order)])

    def __len__(self) -> int:
        return len(self.order)

    def at(self, step: int) -> tuple[int, int]:
        """(number of the bucket of a step, number of the batch within its bucket)."""
        cycle, place = divmod(step, len(self))
        bucket = int(self.order[place])
        return bucket, cycle * self.weights[bucket] + int(self._ranks[place])


def _bucket(given: Sequence) -> Bucket:
    form = "(frames, height, width, batch size) or (frames, height, width, batch size, weight), as in (17,256,256,4,1)"
    if not isinstance(given, (tuple, list)) or len(given) not in (4, 5):
        raise UserError(f"buckets.classes has {given!r}; each must be {form}, and the outer parentheses hold all of them")
    for value in given:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
            raise UserError(
                f"buckets.classes has {value!r} in {tuple(given)}; each must be {form}, in whole numbers from 1. Write shares of "
                "0.3 and 0.7 as weights 3 and 7"
            )
    return Bucket(*map(int, given))
