"""Reports of sweeps: what is collected, fitted, drawn and written."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from finished_sweep import SWEEP, write_finished
from html_structure import Structure

from dit_jax.errors import UserError
from dit_jax.report import style
from dit_jax.sweep import collect, cost, figures, grid, paper, points, report
from dit_jax.sweep.fits import log_linear
from dit_jax.sweep.folder import Folder
from dit_jax.sweep.grid import Sweep


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_finished(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def rows(finished):
    folder, runs, costs = finished
    return [collect.read(run, c, SWEEP.samplers, folder) for run, c in zip(runs, costs, strict=True)]


def test_fit_against_numpy_and_scipy():
    """A slope per e-fold instead of per decade, a correlation of the wrong pair, an interval of the wrong width."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x = 10.0 ** rng.uniform(-2, 2, 9)
    y = 30 - 12 * np.log10(x) + rng.normal(0, 4, 9)
    found = log_linear(x, y)
    np.testing.assert_allclose((found.slope, found.intercept), np.polyfit(np.log10(x), y, 1), rtol=1e-10)
    oracle = stats.pearsonr(np.log10(x), y)
    interval = oracle.confidence_interval(0.95)
    np.testing.assert_allclose((found.correlation, found.low, found.high), (oracle.statistic, *interval), rtol=1e-9)
    assert found(100.0) == pytest.approx(found.intercept + 2 * found.slope)


def test_fits_that_mean_nothing():
    """A line through one x, or an interval from three points."""
    assert log_linear([1, 1, 1], [1, 2, 3]) is None and log_linear([], []) is None and log_linear([1, 2], [1, 2]) is None
    assert log_linear([1, 10, 100], [3, 2, 2]).low is None and log_linear([1, 10, 100, 1000], [4, 3, 2, 1]).high is None
    with pytest.raises(ValueError, match="positive"):
        log_linear([0, 1, 2], [1, 2, 3])


def test_the_papers_correlation():
    """A table with a wrong number: the paper says -0.93."""
    found = points.fit(points.of_paper())
    assert round(found.correlation, 2) == -0.93 and found.num_points == 12
    computes = {point.name: point.compute_gmacs for point in points.of_paper()}
    assert computes["XL/2"] == pytest.approx(3.64e10, rel=1e-2)
    assert set(paper.FIDS) == set(grid.load("configs/sweeps/gflops_imagenet256.py").variants)


def test_collected(rows):
    """Times of the last start only, a NaN in a curve, a cut line, samples that are lost when a folder moves."""
    first, failed = rows[0], rows[7]
    assert first.seconds == 90.0 and first.loss_curve[1][0] == 300 and len(first.loss_curve) == 14
    assert first.samples.endswith("samples/x_final.npz") and len(first.samplers) == 2
    assert failed.state == "failed" and failed.fid is None and "alert(1)" in failed.error[-1]
    assert first.protocol == {
        "features": "pixels",
        "images": 1000,
        "reference": "ab",
        "sampler": "ddpm",
        "steps": 100,
        "guidance": 1.0,
    }
    assert first.fid_curve == [(500, 9.0), (1000, 8.0)] and first.fid_curve_protocol["images"] == 50
    found = points.ours(rows)
    assert [(point.name, len(point.fids)) for point in found] == [("a/1", 2), ("b/2", 2), ("c/4", 2), ("d/8", 1)]
    assert found[0].fid == pytest.approx(np.mean([rows[0].fid, rows[1].fid]))


def test_other_protocols_are_left_out(rows):
    """FIDs of 1,000 and of 50,000 samples, or in pixels and Inception, on one axis."""
    other = dataclasses.replace(rows[2], protocol={**rows[2].protocol, "images": 50_000})
    protocol, others = collect.shared_protocol([*rows[:2], other, *rows[3:]])
    assert others == [other] and protocol["images"] == 1000
    assert not points.comparable(protocol)
    guided = dataclasses.replace(rows[2], protocol={**rows[2].protocol, "guidance": 1.5})
    protocol, others = collect.shared_protocol([*rows[:2], guided])
    assert others == [] and protocol["guidance"] == "1.0 / 1.5"  # a sweep over guidance is one figure, and says so
    assert points.comparable({"features": "inception", "images": 50_000, "guidance": 1.0})
    assert not points.comparable({"features": "inception", "images": 50_000, "guidance": "1.0 / 1.5"})


def test_panels(rows):
    """The paper's ImageNet FIDs on the axis of the digits, or missing where they belong on it."""
    plt = style.pyplot()
    ours = [row for row in rows if row.fid is not None]
    apart = figures.fid_against("gmacs", ours, ours[0].protocol, True)
    assert len(apart.axes) == 2 and "pixels" in apart.axes[0].get_ylabel() and "ImageNet" in apart.axes[1].get_ylabel()
    together = figures.fid_against("gmacs", ours, {"features": "inception", "images": 50_000}, True)
    assert len(together.axes) == 1 and together.axes[0].get_ylabel() == "FID-50K"
    assert {"XL/2", "S/8"} <= {text.get_text() for text in apart.axes[1].texts}
    plt.close("all")


@pytest.fixture(scope="module")
def written(finished):
    folder, runs, costs = finished
    found = report.write(SWEEP, "configs/sweeps/digits.py", runs, costs, folder, "python -m dit_jax.sweep --sweep='x'")
    return folder.path, found, (folder.path / "report.html").read_text()


@pytest.mark.slow
def test_the_page_stands_alone(written):
    """A page that is broken, fetches fonts or scripts, mixes up the parts of two figures, or runs what a log says."""
    _, found, page = written
    structure = Structure()
    structure.feed(page)
    assert not structure.open and not structure.fetched
    assert len(structure.ids) == len(set(structure.ids)) > 20 and set(structure.uses) <= set(structure.ids)
    assert not re.search(r"https?://", page)
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>bold</b> title" not in page
    assert found.done == 7 and page.count("<figure") == 6
    assert "commit c0ffee" in page and "from 2026-01-02 03:04" in page and "abacus" in page and "4 x TPU v5" in page
    assert "50 images, dpmpp with 16 steps" in page
    assert "--sweep=" in page and "jax 0." in page and "prefers-color-scheme: dark" in page and "@media print" in page
    assert style.INK not in page.split("</style>")[1], "ink that would be black on a dark page"


@pytest.mark.slow
def test_the_files(written):
    """A figure that is missing in a format, or a table that does not say what the page says."""
    folder, found, _ = written
    assert len(found.files["figures"]) == 18 and all(
        (folder / "figures" / name).stat().st_size > 1000
        for name in ("fid_gflops.png", "fid_gflops.svg", "fid_gflops.pdf", "samples.png", "fid_sampling_compute.svg")
    )
    assert "<text" not in (folder / "figures" / "fid_gflops.svg").read_text()  # outlines: no font is needed
    table = list(csv.DictReader(Path(found.files["csv"]).read_text().splitlines()))
    data = json.loads((folder / "results.json").read_text())["runs"]
    assert [row["run"] for row in table] == [row["name"] for row in data] and len(table) == 8
    assert float(table[0]["fid"]) == data[0]["fid"] and table[0]["config.model.width"] == "32" and table[7]["fid"] == ""
    curves = collect.read_curves(folder / "curves.csv")
    assert curves["a-1_seed=0"][0] == (100, 0.01)


def test_reference_curves(tmp_path):
    """A reference that is not there, found after the night; the digits' own that cannot be read."""
    digits = grid.load("configs/sweeps/digits.py")
    assert set(report.reference(digits, "configs/sweeps/digits.py")) <= {run.name for run in grid.expand(digits)}
    with pytest.raises(UserError, match="cannot be read"):
        report.check_possible(dataclasses.replace(digits, reference_curves="none.csv"), str(tmp_path / "sweep.py"))


def test_a_report_without_any_result(tmp_path):
    """A crash where nothing is finished yet, or where all models cost the same."""
    sweep = Sweep(title="new", base="configs/digits.py", seeds=[0, 1])
    runs = grid.expand(sweep)
    found = report.write(sweep, "x.py", runs, [cost.count(run) for run in runs], Folder(tmp_path, "new"), "command")
    assert found.done == 0 and "0 of 2 runs are finished" in (tmp_path / "report.html").read_text()


def test_first_images_of_a_large_file(tmp_path):
    """The first images of a file taken from another place than its start, or in another order."""
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    np.testing.assert_array_equal(figures.first_images(tmp_path / "x.npz", 10), images[:10])
