"""Rows of a sweep as the points of its figures: repetitions with other seeds together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.sweeping import paper
from dit_jax.sweeping.collect import Row
from dit_jax.sweeping.fits import Fit, log_linear


@dataclass(frozen=True)
class Point:
    """One model.

    Fields:
        gmacs, compute_gmacs: see `cost.Cost`.
        fids: one per seed.
    """

    name: str
    family: str
    patch: int | None
    gmacs: float
    compute_gmacs: float
    fids: tuple[float, ...]

    @property
    def fid(self) -> float:
        return float(np.mean(self.fids))


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Repetitions of each model, models by GMACs."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.cost.gmacs, row.cost.compute_gmacs)):
        found.setdefault(row.group, []).append(row)
    return found


def ours(rows: Sequence[Row]) -> list[Point]:
    """A point for every model with a FID."""
    found = []
    for name, repetitions in groups([row for row in rows if row.fid is not None]).items():
        first = repetitions[0]
        label = first.variant if sum(row.variant == first.variant for row in rows) <= len(repetitions) else name
        found.append(Point(label, first.family, first.patch, first.cost.gmacs, first.cost.compute_gmacs,
                           tuple(row.fid for row in repetitions)))
    return found


def of_paper() -> list[Point]:
    compute = paper.BATCH_SIZE * paper.NUM_STEPS * 3
    return [Point(name, name.split("/")[0], int(name.split("/")[1]), gmacs, gmacs * compute, (fid,))
            for name, (gmacs, fid) in paper.FIDS.items()]


def fit(points: Sequence[Point], by: str = "gmacs") -> Fit | None:
    """Mean FID of each model against its GMACs or training compute."""
    return log_linear([getattr(point, by) for point in points], [point.fid for point in points])


def comparable(protocol: dict) -> bool:
    """Whether FIDs of this protocol may share an axis with the paper's."""
    return (protocol.get("features") == paper.FEATURES and protocol.get("num_samples") == paper.NUM_IMAGES
            and protocol.get("guidance_scale") in (None, 1.0))
