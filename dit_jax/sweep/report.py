"""Writes the report of a sweep: tables and figures as files, and one self-contained HTML page."""

import shlex
from dataclasses import dataclass

from dit_jax.report import style
from dit_jax.runtime.console import say
from dit_jax.storage.atomic import write_atomic
from dit_jax.storage.paths import local_path
from dit_jax.sweep import collect, comparison, figures, page, points
from dit_jax.sweep.collect import Row
from dit_jax.sweep.cost import Cost
from dit_jax.sweep.folder import Folder
from dit_jax.sweep.grid import Run, Sweep
from dit_jax.sweep.local import main_command


@dataclass(frozen=True)
class Written:
    """A written report.

    Fields:
        done: number of runs with a result.
        files: {"report", "results", "csv": path, "figures": paths}.
    """

    done: int
    files: dict


def check_possible(sweep: Sweep, sweep_file: str):
    """Raises UserError if the report could not be written; call before hours of training."""
    style.pyplot()
    reference(sweep, sweep_file)


def reference(sweep: Sweep, sweep_file: str) -> dict[str, list[tuple[int, float]]]:
    if not sweep.reference_curves:
        return {}
    return collect.read_curves(local_path(sweep_file).parent / sweep.reference_curves)


def write(sweep: Sweep, sweep_file: str, runs: list[Run], costs: list[Cost], folder: Folder, command: str) -> Written:
    """Collects the available results and writes results.json, results.csv, curves.csv, figures/ and report.html.

    Unfinished runs are in the table, but not in the figures of scores.
    """
    rows = [collect.read(run, cost, sweep.samplers, folder, sweep.compare) for run, cost in zip(runs, costs, strict=True)]
    files = collect.write(rows, folder.path)
    protocol, others = collect.shared_protocol(rows)
    compared = [row for row in rows if row not in others]
    plt = style.pyplot()
    with plt.rc_context(style.SETTINGS):
        drawn = draw(sweep, rows, compared, protocol, reference(sweep, sweep_file))
        parts, paths = [], []
        for number, (name, (figure, caption)) in enumerate(drawn.items(), 1):
            paths += style.save(figure, folder.path / "figures", name)
            parts.append(page.figure(number, name, figure, caption, folder.path))
            plt.close(figure)
    commands = [command, *(shlex.join(["python", *main_command(run, folder.of(run))]) for run in runs)]
    text = page.write(sweep, rows, others, protocol, commands, parts)
    file = folder.path / "report.html"
    write_atomic(file, text)
    done = sum(row.state == "done" for row in rows)
    say(f"wrote the report with {done} of {len(rows)} runs finished: {file}")
    return Written(done, {"report": str(file), **files, "figures": [str(path) for path in paths]})


def draw(sweep: Sweep, rows: list[Row], compared: list[Row], protocol: dict, curves: dict) -> dict:
    """Draws the figures for which there are data, {name: (figure, caption)}."""
    figures_drawn = comparison.draw(sweep.compare, rows, compared, protocol) if sweep.compare else {}
    beside = (
        "the paper's models are "
        + ("hollow." if points.comparable(protocol) else "on separate axes, because the metric differs.")
        if sweep.paper
        else ""
    )
    if not sweep.compare and any(row.fid is not None for row in compared):
        several = len({row.seed for row in rows}) > 1
        seeds = (
            "A marker is the mean over seeds; the line through it is their range. "
            if several
            else (
                "The line through a marker is the 95 % bootstrap interval over its images. "
                if any(row.fid_interval for row in compared)
                else ""
            )
        )
        figures_drawn["fid_gflops"] = (
            figures.fid_against("gmacs", compared, protocol, sweep.paper),
            (
                f"Quality against the compute of one forward pass. {seeds}Dashed: least squares in log GFLOPs; r is Pearson's "
                f"correlation, its interval by Fisher's z. {beside.capitalize()}"
            ),
        )
        figures_drawn["fid_training_compute"] = (
            figures.fid_against("compute_gmacs", compared, protocol, sweep.paper),
            ("Quality of the finished models against their total training compute: GMACs x batch size x steps x 3."),
        )
    early, odd = collect.shared_protocol(rows, "fid_curve_protocol")
    if figure := figures.fid_while_training([row for row in rows if row not in odd], early):
        figures_drawn["fid_while_training"] = (
            figure,
            (
                "Quality of the moving average during training against the compute so far, one line per run. These scores "
                f"are cheaper than the final ones and not comparable with them: {early.get('images', 0):,} images, "
                f"{early.get('sampler')} with {early.get('steps')} steps."
            ),
        )
    if figure := figures.sampling_compute(compared, protocol):
        figures_drawn["fid_sampling_compute"] = (
            figure,
            ("Quality against the compute of sampling one image: the finished models with different numbers of steps."),
        )
    if figure := figures.loss_curves(rows, curves):
        figures_drawn["loss"] = (
            figure,
            (
                "Training loss; values above the axis are cut off. Losses of models with different patch sizes or targets are "
                "not comparable."
            ),
        )
    if figure := figures.sample_grid(rows):
        figures_drawn["samples"] = (
            figure,
            (
                "Uncurated samples from the moving-average weights: the first ones of each model. A column has one seed "
                "and one label; rows are ordered from the smallest to the largest model."
            ),
        )
    return figures_drawn
