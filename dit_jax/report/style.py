"""The style of the figures: 8-point text for print, and colours that colour-blind readers can distinguish.

Colours are those of Okabe & Ito (2008), suitable on white and on black. `inline_svg` replaces INK, GRID and PAGE by the colours
of the page, which may be dark.
"""

import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit_jax.errors import UserError
from dit_jax.storage.atomic import replacing

INK, GRID, PAGE = "#1c1c1b", "#dededc", "#fefefd"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RAMP = ("#3d74d6", "#16919b", "#5c9632", "#b5830f", "#cf5a35")  # blue to red, each with a contrast of 3 to white and to black
MARKERS = {1: "D", 2: "o", 4: "s", 8: "^"}
OTHER_MARKERS = ("v", "P", "X", "<", ">")
WIDTH, HEIGHT = 7.0, 2.9  # inches: two columns of text
FORMATS = ("png", "svg", "pdf")
PLAIN = 0.99e-4, 1.01e4  # numbers in this range are not written as powers of ten
SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": PAGE,
    "figure.facecolor": PAGE,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    # Letters as outlines in SVG, as an embedded font in PDF: the same on every machine.
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "svg.hashsalt": "dit_jax",
    "savefig.dpi": 300,
}


def pyplot():
    """matplotlib.pyplot on the Agg backend.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "the report's figures need matplotlib: pip install 'dit_jax[report]'; --list and --launch on other machines do not"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def markers(patches: Sequence[int]) -> dict[int | None, str]:
    others = itertools.cycle(OTHER_MARKERS)
    return {patch: MARKERS.get(patch) or next(others) for patch in sorted(set(patches))}


def colours(names: Sequence[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(names), itertools.cycle(COLOURS)))


def shades(count: int) -> list:
    """A sequence of colours from small to large."""
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("ramp", RAMP)
    return [ramp(i / max(count - 1, 1)) for i in range(count)]


def label_points(ax, points: Sequence[tuple[float, float]], texts: Sequence[str], others: Sequence = (), hues: Sequence = ()):
    """Writes each text next to its point, without covering points or other texts if possible. Set the limits first.

    others: additional points that must not be covered, such as those of lines.  hues: colours of the texts; ink if empty.
    """
    figure = ax.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    pixels = ax.transData.transform(points)
    point = figure.dpi / 72
    taken = [(x - 4 * point, y - 4 * point, x + 4 * point, y + 4 * point) for x, y in pixels]
    taken += [(x - point, y - point, x + point, y + point) for x, y in (ax.transData.transform(others) if len(others) else [])]
    frame = ax.get_window_extent(renderer)
    places = [
        (0, 9),
        (7, 0),
        (0, -9),
        (-7, 0),
        (6, 6),
        (-6, 6),
        (6, -6),
        (-6, -6),
        (0, 16),
        (15, 0),
        (0, -16),
        (-15, 0),
        (0, 25),
        (0, -25),
    ]
    for (x, y), text, data, hue in zip(pixels, texts, points, hues or [INK] * len(points), strict=True):
        probe = ax.text(*data, text, fontsize=7)
        size = probe.get_window_extent(renderer)
        probe.remove()
        options = []
        for dx, dy in places:
            cx, cy = x + dx * point + (dx > 0) * size.width / 2 - (dx < 0) * size.width / 2, y + dy * point
            box = (cx - size.width / 2, cy - size.height / 2, cx + size.width / 2, cy + size.height / 2)
            outside = box[0] < frame.x0 or box[1] < frame.y0 or box[2] > frame.x1 or box[3] > frame.y1
            ambiguous = any(_gap(box, other) <= _gap(box, (x, y)) for other in pixels if tuple(other) != (x, y))
            covered = sum(_overlap(box, other) for other in taken)
            options.append((covered + 1e4 * outside + 1e3 * ambiguous, len(options), dx, dy, box))
        _, _, dx, dy, box = min(options)
        taken.append(box)
        ax.annotate(
            text,
            data,
            (dx, dy),
            textcoords="offset points",
            fontsize=7,
            va="center",
            color=hue,
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
        )


def _gap(box, point) -> float:
    return float(np.hypot(max(box[0] - point[0], 0, point[0] - box[2]), max(box[1] - point[1], 0, point[1] - box[3])))


def _overlap(a, b) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def label_ends(ax, ends: Sequence[tuple[float, float]], texts: Sequence[str], colours: Sequence):
    """Writes each text to the right of a line's end, moved up or down if two would overlap. Set the limits first."""
    figure = ax.figure
    figure.canvas.draw()
    height = 9.0 * figure.dpi / 72
    pixels = ax.transData.transform(ends)
    order = sorted(range(len(ends)), key=lambda i: pixels[i][1])
    middle: dict[int, float] = {}
    for rank, i in enumerate(order):
        below = middle[order[rank - 1]] + height if rank else -1e9
        middle[i] = max(pixels[i][1], below)
    # Shift all labels down again by the mean displacement, as far as there is room above the axis.
    shift = (sum(middle.values()) - sum(y for _, y in pixels)) / max(len(ends), 1)
    shift = min(shift, min(middle.values()) - ax.get_window_extent().y0 - height)
    for i, (text, colour) in enumerate(zip(texts, colours, strict=True)):
        offset = (middle[i] - shift - pixels[i][1]) * 72 / figure.dpi
        ax.annotate(
            text, ends[i], (4, offset), textcoords="offset points", fontsize=7, va="center", color=colour, annotation_clip=False
        )


def log_ticks(axis):
    """Sets the ticks of a logarithmic axis: powers of ten above two decades, more below. Set the limits first."""
    from matplotlib import ticker

    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    subs: Sequence[int] = (
        (1,) if decades > 2 else (1, 2, 5) if decades > 0.7 else (1, 2, 3, 5, 7) if decades > 0.25 else range(1, 10)
    )
    if not PLAIN[0] <= low < high <= PLAIN[1] and decades > 0.5:  # longer labels
        subs = (1,) if decades > 1.5 else (1, 3)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(_log_label))
    axis.set_minor_formatter(ticker.NullFormatter())


def _log_label(value: float, _) -> str:
    """Formats a tick: "0.02", "500" or "10\u2078"."""
    if PLAIN[0] <= value <= PLAIN[1]:
        return f"{value:g}"
    exponent = int(np.floor(np.log10(value) + 1e-9))
    digit = value / 10.0**exponent
    factor = "" if abs(digit - 1) < 1e-6 else f"{digit:g}\\times "
    return f"${factor}10^{{{exponent}}}$"


def save(figure, folder: Path, name: str) -> list[Path]:
    """Writes the figure as PNG, SVG and PDF, each atomically."""
    paths = []
    for suffix in FORMATS:
        path = folder / f"{name}.{suffix}"
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
        with replacing(path) as partial:
            figure.savefig(partial, format=suffix, metadata=dates)
        paths.append(path)
    return paths


def inline_svg(figure, name: str, description: str) -> str:
    """Converts a figure to an <svg> element: no background, ink and grid in the page's colours, and unique ids."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = svg.replace(f"stroke: {GRID}", "stroke: currentColor; stroke-opacity: 0.16")
    svg = svg.replace(INK, "currentColor").replace(PAGE, f"var(--page, {PAGE})")
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None  # Matplotlib writes it
    head = f'<svg role="img" aria-label="{description}" viewBox="0 0 {size[1]} {size[2]}">'
    return head + svg[svg.index(">") + 1 :]
