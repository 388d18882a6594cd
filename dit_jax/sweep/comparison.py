"""The figures that compare the values of a config field, such as networks: scores against compute, parameters and time."""

from collections.abc import Sequence

import numpy as np

from dit_jax.report import style
from dit_jax.sweep.collect import Row
from dit_jax.sweep.figures import score_name
from dit_jax.sweep.points import Point, groups, ours

COSTS = {
    "gmacs": "GMACs of one forward",
    "parameters": "Parameters",
    "seconds_per_image": "Training, measured s per image",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
VALIDATION_NAME = "Validation loss: error of x0"


def draw(compare: str, rows: Sequence[Row], compared: Sequence[Row], protocol: dict) -> dict:
    """Draws the figures for which there are data, {name: (figure, caption)}; arguments as those of `report.draw`."""
    drawn, several = {}, len({row.seed for row in rows}) > 1
    seeds = " A marker is the mean over seeds, the line through it is their range." if several else ""
    if any(row.fid is not None for row in compared):
        text = f"Quality against compute, size and measured time, one line per {compare}.{seeds}"
        drawn["fid"] = against_costs(compared, "fid", score_name(protocol)), text
    if any(row.validation_loss is not None for row in rows):
        text = f"Validation loss on held-out examples against compute, size and measured time, one line per {compare}.{seeds}"
        drawn["validation_loss"] = against_costs(rows, "validation_loss", VALIDATION_NAME), text
        drawn["validation_levels"] = (
            by_level(rows),
            f"Validation loss at each noise level over its mean over the values of {compare}, for the most compute of each: "
            "below 1 is better than the others. Left: little noise, that is detail. Right: much noise, that is layout.",
        )
    return drawn


def against_costs(rows: Sequence[Row], score: str, name: str):
    """Plots a score against GMACs, parameters and seconds of training per image; a line per series joins its models.

    score: "fid" or "validation_loss"; name: of the vertical axis.
    """
    plt, points = style.pyplot(), ours(rows, score)
    shown = [cost for cost in COSTS if any(getattr(point, cost) for point in points)]
    figure, axes = plt.subplots(1, len(shown), figsize=(style.WIDTH, style.HEIGHT), squeeze=False, sharey=True)
    looks = _looks([point.series for point in points])
    for ax, cost in zip(axes[0], shown, strict=True):
        ax.set_xscale("log")
        ax.set_yscale("log")
        for series, (colour, marker) in looks.items():
            line = sorted((p for p in points if p.series == series and getattr(p, cost)), key=lambda p: getattr(p, cost))
            _line(ax, line, cost, colour, marker, series)
        ax.set_xlabel(COSTS[cost])
        ax.margins(x=0.12, y=0.1)
        ax.autoscale_view()
        ax.set_xlim(_wide(ax.get_xlim(), 4.0))
        ax.set_ylim(_wide(ax.get_ylim(), 1.15))
        style.log_ticks(ax.xaxis)
        style.log_ticks(ax.yaxis)
    axes[0][0].set_ylabel(name)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=len(looks), handletextpad=0.4)
    return figure


def _wide(limits: tuple[float, float], ratio: float) -> tuple[float, float]:
    """Limits of a logarithmic axis with at least this ratio, so that it has ticks and noise does not fill it."""
    low, high = limits
    room = max(1.0, (ratio * low / high) ** 0.5)
    return low / room, high * room


def _line(ax, line: Sequence[Point], cost: str, colour: str, marker: str, label: str | None):
    xs = [getattr(point, cost) for point in line]
    ax.plot(xs, [p.fid for p in line], color=colour, marker=marker, markersize=4.5, label=label, zorder=3)
    for x, point in zip(xs, line, strict=True):
        low, high = min(point.fids), max(point.fids)
        ax.plot([x, x], [low, high], color=colour, linewidth=1, zorder=2)
        ax.plot([x] * len(point.fids), point.fids, ".", color=colour, markersize=3, zorder=2)


def by_level(rows: Sequence[Row]):
    """Plots the validation loss of each series at each noise level, over the mean of the series, of its models of most GMACs."""
    largest: dict[str | None, list[Row]] = {}
    for repetitions in groups([row for row in rows if row.validation_levels]).values():
        largest[repetitions[0].series] = repetitions  # groups are in the order of GMACs
    levels = [level for level, _ in next(iter(largest.values()))[0].validation_levels]
    losses = {name: np.mean([[x for _, x in row.validation_levels] for row in found], 0) for name, found in largest.items()}
    figure, ax = style.pyplot().subplots(figsize=(0.62 * style.WIDTH, style.HEIGHT))
    middle = np.exp(np.mean(np.log(list(losses.values())), 0))
    for series, (colour, marker) in _looks(list(losses)).items():
        ax.plot(levels, losses[series] / middle, color=colour, marker=marker, markersize=4, label=series)
    ax.set_xscale("log")
    ax.margins(x=0.05)
    style.log_ticks(ax.xaxis)
    ax.set_xlabel("Noise level, sigma / alpha")
    ax.set_ylabel("Validation loss over the mean")
    figure.legend(loc="outside upper left", ncols=len(losses), handletextpad=0.4)
    return figure


def _looks(series: Sequence[str | None]) -> dict[str | None, tuple[str, str]]:
    """(colour, marker) of each series, in the order of its name."""
    names = sorted(dict.fromkeys(series), key=str)
    return {name: (style.COLOURS[i % len(style.COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
