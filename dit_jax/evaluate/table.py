"""Several results side by side, with whatever differs in how they were made; as text, CSV or Markdown."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from dit_jax.errors import UserError
from dit_jax.evaluate.scores import METRICS

FORMATS = ("text", "csv", "markdown")
# What a reader must know to trust a comparison: column -> path in the result.
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
# Where these differ, two values are not of one quantity.
INCOMPARABLE = ("features", "extractor weights", "resize", "precision", "reference", "size", "images", "KID subset")


def read_result(path: str) -> dict:
    """A result file of `evaluate`.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        result = json.loads(Path(path).expanduser().read_text())
        if not (isinstance(result, dict) and set(METRICS) & result.keys() and "samples_sha256" in result):
            raise ValueError("it has no metric, or not what it was made of")
        return result
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no result file of dit_jax.evaluate: {error}") from None


def table(paths: list[str], form: str) -> str:
    """One row per result: its metrics, then every field of the protocol that is not the same in all, marked with *.

    Fields that are the same in all stand once below (in CSV they are columns like any other). Where a marked field makes the
    values incomparable, such as another reference, a last line says so; nothing is left out.

    Raises:
        UserError: a format or file that is none.
    """
    if form not in FORMATS:
        raise UserError(f"--format={form}; it must be one of {', '.join(FORMATS)}")
    results = [read_result(path) for path in paths]
    fields = {name: [_shown(_found(result, where)) for result in results] for name, where in _protocol(results).items()}
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
    """PROTOCOL, and whatever else their samplers have: eta, spacing, order."""
    shown, sampler = set(PROTOCOL.values()), ("made_by", "sampler")
    more = {key for result in results if isinstance(found := _found(result, sampler), dict) for key in found}
    return PROTOCOL | {f"sampler {key}": (*sampler, key) for key in sorted(more) if (*sampler, key) not in shown}


def _found(result: dict, where: tuple[str, ...]) -> Any:
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
    """File names without .json, where they are all different; else the paths."""
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
