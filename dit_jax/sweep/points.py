"""Converts the rows of a sweep to points of figures, and groups repetitions with different seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.sweep import paper
from dit_jax.sweep.collect import Row
from dit_jax.sweep.fits import Fit, log_linear


@dataclass(frozen=True)
class Point:
    """One model.

    Fields:
        gmacs, compute_gmacs, parameters: see `cost.Cost`.
        fids: one per seed; or other scores, see `ours`.
        series, seconds_per_image: see `collect.Row`; the mean over seeds.
        interval: bootstrap interval over the images for the FID of a single seed, if it was computed.
    """

    name: str
    family: str
    patch: int | None
    gmacs: float
    compute_gmacs: float
    fids: tuple[float, ...]
    interval: tuple[float, float] | None = None
    parameters: int = 0
    series: str | None = None
    seconds_per_image: float | None = None

    @property
    def span(self) -> tuple[float, float]:
        return self.interval if len(self.fids) == 1 and self.interval else (min(self.fids), max(self.fids))

    @property
    def fid(self) -> float:
        return float(np.mean(self.fids))


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups repetitions of each model; models are ordered by GMACs."""
    grouped: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.cost.gmacs, row.cost.compute_gmacs)):
        grouped.setdefault(row.group, []).append(row)
    return grouped


def labels(rows: Sequence[Row]) -> dict[str, str]:
    """Names of groups in figures, {group: name}: the variant if it identifies every group, otherwise the group."""
    variants = {row.group: row.variant for row in rows}
    return variants if len(set(variants.values())) == len(variants) else {group: group for group in variants}


def ours(rows: Sequence[Row], score: str = "fid") -> list[Point]:
    """Points of all models with a score: "fid" or "validation_loss"."""
    names = labels(rows)
    scored = groups([row for row in rows if getattr(row, score) is not None])
    return [
        Point(
            names[group],
            repetitions[0].family,
            repetitions[0].patch,
            repetitions[0].cost.gmacs,
            repetitions[0].cost.compute_gmacs,
            tuple(getattr(row, score) for row in repetitions),
            repetitions[0].fid_interval if score == "fid" else None,
            repetitions[0].cost.parameters,
            repetitions[0].series,
            _mean([row.seconds_per_image for row in repetitions if row.seconds_per_image is not None]),
        )
        for group, repetitions in scored.items()
    ]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def of_paper() -> list[Point]:
    compute = paper.BATCH_SIZE * paper.NUM_STEPS * 3
    return [
        Point(name, name.split("/")[0], int(name.split("/")[1]), gmacs, gmacs * compute, (fid,))
        for name, (gmacs, fid) in paper.FIDS.items()
    ]


def fit(points: Sequence[Point], by: str = "gmacs") -> Fit | None:
    """Fits the mean FID of each model against its GMACs or training compute."""
    return log_linear([getattr(point, by) for point in points], [point.fid for point in points])


def comparable(protocol: dict) -> bool:
    """Whether FIDs of this protocol may share an axis with the paper's."""
    return (
        protocol.get("features") == paper.FEATURES
        and protocol.get("images") == paper.NUM_IMAGES
        and protocol.get("guidance") in (None, 1.0)
    )
