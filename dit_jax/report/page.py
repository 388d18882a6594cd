"""The page of a run: its scores, curves, pictures, config and machine."""

import datetime
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.errors import UserError
from dit_jax.report import parts, style
from dit_jax.report.collect import Collected, read
from dit_jax.runtime.console import duration
from dit_jax.storage.atomic import write_atomic
from dit_jax.storage.run_folder import flatten
from dit_jax.training.summary import score

FILE = "report.html"
MOST_PREVIEWS = 6
SIZE = 3.4, 2.1  # inches: text is as large as that of the page where a phone shows one figure per row
LOG_RANGE = 4.0  # largest over smallest value from which on an axis is logarithmic
CURVES = {
    "loss": "Training loss",
    "fid": "Fréchet distance of the samples while training",
    "psnr": "PSNR of the reconstructions, dB",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
}


def write(folder: Path) -> Path:
    """Writes report.html into the folder of a run, and returns its path.

    Raises:
        UserError: it is not the folder of a run, or cannot be written.
    """
    file, page = folder / FILE, text(read(folder))
    try:
        write_atomic(file, page.encode("utf-8", "backslashreplace"))  # paths and names may hold bytes that are not UTF-8
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); make the folder writable") from None
    return file


def text(run: Collected) -> str:
    """The page."""
    title = f"{run.folder.name}: {_what(run.config)}"
    state = f"{run.last_step:,} of {run.config.get('num_steps', 0):,} steps"
    lead = score(run.result) if run.result else f"Not finished: {state} are recorded."
    sections = [
        ("", f'<p class="lead">{html.escape(lead[0].upper() + lead[1:].rstrip("."))}.</p>'),
        ("Training", parts.side_by_side(_curves(run))),
        ("Results", _final(run)),
        ("One seed over time", _previews(run)),
        ("From noise to image", _denoising(run)),
        ("Run", _facts(run)),
    ]
    body = "".join(f"<h2>{name}</h2>{content}" if name else content for name, content in sections if content)
    return parts.page(title, body)


def _what(config: dict[str, Any]) -> str:
    """ "dit on digits"."""
    model = config.get("model") or config.get("codec") or {}
    return f"{model.get('name', 'a run')} on {config.get('data', {}).get('name', 'images')}"


def _curves(run: Collected) -> list[str]:
    plt = style.pyplot()
    figures = []
    with plt.rc_context(style.SETTINGS):
        for name, label in CURVES.items():
            points = run.curves.get(name, ())
            if len(points) > 1:
                figure = _draw(plt, points, name)
                last = f"{label}; {points[-1][1]:.4g} at step {points[-1][0]:,}."
                svg = style.inline_svg(figure, name.replace("_", "-"), html.escape(last, quote=True))
                figures.append(parts.figure(svg, html.escape(last)))
                plt.close(figure)
    return figures


def _draw(plt, points: Sequence[tuple[int, float]], name: str):
    steps, values = np.asarray(points, float).T
    figure, ax = plt.subplots(figsize=SIZE)
    ax.plot(steps, values, color=style.COLOURS[0], marker="o" if len(steps) < 30 else "", markersize=2.5)
    ax.set_xlabel("step")
    ax.set_xlim(0, steps[-1])
    if name in ("loss", "fid") and values.min() > 0 and values.max() > LOG_RANGE * values.min():
        ax.set_yscale("log")
        style.log_ticks(ax.yaxis)
    elif name in ("learning_rate", "images_per_second"):
        ax.set_ylim(0, 1.08 * max(values.max(), 1e-12))
    return figure


def _final(run: Collected) -> str:
    figures = []
    if run.final is not None:
        step = f"step {run.result['step']:,}"
        made = f"Samples from the moving average, {step}, uncurated" if "model" in run.config else f"Reconstructions, {step}"
        below = " Each has its prompt below it." if run.config.get("conditioner", {}).get("name") == "text" else ""
        figures.append(parts.figure(parts.image(run.final, made), f"{made}.{below}"))
    if run.real is not None:
        figures.append(parts.figure(parts.image(run.real, "Real images"), "Images of the data set, of the same classes."))
    return parts.side_by_side(figures) if figures else ""


def _previews(run: Collected) -> str:
    if len(run.previews) < 2:
        return ""
    shown = [run.previews[i] for i in sorted({*np.linspace(0, len(run.previews) - 1, MOST_PREVIEWS).round().astype(int)})]
    figures = (parts.figure(parts.image(file, f"step {step}"), f"Step {step:,}.") for step, file in shown)
    same = "prompts" if run.config.get("conditioner", {}).get("name") == "text" else "labels"
    return parts.side_by_side(figures) + f'<p class="soft">The noise and the {same} are the same at every step.</p>'


def _denoising(run: Collected) -> str:
    if run.denoising is None:
        return ""
    caption = (
        "A row is one image. From left to right: what the network takes for the clean image at times from 1 (noise) to 0, and "
        "the sample."
    )
    return parts.figure(parts.image(run.denoising, caption), caption, "scroll")


def _facts(run: Collected) -> str:
    result, machine = run.result, run.result.get("machine") or {}
    values = {
        "folder": run.folder,
        "steps": f"{run.last_step:,} of {run.config.get('num_steps', 0):,}, batch {run.config.get('batch_size')}",
        "branch of": "; ".join(run.branch),
        "went back": "; then ".join(run.rewinds),
        "time": duration(run.wall_seconds) + " since the last start" if run.wall_seconds else None,
        "training": f"{run.goodput:.0%} of that time" if run.goodput else None,
        "devices": f"{machine['num_devices']} x {machine['device']} ({machine['platform']})" if machine else None,
        "CPU": f"{machine['cpu']}, {machine['cores']} cores" if machine else None,
        "versions": ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) if machine else None,
        "commit": result.get("commit"),
        "page": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }
    known = parts.facts({name: value for name, value in values.items() if value})
    config = parts.facts({k: "none" if v is None else v for k, v in flatten(run.config).items() if k != "imports"})
    return known + _starts(run) + parts.details("Config", config)


def _starts(run: Collected) -> str:
    """A table of the starts; "" for a run that has no log of them."""
    rows = []
    for number, start in enumerate(run.starts, 1):
        last = number == len(run.starts)
        ended = start.get("ended", "killed, or still running" if last else "killed")
        cells = (
            _date(start.get("began")),
            start.get("host", ""),
            start.get("devices", ""),
            f"{start.get('first_step', '')} to {start.get('last_step', '?')}",
            ended if "status" not in start else f"{ended} (status {start['status']})",
        )
        rows.append([html.escape(str(cell)) for cell in cells])
    return (
        parts.details(f"Starts: {len(rows)}", parts.table(("Began", "Host", "Devices", "Steps", "Ended"), rows)) if rows else ""
    )


def _date(seconds: Any) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"
    except (TypeError, ValueError, OverflowError, OSError):
        return "?"
