"""The HTML page of a sweep's report: figures, a table of the runs, and a description of the method."""

import datetime
import html
from collections.abc import Sequence
from pathlib import Path

from dit_jax.benchmark import machine
from dit_jax.report import parts, style
from dit_jax.runtime import versions
from dit_jax.runtime.console import duration
from dit_jax.sweep import paper, points
from dit_jax.sweep.collect import Row
from dit_jax.sweep.grid import Sweep

VALIDATION = (
    "The validation loss is the squared error of the predicted x0 of held-out examples, in the units of the latents: the mean "
    "over ten noise levels, sigma / alpha from 0.1 to 10, with the same noise for all runs, in float32, of the moving average."
)


def figure(number: int, name: str, drawn, caption: str, folder: Path) -> str:
    """Makes the <figure> element of a drawing, with links to its files in <folder>/figures."""
    if name == "samples":
        picture = parts.image(folder / "figures" / f"{name}.png", caption)
    else:
        picture = style.inline_svg(drawn, name.replace("_", "-"), html.escape(caption, quote=True))
    kind = "narrow" if drawn.get_size_inches()[0] < 0.8 * style.WIDTH else ""
    links = " ".join(f'<a href="figures/{name}.{suffix}">{suffix.upper()}</a>' for suffix in style.FORMATS)
    return parts.figure(picture, f"<b>Figure {number}.</b> {html.escape(caption)} {links}", f"{kind} scroll".strip())


def write(sweep: Sweep, rows: list[Row], others: list[Row], protocol: dict, commands: Sequence[str], drawn: Sequence[str]) -> str:
    """Makes the page.

    Args:
        others: rows that are in no figure of scores.
        protocol: of the scores of the other rows.
        commands: the command of the report, then those of the runs.
        drawn: the <figure> elements.
    """
    notes = ""
    if others:
        names = html.escape(", ".join(row.name for row in others))
        notes += f"<p>* Scored with another protocol than the others, and therefore not in the figures of scores: {names}.</p>"
    for row in rows:
        if row.error:
            text = html.escape("\n".join(row.error))
            notes += f"<h3>{html.escape(row.name)} failed</h3><pre>{text}</pre>"
    credit = html.escape(f"The paper's points: {paper.CITATION}, Scalable Diffusion Models with Transformers, arXiv 2212.09748.")
    listed = parts.details("Commands of the runs", f"<pre>{html.escape(chr(10).join(commands[1:]))}</pre>")
    return parts.page(
        sweep.title,
        f"""<p class="lead">{_lead(sweep, rows, others)}</p>
{"".join(drawn)}
<h2>Runs</h2>
{_table(rows, others)}{notes}
<p class="soft">The same data as <a href="results.json">JSON</a> and <a href="results.csv">CSV</a>; all loss curves as
<a href="curves.csv">CSV</a>.</p>
<h2>Method</h2>
{_method(sweep, rows, protocol)}
<pre>{html.escape(commands[0])}</pre>
{listed}
{f'<p class="soft">{credit}</p>' if sweep.paper else ""}""",
    )


def _lead(sweep: Sweep, rows: list[Row], others: list[Row]) -> str:
    done = sum(row.state == "done" for row in rows)
    text = f"{done} of {len(rows)} runs are finished."
    if sweep.compare:
        return html.escape(text + _best(rows, others))
    if line := points.fit(points.ours([row for row in rows if row not in others])):
        text += (
            f" The correlation of log GFLOPs and the Fréchet distance is {line.text()}; ten times the GFLOPs "
            f"{'lower' if line.slope < 0 else 'raise'} it by {abs(line.slope):.3g}."
        )
    if sweep.paper and (line := points.fit(points.of_paper())):
        text += f" In the paper: {line.text()}."
    return html.escape(text.replace(" -", " \N{MINUS SIGN}"))


def _best(rows: list[Row], others: list[Row]) -> str:
    """The best model of each score, over the means of seeds, and that of each series."""
    compared, text = [row for row in rows if row not in others], ""
    for score, name in (("fid", "Fréchet distance"), ("validation_loss", "validation loss")):
        found = sorted(points.ours(compared, score), key=lambda point: point.fid)
        if found:
            best = {point.series: point for point in reversed(found)}
            listed = ", ".join(f"{p.series} {p.fid:.4g} ({p.name})" for p in sorted(best.values(), key=lambda p: p.fid))
            text += f" Lowest {name} of each: {listed}."
    return text


def _cell(value) -> str:
    if value is None:
        return "-"
    return html.escape(f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value))


def _table(rows: list[Row], others: list[Row]) -> str:
    head = ["run", "parameters", "GMACs", "training compute, GMACs", "loss", "Fréchet distance", "95 % interval", "time", "state"]
    more = [name for name in ("validation_loss", "seconds_per_image") if any(getattr(row, name) is not None for row in rows)]
    head += [{"validation_loss": "validation loss", "seconds_per_image": "training, s per image"}[name] for name in more]
    lines = []
    for row in sorted(rows, key=lambda row: (row.cost.gmacs, row.name)):
        fid = _cell(row.fid) + "*" * (row in others)
        interval = " to ".join(f"{bound:.3g}" for bound in row.fid_interval or ()) or "-"
        numbers = (row.name, row.cost.parameters, row.cost.gmacs, row.cost.compute_gmacs, row.loss)
        cells = [*map(_cell, numbers), fid, interval, duration(row.seconds) if row.seconds else "-", row.state]
        cells += [_cell(getattr(row, name)) for name in more]
        lines.append(cells)
    return parts.table(head, lines)


def _method(sweep: Sweep, rows: list[Row], protocol: dict) -> str:
    made = (
        "; ".join(f"{key} {' x '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in protocol.items())
        or "there are no scores yet"
    )
    steps = sorted({(row.num_steps, row.batch_size) for row in rows})
    work = "; ".join(f"{count:,} steps at batch {batch}" for count, batch in steps[:4])
    return parts.paragraphs(
        f"{len(rows)} runs, {len({row.group for row in rows})} models, seeds "
        f"{', '.join(map(str, sorted({row.seed for row in rows})))}: {work}. {sweep.note}",
        f"Scores: {made}. The interval in the table is a bootstrap over the images of one run; it does not cover seeds.",
        "GMACs are multiply-adds of one forward pass of one image, counted from the architecture (Gflops in the paper). "
        "Time is the wall time of training, sampling and scoring, including the effect of other load on the machine. Seconds per "
        "image are those of training alone: the median step over the batch size.",
        *(VALIDATION,) * any(row.validation_loss is not None for row in rows),
        _origin(rows),
        f"This page: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC on {machine.cpu_model()}, {machine.cores()} "
        f"cores, with {versions.one_line()}.",
    )


def _origin(rows: list[Row]) -> str:
    """Dates, machines, devices and code versions of the runs, as far as their folders record them."""

    def distinct(values):
        return ", ".join(sorted({str(value) for value in values if value}))

    starts = [start for row in rows for start in row.starts]
    dates = sorted(start["started"][:16].replace("T", " ") for start in starts)
    when = f"started here from {dates[0]} to {dates[-1]} UTC" if dates else "trained elsewhere"
    devices = distinct(f"{row.origin['num_devices']} x {row.origin['device']}" for row in rows if "device" in row.origin)
    facts = {
        "on": distinct(start.get("machine") for start in starts),
        "JAX devices": devices,
        "commit": distinct(row.origin.get("commit") for row in rows),
        "jax": distinct(row.origin.get("versions", {}).get("jax") for row in rows),
    }
    return "; ".join([f"Runs: {when}", *(f"{name} {text}" for name, text in facts.items() if text)]) + "."
