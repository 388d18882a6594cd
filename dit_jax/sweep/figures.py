"""The figures of a report; each function maps rows to a matplotlib figure."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit_jax.report import style
from dit_jax.sweep import paper
from dit_jax.sweep.collect import Row
from dit_jax.sweep.points import Point, comparable, fit, groups, labels, of_paper, ours

AXIS = {
    "gmacs": "GFLOPs of one forward (multiply-adds, as in the paper)",
    "compute_gmacs": "Training compute in GFLOPs (multiply-adds \u00d7 batch \u00d7 steps \u00d7 3)",
}
MAX_CURVE_POINTS = 200
SAMPLES_SHOWN = 10


def score_name(protocol: dict) -> str:
    """Label of the vertical axis."""
    features, count = protocol.get("features", "?"), protocol.get("images")
    if features == paper.FEATURES:
        return f"FID-{count // 1000}K" if count and count % 1000 == 0 else f"FID ({count:,} samples)"
    return f"Fréchet distance in {features}" + (f" ({count:,} samples)" if count else "")


def panels(count: int):
    plt = style.pyplot()
    figure, axes = plt.subplots(1, count, figsize=(style.WIDTH if count > 1 else 0.62 * style.WIDTH, style.HEIGHT), squeeze=False)
    return figure, list(axes[0])


def fid_against(by: str, rows: Sequence[Row], protocol: dict, with_paper: bool):
    """Plots FID against `by` ("gmacs" or "compute_gmacs") with a log-linear fit, on the paper's axes if comparable.

    A marker is the mean over seeds, with their range as a line and single seeds as small dots. A single seed has its bootstrap
    interval. The paper's models are on the same axes if the metric is comparable, otherwise on separate ones.
    """
    points, theirs = ours(rows), of_paper() if with_paper else []
    shared = with_paper and comparable(protocol)
    figure, axes = panels(2 if theirs and not shared else 1)
    names = [point.family for point in sorted(points, key=lambda p: p.gmacs)]
    hues = style.colours([*dict.fromkeys(names), *(p.family for p in theirs)] if shared else names)
    title = "This sweep" + (f", and {paper.CITATION} (hollow)" if shared else "")
    _scatter(axes[0], title, points, by, hues, theirs if shared else [])
    axes[0].set_xlabel(AXIS[by])
    axes[0].set_ylabel(score_name(protocol))
    if len(axes) > 1:
        _scatter(axes[1], f"{paper.CITATION}, 400k steps", theirs, by, style.colours([p.family for p in theirs]), [])
        axes[1].set_ylabel("FID-50K, ImageNet 256")
        figure.supxlabel(AXIS[by], fontsize=8, color=style.INK)
        for ax in axes:
            ax.set_xlabel("")
    return figure


def _scatter(ax, title: str, points: Sequence[Point], by: str, hues: dict, hollow: Sequence[Point]):
    everything, line = [*points, *hollow], fit(points, by)
    shapes = style.markers([p.patch for p in everything if p.patch is not None])
    ax.set_xscale("log")
    for p in hollow:
        ax.plot(
            getattr(p, by),
            p.fid,
            shapes.get(p.patch, "o"),
            markersize=5.5,
            markerfacecolor="none",
            zorder=3,
            markeredgecolor=hues[p.family],
        )
    for p in points:
        x, colour = getattr(p, by), hues[p.family]
        ax.plot([x, x], p.span, color=colour, linewidth=1, zorder=3)
        if len(p.fids) > 1:
            ax.plot([x] * len(p.fids), p.fids, "o", color=colour, markersize=2, zorder=3)
        ax.plot(
            x,
            p.fid,
            shapes.get(p.patch, "o"),
            color=colour,
            markersize=5.5,
            markeredgecolor=style.PAGE,
            markeredgewidth=0.6,
            zorder=4,
        )
    xs = [getattr(p, by) for p in everything]
    tops = [p.span[1] for p in everything]
    along = [(getattr(p, by), p.fid) for p in hollow]
    along += [(getattr(p, by), fid) for p in points for fid in (*p.fids, *np.linspace(*p.span, 20))]
    if line is not None:
        ends = np.array([min(getattr(p, by) for p in points), max(getattr(p, by) for p in points)])
        title += "\n" + line.text().replace("-", "\N{MINUS SIGN}").replace("% interval", "%:")
        ax.plot(ends, line(ends), color=style.INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        steps = np.geomspace(ends[0], ends[1], 200)
        along += zip(steps, line(steps), strict=True)
    ax.set_title(title)
    if xs:
        span = max(xs) / min(xs) if max(xs) > min(xs) else 10.0
        ax.set_xlim(min(xs) / span**0.09, max(xs) * span**0.09)
        ax.set_ylim(min(0.0, min(min(p.fids) for p in everything)), 1.12 * max(tops))
        style.log_ticks(ax.xaxis)
        style.label_points(ax, [(getattr(p, by), p.fid) for p in points], [p.name for p in points], along)
    if len(shapes) > 1:
        handles = [
            ax.plot([], [], shape, color=style.INK, markersize=4.5, label=f"patch {patch}")[0] for patch, shape in shapes.items()
        ]
        ax.legend(handles=handles, loc="best", handletextpad=0.2, borderaxespad=0.1)


def fid_while_training(rows: Sequence[Row], protocol: dict):
    """Plots the FID of checkpoints against training compute, one line per run; None if no run was scored twice.

    protocol: of the scores during training, which all rows must share; they are cheaper than the final ones.
    """
    shown, names = groups([row for row in rows if len(row.fid_curve) > 1]), labels(rows)
    if not shown:
        return None
    figure, (ax,) = panels(1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ends, along, hues = [], [], style.shades(len(shown))
    for repetitions, hue in zip(shown.values(), hues, strict=True):
        for row in repetitions:
            steps, fids = np.asarray(row.fid_curve).T
            spent = row.cost.compute_gmacs * steps / row.num_steps
            ax.plot(spent, fids, color=hue, marker="o", markersize=2.5, linewidth=1)
            along += _between(spent, fids)
        ends.append((spent[-1], fids[-1]))
    ax.set_xlabel(AXIS["compute_gmacs"])
    ax.set_ylabel(score_name(protocol))
    _finish(ax, ends, [names[group] for group in shown], along, hues)
    return figure


def _between(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """Points along a line on logarithmic axes, which labels must not cover."""
    points = []
    for i in range(len(xs) - 1):
        points += zip(np.geomspace(xs[i], xs[i + 1], 40), np.geomspace(ys[i], ys[i + 1], 40), strict=True)
    return points


def _finish(ax, ends: Sequence, texts: Sequence[str], along: Sequence, hues: Sequence):
    """Sets limits and ticks of logarithmic axes and labels the end of each line."""
    ax.margins(x=0.12, y=0.08)
    ax.autoscale_view()
    low, high = ax.get_ylim()
    room = max(1.0, np.sqrt(1.4 * low / high))  # below a range of 40 % noise would fill the axis
    ax.set_ylim(low / room, high * room)
    style.log_ticks(ax.xaxis)
    style.log_ticks(ax.yaxis)
    style.label_points(ax, ends, texts, along, hues)


def sampling_compute(rows: Sequence[Row], protocol: dict):
    """Plots FID against the GFLOPs of sampling one image, one line per model and sampler; None without such scores."""
    lines: dict[tuple[str, str], dict[float, float]] = {}
    names = labels(rows)
    for group, repetitions in groups(rows).items():
        for row in repetitions:
            for score in row.samplers:
                if score["evaluations"]:  # null if the sampler chooses its own number
                    lines.setdefault((names[group], score["sampler"]), {})[score["evaluations"] * row.cost.gmacs] = score["fid"]
    if not lines:
        return None
    figure, (ax,) = panels(1)
    models = list(dict.fromkeys(name for name, _ in lines))
    hues = dict(zip(models, style.shades(len(models)), strict=True))
    samplers = list(dict.fromkeys(sampler for _, sampler in lines))
    dashes = dict(zip(samplers, ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))] * len(samplers), strict=False))
    ends, along = [], []
    ax.set_xscale("log")
    ax.set_yscale("log")
    for (name, sampler), values in lines.items():
        xs = sorted(values)
        fids = [values[x] for x in xs]
        ax.plot(xs, fids, color=hues[name], linestyle=dashes[sampler], marker="o", markersize=3)
        ends.append((xs[-1], fids[-1]))
        along += _between(xs, fids)
    ax.set_xlabel("Compute of drawing one image, GFLOPs (evaluations \u00d7 forward)")
    ax.set_ylabel(score_name(protocol))
    texts = [name if len(samplers) == 1 else f"{name}, {sampler}" for name, sampler in lines]
    _finish(ax, ends, texts, along, [hues[name] for name, _ in lines])
    ax.set_title("Samplers: " + ", ".join(samplers))
    return figure


def loss_curves(rows: Sequence[Row], reference: dict[str, list[tuple[int, float]]]):
    """Plots training loss against steps: a colour per model (by GMACs), a line per seed, dashed reference runs of the same name.

    None if no run has recorded a loss. A curve of more than 200 points is averaged to 200.
    """
    shown, names = groups([row for row in rows if len(row.loss_curve) > 1]), labels(rows)
    if not shown:
        return None
    figure, (ax,) = panels(1)
    ends, texts, colours, late = [], [], [], []
    longest = max(row.loss_curve[-1][0] for repetitions in shown.values() for row in repetitions)
    for (group, repetitions), colour in zip(shown.items(), style.shades(len(shown)), strict=True):
        for row in repetitions:
            steps, losses = _thinned(row.loss_curve)
            ax.plot(steps, losses, color=colour, linewidth=1)
            late += losses[steps >= 0.15 * longest].tolist()
            if row.name in reference:
                ax.plot(*_thinned(reference[row.name]), color=style.INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=3)
        ends.append(max(row.loss_curve[-1] for row in repetitions))
        texts.append(names[group])
        colours.append(colour)
    room = 0.05 * (max(late) - min(late)) or 0.1 * abs(max(late)) or 1.0
    ax.set_ylim(min(late) - 2 * room, max(late) + room)
    ax.set_xlim(0, longest)
    ax.set_xlabel("Training steps")
    ax.set_ylabel("Training loss, mean since the last record")
    used = any(row.name in reference for row in rows)
    ax.set_title("Dashed: reference curves" if used else "A line per run")
    style.label_ends(ax, ends, texts, colours)
    return figure


def _thinned(curve: Sequence[tuple[int, float]]) -> np.ndarray:
    """Averages neighbours of a curve: steps and values, [2, <= MAX_CURVE_POINTS]."""
    parts = np.array_split(np.asarray(curve, float), min(len(curve), MAX_CURVE_POINTS))
    return np.array([part.mean(axis=0) for part in parts]).T


def sample_grid(rows: Sequence[Row]):
    """Shows the first images of each model in a row, ordered by GMACs; a column has one seed and label. None without samples."""
    names = labels(rows)
    samples = [
        (names[group], images)
        for group, repetitions in groups(rows).items()
        if repetitions[0].samples and len(images := first_images(Path(repetitions[0].samples), SAMPLES_SHOWN))
    ]
    if not samples:
        return None
    plt = style.pyplot()
    columns = max(len(images) for _, images in samples)
    cell, margin = 0.42 if samples[0][1].shape[1] < 64 else 0.6, 0.15 + 0.08 * max(len(name) for name, _ in samples)  # inches
    width = cell * columns + margin
    figure, axes = plt.subplots(
        len(samples),
        columns,
        figsize=(width, cell * len(samples)),
        squeeze=False,
        layout="none",
        gridspec_kw={"wspace": 0.06, "hspace": 0.06},
    )
    figure.subplots_adjust(left=margin / width, right=0.99, bottom=0.01, top=0.99)
    for axis in axes.flat:
        axis.set_axis_off()
    for (name, images), line in zip(samples, axes, strict=True):
        line[0].text(-0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    return figure


def first_images(path: Path, count: int) -> np.ndarray:
    """Reads the first images of arr_0 of an npz, uint8 [<= count, H, W, C], without reading the rest."""
    with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as array:
        major, _ = np.lib.format.read_magic(array)
        header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(array)
        if fortran or dtype != np.uint8 or len(shape) != 4:
            return np.zeros((0, 1, 1, 1), np.uint8)
        shape = (min(count, shape[0]), *shape[1:])
        return np.frombuffer(array.read(int(np.prod(shape))), np.uint8).reshape(shape)
