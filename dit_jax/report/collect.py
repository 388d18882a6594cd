"""Reads the folder of a run, finished or not, without its data set, weights or devices."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from dit_jax.errors import UserError
from dit_jax.storage import branch_record, rewinds
from dit_jax.storage.bounded import read_json
from dit_jax.storage.run_folder import SCORES
from dit_jax.training import starts
from dit_jax.training.records import curve, read_lines

DENOISING, REAL = "_denoising.png", "real.png"  # in `samples/`, see `pictures`
METRICS = ("loss", "learning_rate", "images_per_second", "psnr")


@dataclass(frozen=True)
class Collected:
    """The folder of a run; what it does not have is None or empty.

    Fields:
        config: the resolved config.
        curves: [(step, value)] by metric: `METRICS`, and "fid" of the scores during training.
        wall_seconds, goodput: of the last start.
        result: the entries of result.json.
        starts: those of the log of starts, in order.
        previews: [(step, picture)] in order; all have the same seed and labels.
        final: picture of the final samples or reconstructions.
        denoising, real: pictures of `pictures`.
        branch: what the run was begun from, and the fields that it changed; rewinds: those by hand.
    """

    folder: Path
    config: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]
    wall_seconds: float | None
    goodput: float | None
    result: dict[str, Any]
    starts: list[dict[str, Any]]
    previews: list[tuple[int, Path]]
    final: Path | None
    denoising: Path | None
    real: Path | None
    branch: list[str]
    rewinds: list[str]

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 without a record."""
        steps = [points[-1][0] for points in self.curves.values() if points]
        return max([self.result.get("step", 0), *steps])


def read(folder: Path) -> Collected:
    """Reads the folder.

    Raises:
        UserError: it is not the folder of a run.
    """
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not the --workdir of a dit_jax.main run: config.json cannot be read ({error})") from None
    rows, samples = read_lines(folder / "metrics.jsonl"), folder / "samples"
    curves = {name: points for name in METRICS if (points := curve(rows, name))}
    scores = [_read_json(file) for file in sorted((folder / SCORES).glob("[0-9]*.json"))]
    if points := curve([score for score in scores if score], "fid"):
        curves["fid"] = points
    result = _read_json(folder / "result.json")
    wall = [row for row in rows if "wall_seconds" in row]
    final = samples / Path(result.get("samples") or "-").with_suffix(".png").name  # the folder may have moved
    denoising = sorted(samples.glob(f"*{DENOISING}"))
    return Collected(
        folder=folder,
        config=config,
        curves=curves,
        wall_seconds=wall[-1]["wall_seconds"] if wall else None,
        goodput=wall[-1].get("goodput") if wall else None,
        result=result,
        starts=starts.read(folder),
        previews=[(int(file.stem), file) for file in sorted(samples.glob("*.png")) if file.stem.isdigit()],
        final=final if final.is_file() else None,
        denoising=denoising[-1] if denoising else None,
        real=samples / REAL if (samples / REAL).is_file() else None,
        branch=_lines(folder, lambda: branch_record.lines(record) if (record := branch_record.read(folder)) else []),
        rewinds=_lines(folder, lambda: rewinds.lines(folder)),
    )


def _lines(folder: Path, read: Callable[[], list[str]]) -> list[str]:
    try:
        return read()
    except (UserError, TypeError, ValueError) as error:
        logging.warning("%s: %s; left out of the report.", folder, error)
        return []


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except FileNotFoundError:
        return {}
    except UserError as error:
        logging.warning("%s: it is left out of the report.", error)
        return {}
