"""Tables that compare results, including all settings in which they differ; as text, CSV or Markdown."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from dit_jax.errors import UserError
from dit_jax.evaluate.scores import METRICS
from dit_jax.storage.bounded import read_json
from dit_jax.storage.paths import local_path

FORMATS = ("text", "csv", "markdown")
# Settings that a comparison depends on: column -> path in the result.
PROTOCOL = {
    "images": ("num_samples",),
    "features": ("extractor", "name"),
    "extractor weights": ("extractor", "weights_sha256"),
    "resize": ("extractor", "resize"),
    "precision": ("extractor", "precision"),
    "reference": ("reference_sha256",),
    "reference images": ("num_reference",),
    "size": ("image_shape",),
    "sampler": ("made_by", "sampler", "name"),
    "steps": ("made_by", "sampler", "num_steps"),
    "forecast interval": ("made_by", "forecast", "interval"),
    "forecast order": ("made_by", "forecast", "order"),
    "guidance": ("made_by", "guidance", "scale"),
    "guidance schedule": ("made_by", "guidance", "schedule"),
    "guided channels": ("made_by", "guidance", "channels"),
    "guided from": ("made_by", "guidance", "low"),
    "guided to": ("made_by", "guidance", "high"),
    "autoguidance": ("made_by", "autoguidance_weights"),
    "labels": ("made_by", "labels"),
    "EMA": ("made_by", "ema_decay"),
    "seed": ("made_by", "seed"),
    "training step": ("made_by", "step"),
    "codec": ("made_by", "codec", "name"),
    "codec weights": ("made_by", "codec", "sha256"),
    "KID subset": ("kid_subset_size",),
    "code": ("versions", "dit_jax"),
    "commit": ("commit",),
    "jax": ("versions", "jax"),
    "device": ("device",),
}
# If one of these differs, two values do not measure the same quantity.
INCOMPARABLE = ("features", "extractor weights", "resize", "precision", "reference", "size", "images", "KID subset")


def read_result(path: str) -> dict:
    """Reads a result file of `evaluate`.

    Raises:
        UserError: the file cannot be read, or is not a result.
    """
    remedy = "it is not a result file of dit_jax.evaluate"
    try:
        result = read_json(local_path(path), remedy, {"samples_sha256": str})
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not set(METRICS) & result.keys():
        raise UserError(f"{path} has no metric; {remedy}")
    return result


def table(paths: list[str], form: str) -> str:
    """Formats one row per result: its metrics, then every protocol field that differs between results, marked with *.

    Fields that all results share appear once below the table (in CSV they are ordinary columns). If a marked field makes values
    incomparable, such as another reference, the last line says so. Nothing is omitted.

    Raises:
        UserError: the format is unknown, or a file is not a result.
    """
    if form not in FORMATS:
        raise UserError(f"--format={form} must be one of {', '.join(FORMATS)}")
    results = [read_result(path) for path in paths]
    fields = {name: [_shown(_value_at(result, where)) for result in results] for name, where in _protocol(results).items()}
    fields = {name: values for name, values in fields.items() if any(values)}
    differing = {name: values for name, values in fields.items() if len(set(values)) > 1}
    metrics = {name: [_number(result, name) for result in results] for name in METRICS if any(name in r for r in results)}
    if form == "csv":
        columns = {"result": paths} | {name: [r.get(name, "") for r in results] for name in metrics}
        if any("fid_interval" in r for r in results):
            columns |= {
                f"fid_{side}": [r["fid_interval"][i] if "fid_interval" in r else "" for r in results]
                for i, side in enumerate(("low", "high"))
            }
        return _csv(columns | fields)
    columns = {"result": _short(paths)} | metrics | {f"{name}*": values for name, values in differing.items()}
    same = "; ".join(f"{name} {values[0]}" for name, values in fields.items() if name not in differing)
    notes = [f"The same in all: {same}."] if len(results) > 1 else [f"Made with: {same}."]
    if any("fid_interval" in result for result in results):
        notes.append("Brackets: bootstrap interval of fid over the samples, the reference held fixed.")
    if wrong := [name for name in INCOMPARABLE if name in differing]:
        notes.append(f"* These differ in {', '.join(wrong)}: rows with other entries there must not be compared by metrics.")
    return _lines(columns, form) + "\n\n" + "\n".join(notes)


def _protocol(results: list[dict]) -> dict[str, tuple[str, ...]]:
    """PROTOCOL, extended by the samplers' other fields, such as eta, spacing and order."""
    shown, sampler = set(PROTOCOL.values()), ("made_by", "sampler")
    more = {key for result in results if isinstance(settings := _value_at(result, sampler), dict) for key in settings}
    return PROTOCOL | {f"sampler {key}": (*sampler, key) for key in sorted(more) if (*sampler, key) not in shown}


def _value_at(result: dict, where: tuple[str, ...]) -> Any:
    for key in where:
        if not isinstance(result, dict) or key not in result:
            return None
        result = result[key]
    return result


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"\b([0-9a-f]{12})([0-9a-f]{28}|[0-9a-f]{52})\b", r"\1", text)  # SHA-1 and SHA-256


def _number(result: dict, metric: str) -> str:
    if metric not in result:
        return "-"
    interval = result.get(f"{metric}_interval")
    return f"{result[metric]:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")


def _short(paths: list[str]) -> list[str]:
    """File names without .json if they are all different; otherwise the paths."""
    stems = [Path(path).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else paths


def _csv(columns: dict[str, list]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().rstrip("\n")


def _lines(columns: dict[str, list[str]], form: str) -> str:
    rows = [list(columns), *(list(row) for row in zip(*columns.values(), strict=True))]
    if form == "markdown":
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
        rows.insert(1, ["---"] * len(columns))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
