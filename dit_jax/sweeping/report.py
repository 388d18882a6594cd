"""The report of a sweep: one HTML page that needs nothing else, and the figures as files of their own."""

import base64
import datetime
import html
import os
from dataclasses import dataclass
from pathlib import Path

from dit_jax.console import duration, say
from dit_jax.sweeping import collect, figures, paper, points, style
from dit_jax.sweeping.collect import Row
from dit_jax.sweeping.cost import Cost
from dit_jax.sweeping.folder import Folder
from dit_jax.sweeping.grid import Run, Sweep
from dit_jax.training.summary import versions

CSS = """
:root { --page: #fefefd; --ink: #1c1c1b; --soft: #5d5d5a; --grid: #dededc; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --page: #191a1b; --ink: #e6e6e3; --soft: #a4a4a0; --grid: #3c3d3e; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin-bottom: .3rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead { font-size: 1.05rem; } .soft, figcaption { color: var(--soft); } figcaption { font-size: .9rem; }
figure { margin: 1rem 0 2rem; } figure svg, figure img { width: 100%; height: auto; } figure.narrow { max-width: 38rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; width: 100%; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; vertical-align: bottom; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }
a { color: inherit; }
@media print { :root { --page: #fff; --ink: #000; --soft: #444; --grid: #ccc; }
  body { margin: 0; max-width: none; font-size: 10pt; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Written:
    """done: how many runs have a result.  files: {"report", "results", "csv": path, "figures": paths}."""

    done: int
    files: dict


def check_possible(sweep: Sweep, sweep_file: str):
    """Raises a UserError for what would keep the report from being written: before hours of training."""
    style.pyplot()
    reference(sweep, sweep_file)


def reference(sweep: Sweep, sweep_file: str) -> dict[str, list[tuple[int, float]]]:
    if not sweep.reference_curves:
        return {}
    return collect.read_curves(Path(sweep_file).expanduser().parent / sweep.reference_curves)


def write(sweep: Sweep, sweep_file: str, runs: list[Run], costs: list[Cost], folder: Folder, command: str) -> Written:
    """Collects what there is and writes results.json, results.csv, curves.csv, figures/ and report.html.

    Runs that are not finished are in the table and not in the figures of scores.
    """
    rows = [collect.read(run, cost, sweep.samplers, folder) for run, cost in zip(runs, costs, strict=True)]
    files = collect.write(rows, folder.path)
    protocol, others = collect.shared_protocol(rows)
    compared = [row for row in rows if row not in others]
    plt = style.pyplot()
    with plt.rc_context(style.SETTINGS):
        drawn = draw(sweep, rows, compared, protocol, reference(sweep, sweep_file))
        parts, paths = [], []
        for number, (name, (figure, caption)) in enumerate(drawn.items(), 1):
            paths += style.save(figure, folder.path / "figures", name)
            parts.append(_figure(number, name, figure, caption, folder.path))
            plt.close(figure)
    page = _page(sweep, rows, compared, others, protocol, command, parts)
    file = folder.path / "report.html"
    partial = file.with_name(".report.html.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, file)
    done = sum(row.state in ("done", "trained") for row in rows)
    say(f"{done} of {len(rows)} runs are in the report: {file}")
    return Written(done, {"report": str(file), **files, "figures": [str(path) for path in paths]})


def draw(sweep: Sweep, rows: list[Row], compared: list[Row], protocol: dict, curves: dict) -> dict:
    """{name: (figure, caption)} of what there is to show."""
    found = {}
    beside = "the paper's own models are " + ("hollow." if points.comparable(protocol) else
                                              "on axes of their own: another metric.") if sweep.paper else ""
    if any(row.fid is not None for row in compared):
        several = len({row.seed for row in rows}) > 1
        seeds = "A marker is the mean over seeds, the line through it spans them. " if several else (
            "The line through a marker is the 95 % bootstrap interval over its images. " if any(
                row.fid_interval for row in compared) else "")
        found["fid_gflops"] = figures.fid_against("gmacs", compared, protocol, sweep.paper), (
            f"Quality against the compute of one forward. {seeds}Dashed: least squares in log GFLOPs; r is Pearson's "
            f"correlation, its interval by Fisher's z. {beside.capitalize()}")
        found["fid_training_compute"] = figures.fid_against("compute_gmacs", compared, protocol, sweep.paper), (
            "Quality against total training compute: GMACs x batch size x steps x 3. Thin lines, where there are any: FIDs of "
            "checkpoints during training.")
    if figure := figures.sampling_compute(compared, protocol):
        found["fid_sampling_compute"] = figure, (
            "Quality against the compute of drawing one image: the finished models, sampled with other numbers of steps.")
    if figure := figures.loss_curves(rows, curves):
        found["loss"] = figure, "Training loss. Models with other patch sizes or targets have losses of their own."
    if figure := figures.sample_grid(rows):
        found["samples"] = figure, (
            "Samples from the moving-average weights, not chosen: the first of each model's final samples. A column has one seed "
            "and one label; rows from the smallest to the largest model.")
    return found


def _figure(number: int, name: str, figure, caption: str, folder: Path) -> str:
    if name == "samples":
        data = base64.b64encode((folder / "figures" / f"{name}.png").read_bytes()).decode()
        picture = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
    else:
        picture = style.inline_svg(figure, name.replace("_", "-"), html.escape(caption, quote=True))
    narrow = ' class="narrow"' if figure.get_size_inches()[0] < 0.8 * style.WIDTH else ""
    links = " ".join(f'<a href="figures/{name}.{suffix}">{suffix.upper()}</a>' for suffix in style.FORMATS)
    return (f"<figure{narrow}>{picture}<figcaption><b>Figure {number}.</b> {html.escape(caption)} {links}</figcaption></figure>")


def _lead(sweep: Sweep, compared: list[Row]) -> str:
    done = sum(row.state in ("done", "trained") for row in compared)
    text = f"{done} of {len(compared)} runs are finished."
    if line := points.fit(points.ours(compared)):
        per = -line.slope
        text += (f" Log GFLOPs and the Fréchet distance correlate with {line.text()}; tenfold GFLOPs "
                 f"{'lower' if per > 0 else 'raise'} it by {abs(per):.3g}.")
    if sweep.paper:
        text += f" In the paper: {points.fit(points.of_paper()).text()}."
    return html.escape(text)


def _cell(value) -> str:
    if value is None:
        return "-"
    return html.escape(f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value))


def _table(rows: list[Row], compared: list[Row]) -> str:
    head = ("run", "parameters", "GMACs", "training compute, GMACs", "loss", "Fréchet distance", "time", "state")
    lines = []
    for row in sorted(rows, key=lambda row: (row.cost.gmacs, row.name)):
        fid = _cell(row.fid) + ("" if row in compared else "*")
        numbers = (row.name, row.cost.parameters, row.cost.gmacs, row.cost.compute_gmacs, row.loss)
        cells = [*map(_cell, numbers), fid, duration(row.seconds) if row.seconds else "-", row.state]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return ('<div class="wide"><table><thead><tr>' + "".join(f"<th>{name}</th>" for name in head) + "</tr></thead><tbody>"
            + "".join(lines) + "</tbody></table></div>")


def _method(sweep: Sweep, rows: list[Row], protocol: dict, command: str) -> str:
    from dit_jax.benchmarking import machine

    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    made = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in protocol.items()) or "nothing is scored yet"
    steps = sorted({(row.num_steps, row.batch_size) for row in rows})
    work = "; ".join(f"{count:,} steps at batch {batch}" for count, batch in steps[:4])
    return "".join(f"<p>{text}</p>" for text in (
        html.escape(f"{len(rows)} runs, {len({row.group for row in rows})} models, seeds "
                    f"{', '.join(map(str, sorted({row.seed for row in rows})))}: {work}. {sweep.note}"),
        html.escape(f"Scores: {made}."),
        "GMACs are multiply-adds of one forward of one image, counted from the architecture; the paper prints them as Gflops. "
        "Time is training, sampling and scoring of a run, whatever else the machine did.",
        html.escape(f"This page: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC on {machine.cpu_model()}, "
                    f"{machine.cores()} cores, with {software}. The runs' own machines and dates are in their folders."),
    )) + f"<pre>{html.escape(command)}</pre>"


def _page(sweep, rows, compared, others, protocol, command, parts) -> str:
    title = html.escape(sweep.title)
    notes = ""
    if others:
        names = html.escape(", ".join(row.name for row in others))
        notes += f"<p>* Scored by another protocol than the rest, and in none of the figures of scores: {names}.</p>"
    for row in rows:
        if row.error:
            text = html.escape("\n".join(row.error))
            notes += f"<h3>{html.escape(row.name)} failed</h3><pre>{text}</pre>"
    credit = html.escape(f"The paper's points: {paper.CITATION}, Scalable Diffusion Models with Transformers, arXiv 2212.09748.")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{CSS}</style></head><body>
<h1>{title}</h1>
<p class="lead">{_lead(sweep, compared)}</p>
{"".join(parts)}
<h2>Runs</h2>
{_table(rows, compared)}{notes}
<p class="soft">The same as <a href="results.json">JSON</a> and <a href="results.csv">CSV</a>; all loss curves as
<a href="curves.csv">CSV</a>.</p>
<h2>Method</h2>
{_method(sweep, rows, protocol, command)}
{f'<p class="soft">{credit}</p>' if sweep.paper else ""}
</body></html>
"""
