"""The comparison of backbones: its grid, equal GMACs, and the report that has a line for each."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from verbs import ROOT, quick_environment

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.evaluate import validation
from dit_jax.report import style
from dit_jax.sweep import collect, comparison, grid, page, points
from dit_jax.sweep.cost import Cost
from dit_jax.sweep.folder import Folder, write_json
from dit_jax.sweep.grid import Sweep


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def photographs(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((16, 16, 3), i % 256, np.uint8)).save(folder / f"photo_{i:03d}.png")
    return folder


def gmacs(run):
    return build.Run(run.config).task.macs() / 1e9


@pytest.mark.parametrize("argument, sizes", [("", "SML"), (":photos=/data", None)])
def test_the_networks_have_equal_gmacs(argument, sizes):
    """Catches a size that was changed for one network only, a network that is missing, and any other field that differs between
    two runs of a size: the comparison would be of something else than the network."""
    runs = grid.expand(grid.load(f"backbones{argument}"))
    networks = {"dit", "unet", "hourglass", "diffit"}
    for size in sizes or [""]:
        same = [run for run in runs if run.config.seed == 0 and run.variant.endswith(size and f"-{size}")]
        assert {run.config.model.name for run in same} == networks and len(same) == 4
        found = [gmacs(run) for run in same]
        assert max(found) / min(found) < 1.05, dict(zip((run.variant for run in same), found, strict=True))
        others = [{k: v for k, v in run.config.to_dict().items() if k != "model"} for run in same]
        assert all(other == others[0] for other in others)
        assert {run.config.model.num_classes for run in same} == {10 if sizes else 0}
    assert len(runs) == (24 if sizes else 4) and {run.config.process.name for run in runs} == {"flow"}
    if sizes:
        assert gmacs(runs[-1]) > 8 * gmacs(next(run for run in runs if run.variant == "DiT-S"))


def test_held_out_photographs(tmp_path):
    """Catches photographs that are trained on and held out, or a part that depends on anything but their names."""
    folder = photographs(tmp_path / "photos", 400)
    config = grid.expand(grid.load(f"backbones:photos={folder}"))[0].config
    run = build.Run(config)
    trained, held_out = ({Path(x["name"]).name for x in map(source.__getitem__, range(len(source)))} for source in sources(run))
    assert len(trained) == 300 and len(held_out) == 100 and not trained & held_out
    assert config.evaluation.features == "pixels8" and config.evaluation.reference == f"folder:{folder}"


def sources(run):
    return run.source, validation.source_of(run)


@pytest.mark.parametrize(
    "name, text",
    [
        ("backbones:steps=many", "it must be a number of training steps"),
        ("backbones:size=XL", "choose S, M or L"),
        ("backbones:photos=/data,size=S", "one size of the networks for photographs"),
        ("backbones:pictures=/data", "write each of photos, size, steps at most once"),
        ("digits:3", r"--sweep=digits:3: get_sweep\(\) takes no argument; leave out :3"),
    ],
)
def test_bad_arguments(name, text):
    """Catches an argument that is ignored: days of training of another grid than was asked for."""
    with pytest.raises(UserError, match=text):
        grid.load(name)


COMPARED = Sweep(
    title="Two networks",
    base="configs/digits.py",
    seeds=[0, 1],
    compare="model.conditioning",
    variants={
        f"{name}-{width}": {"model.conditioning": name, "model.width": width}
        for name in ("adaln_zero", "in_context")
        for width in (32, 64)
    },
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(rows, folder, runs, costs) of a finished sweep with made-up results."""
    folder, rows = Folder(tmp_path_factory.mktemp("compared"), COMPARED.title), []
    runs = grid.expand(dataclasses.replace(COMPARED, base=str(ROOT / "configs/digits.py")))
    costs = [Cost(1000 * (k // 2 + 1), 1e-3 * (k // 2 + 1), 0.1) for k in range(len(runs))]
    for k, run in enumerate(runs):
        where = folder.of(run)
        where.mkdir(parents=True)
        levels = [{"sigma_over_alpha": level, "used": level, "time": 0.5, "loss": level / (k + 1)} for level in (0.1, 1.0, 10.0)]
        result = {
            "step": 1000,
            "loss": 0.1,
            "stopped": False,
            "fid": 1.0 + k,
            "features": "pixels",
            "num_samples": 1000,
            "reference_sha256": "ab",
        }
        result |= {"validation_loss": 0.5 / (k + 1), "validation": {"levels": levels}, "extractor": {"name": "pixels"}}
        write_json(where / "result.json", result)
        lines = [
            {"step": step, "loss": 1 / step, "step_seconds_p50": seconds} for step, seconds in ((1, 9.0), (2, 1.28), (3, 2.56))
        ]
        (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [collect.read(run, c, (), folder, COMPARED.compare) for run, c in zip(runs, costs, strict=True)]
    return rows, folder, runs, costs


def test_what_a_row_has(compared):
    """Catches a time of the step in place of the image, the slow first step, and a score of another run."""
    rows = compared[0]
    assert [row.series for row in rows[::2]] == ["adaln_zero", "adaln_zero", "in_context", "in_context"]
    assert rows[0].seconds_per_image == 2.56 / 128 and rows[3].validation_loss == 0.125
    assert rows[1].validation_levels == [(0.1, 0.05), (1.0, 0.5), (10.0, 5.0)]
    found = points.ours(rows, "validation_loss")
    assert {point.series for point in found} == {"adaln_zero", "in_context"} and all(len(point.fids) == 2 for point in found)
    assert next(p for p in found if p.name == "adaln_zero-32").fid == pytest.approx((0.5 + 0.25) / 2)
    assert all(p.parameters == r.cost.parameters for p in found for r in rows if r.group == p.name)


def test_a_line_for_each_network(compared):
    """Catches a figure that joins two networks, mixes up two costs, or leaves out a seed."""
    rows = compared[0]
    figure = comparison.against_costs(rows, "fid", "Score")
    for ax, name in zip(figure.axes, comparison.COSTS, strict=True):
        lines = {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}
        assert set(lines) == {"adaln_zero", "in_context"}
        found = [p for p in points.ours(rows) if p.series == "in_context"]
        np.testing.assert_allclose(lines["in_context"].get_xdata(), sorted(getattr(p, name) for p in found))
    drawn = comparison.draw(COMPARED.compare, rows, rows, {"features": "pixels", "images": 1000})
    assert list(drawn) == ["fid", "validation_loss", "validation_levels"]
    levels = {line.get_label(): line.get_ydata() for line in drawn["validation_levels"][0].axes[0].get_lines()}
    np.testing.assert_allclose(levels["adaln_zero"] * levels["in_context"], np.ones(3), rtol=1e-6)
    assert (levels["adaln_zero"] > levels["in_context"]).all()
    style.pyplot().close("all")


def test_the_page_names_the_best(compared):
    """Catches a lead that fits one line through all networks, and a table without the new columns."""
    rows = compared[0]
    text = page._lead(COMPARED, rows, [])
    assert "Lowest Fréchet distance of each: adaln_zero 1.5 (adaln_zero-32), in_context 5.5 (in_context-32)." in text
    assert "Lowest validation loss of each: in_context" in text and "correlation" not in text
    assert "validation loss" in page._table(rows, []) and "training, s per image" in page._table(rows, [])


def test_the_table_has_the_columns(compared, tmp_path):
    """Catches a value of the page that is not in the files."""
    rows = compared[0]
    collect.write(rows, tmp_path)
    head, first = (tmp_path / "results.csv").read_text().splitlines()[:2]
    cells = dict(zip(head.split(","), first.split(","), strict=True))
    assert (cells["series"], float(cells["validation_loss"]), float(cells["seconds_per_image"])) == ("adaln_zero", 0.5, 0.02)


def test_fields_that_exclude_one_another():
    """Catches the paper's models drawn into a figure of networks."""
    with pytest.raises(UserError, match="compare and paper are both set"):
        grid._check_fields(dataclasses.replace(COMPARED, paper=True))


@pytest.mark.parametrize(
    "names, series",
    [
        pytest.param(("DiT-S", "DiffiT-S"), {"dit", "diffit"}, marks=pytest.mark.slow),
        pytest.param(("U-Net-S", "HDiT-S"), {"unet", "hourglass"}, marks=pytest.mark.exhaustive),  # compile for a minute
    ],
)
def test_a_short_comparison(tmp_path, names, series):
    """Catches a network that does not train, sample or validate by the verbs of the sweep, and a report without its figures."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    args = ["-m", "dit_jax.sweep", "--sweep=short.py", f"--workdir={tmp_path / 'w'}"]
    (tmp_path / "short.py").write_text(SHORT.replace("NAMES", repr(names)))
    ended = subprocess.run([sys.executable, *args], cwd=tmp_path, env=quick_environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((tmp_path / "w" / "results.json").read_text())["runs"]
    assert {row["series"] for row in rows} == series
    assert all(row["validation_loss"] > 0 and row["fid"] > 0 and row["seconds_per_image"] > 0 for row in rows)
    assert (tmp_path / "w" / "figures" / "validation_levels.svg").exists()
    assert (tmp_path / "w" / "report.html").read_text().count("<figure") == 5


SHORT = """
import dataclasses
from dit_jax.sweep import grid
def get_sweep():
    sweep = grid.load("backbones:size=S,steps=2")
    few = {name: sweep.variants[name] for name in NAMES}
    more = {"evaluation.num_images": [20], "sampler.num_steps": [2], "log.every_steps": [1]}
    return dataclasses.replace(sweep, variants=few, grid={**sweep.grid, **more}, seeds=[0])
"""
