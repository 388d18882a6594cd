"""Collects the results of all runs of a sweep from their folders: rows, results.json, results.csv, curves.csv."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_jax import registry
from dit_jax.errors import UserError
from dit_jax.evaluate import table
from dit_jax.storage.atomic import write_atomic, write_json
from dit_jax.storage.run_folder import SCORES
from dit_jax.sweep.cost import Cost
from dit_jax.sweep.folder import Folder
from dit_jax.sweep.grid import Run
from dit_jax.sweep.local import last_lines
from dit_jax.sweep.scores import file_of
from dit_jax.training.records import curve

CURVE_FIELDS = ("run", "step", "loss")
# Settings that a FID depends on besides the model, with the names of `evaluate`'s table.
PROTOCOL = (
    "images",
    "features",
    "extractor weights",
    "resize",
    "precision",
    "reference",
    "reference images",
    "size",
    "sampler",
    "steps",
    "guidance",
    "guided channels",
    "guided from",
    "guided to",
    "labels",
)

ORIGIN = ("commit", "device", "num_devices", "versions")


@dataclass(frozen=True)
class Row:
    """One run and its results; what is not known yet is None or empty.

    Fields:
        family: models that the figures join, see `family`.
        patch: patch size; None for an autoencoder, and for a network without patches.
        series: value of `Sweep.compare`, whose runs are one line of the figures; None without it.
        validation_loss, validation_levels: of `evaluate.validation`: the loss, and (sigma / alpha, loss) of each noise level.
        seconds_per_image: of training: the median over its records of the median step time, over the batch size.
        fid_interval: bootstrap interval over the images, which does not include the variance of seeds.
        protocol: how the FID was measured, see `PROTOCOL`.
        seconds: total of training, sampling and scoring over all starts on this machine; None for a run trained elsewhere.
        starts: the lines of attempts.jsonl.
        origin: commit, device, num_devices and versions of the process that finished the run.
        loss_curve, fid_curve: (step, value); the FIDs are those of `training.scoring`, cheaper than the final one.
        fid_curve_protocol: protocol of the latest of them.
        samplers: scores with other samplers, see `scores`.
        error: last lines of a failed run.
    """

    name: str
    group: str
    variant: str
    seed: int
    family: str
    patch: int | None
    settings: dict[str, Any]
    cost: Cost
    batch_size: int
    num_steps: int
    state: str
    loss: float | None
    fid: float | None
    fid_interval: tuple[float, float] | None
    protocol: dict[str, Any]
    seconds: float | None
    images_per_second: float | None
    series: str | None
    validation_loss: float | None
    validation_levels: list[tuple[float, float]]
    seconds_per_image: float | None
    starts: list[dict]
    origin: dict[str, Any]
    loss_curve: list[tuple[int, float]]
    fid_curve: list[tuple[int, float]]
    fid_curve_protocol: dict[str, Any]
    samplers: list[dict]
    samples: str | None
    error: list[str]


def read(run: Run, cost: Cost, samplers: Sequence[tuple[str, int | None]], folder: Folder, compare: str = "") -> Row:
    """Reads the row of one run from its folder; compare: see `Sweep.compare`."""
    config, state, result = run.config, folder.state(run), folder.result(run) or {}
    metrics = folder.metrics(run)
    starts, losses = folder.attempts(run), curve(metrics, "loss")
    levels = (result.get("validation") or {}).get("levels", [])
    steps = [seconds for _, seconds in curve(metrics, "step_seconds_p50")]
    early = [json.loads(file.read_text()) for file in sorted((folder.of(run) / SCORES).glob("[0-9]*.json"))]
    scores = [json.loads(file.read_text()) for file in (file_of(folder, run, *s) for s in samplers) if file.exists()]
    samples = Path(result.get("samples") or "")
    current = folder.of(run) / "samples" / samples.name  # the folder may have moved
    return Row(
        name=run.name,
        group=run.group,
        variant=run.variant,
        seed=config.seed,
        family=family(config),
        patch=config.get("model", {}).get("patch_size"),
        settings=dict(run.settings),
        cost=cost,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        state=state,
        loss=losses[-1][1] if losses else result.get("loss"),
        fid=result.get("fid"),
        fid_interval=tuple(result["fid_interval"]) if result.get("fid_interval") else None,
        protocol=protocol(result),
        seconds=sum(start["seconds"] for start in starts) if starts else None,
        images_per_second=result.get("images_per_second"),
        series=str(_value_at(config, compare.split("."))) if compare else None,
        validation_loss=result.get("validation_loss"),
        validation_levels=[(level["sigma_over_alpha"], level["loss"]) for level in levels],
        seconds_per_image=statistics.median(steps) / config.batch_size if steps else None,
        starts=starts,
        origin={key: result[key] for key in ORIGIN if key in result},
        loss_curve=losses,
        fid_curve=curve(early, "fid"),
        fid_curve_protocol=protocol(early[-1]) if early else {},
        samplers=scores,
        samples=str(current) if samples.name and current.exists() else None,
        error=last_lines(folder.of(run) / "log.txt") if state == "failed" else [],
    )


def family(config) -> str:
    """Family of a model, which has one colour in figures: what the network says, or its name; "autoencoder" without one."""
    if "model" not in config:
        return "autoencoder"
    of = getattr(registry.get("model", config.model.name), "family", None)
    return config.model.name if of is None else of(config.model)


def protocol(result: dict) -> dict[str, Any]:
    """The entries of `PROTOCOL` that a result contains."""
    if result.get("fid") is None:
        return {}
    values = {name: _value_at(result, table.PROTOCOL[name]) for name in PROTOCOL}
    return {name: value for name, value in values.items() if value is not None}


def _value_at(result: Any, where: Sequence[str]) -> Any:
    for key in where:
        result = (result or {}).get(key)
    return result


def shared_protocol(rows: list[Row], of: str = "protocol") -> tuple[dict[str, Any], list[Row]]:
    """The protocol that most scored rows share; returns (protocol, scored rows that are not comparable with it).

    Values that may differ, such as the guidance in a sweep over it, are joined by " / ".

    Args:
        of: "protocol" or "fid_curve_protocol".
    """
    keys = {row.name: json.dumps([getattr(row, of).get(name) for name in table.INCOMPARABLE]) for row in rows if getattr(row, of)}
    if not keys:
        return {}, []
    most = max(keys.values(), key=list(keys.values()).count)
    same = [getattr(row, of) for row in rows if keys.get(row.name) == most]
    protocol = {}
    for name in PROTOCOL:
        values = [value for entries in same if (value := entries.get(name)) is not None]
        distinct = list({json.dumps(value): value for value in values}.values())
        if distinct:
            protocol[name] = distinct[0] if len(distinct) == 1 else " / ".join(map(str, distinct))
    return protocol, [row for row in rows if row.name in keys and keys[row.name] != most]


def write(rows: list[Row], folder: Path) -> dict[str, str]:
    """Writes results.json, results.csv and curves.csv; returns {name: path}."""
    write_json(folder / "results.json", {"runs": [asdict(row) for row in rows]})
    settings = list(dict.fromkeys(path for row in rows for path in row.settings))
    protocols = list(dict.fromkeys(key for row in rows for key in row.protocol))
    _write_csv(
        folder / "results.csv",
        [
            {
                "run": row.name,
                "variant": row.variant,
                "series": row.series,
                "seed": row.seed,
                "family": row.family,
                "patch_size": row.patch,
                "parameters": row.cost.parameters,
                "gmacs": row.cost.gmacs,
                "compute_gmacs": row.cost.compute_gmacs,
                "batch_size": row.batch_size,
                "num_steps": row.num_steps,
                "state": row.state,
                "loss": row.loss,
                "fid": row.fid,
                "fid_low": row.fid_interval and row.fid_interval[0],
                "fid_high": row.fid_interval and row.fid_interval[1],
                "validation_loss": row.validation_loss,
                "seconds_per_image": row.seconds_per_image,
                "seconds": row.seconds,
                "images_per_second": row.images_per_second,
                "device": row.origin.get("device"),
                "commit": row.origin.get("commit"),
                "started": row.starts[0]["started"] if row.starts else None,
            }
            | {f"config.{path}": row.settings.get(path) for path in settings}
            | {f"protocol.{key}": row.protocol.get(key) for key in protocols}
            for row in rows
        ],
    )
    _write_csv(
        folder / "curves.csv",
        [dict(zip(CURVE_FIELDS, (row.name, step, f"{loss:.6g}"), strict=True)) for row in rows for step, loss in row.loss_curve],
        CURVE_FIELDS,
    )
    return {"results": str(folder / "results.json"), "csv": str(folder / "results.csv")}


def _write_csv(path: Path, rows: list[dict], names: Sequence[str] = ()):
    text = io.StringIO()
    writer = csv.DictWriter(text, names or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads a curves.csv: {run: [(step, loss)]}.

    Raises:
        UserError: the file does not exist, or is not a curves.csv.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            curves.setdefault(row["run"], []).append((int(row["step"]), float(row["loss"])))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"reference_curves {path} cannot be read ({error!r}); it must be the curves.csv of a report, with the "
            f"columns {', '.join(CURVE_FIELDS)}"
        ) from None
    return curves
