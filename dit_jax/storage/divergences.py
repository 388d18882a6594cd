"""How often a run diverged, and how it went on: `divergences.json` in its folder.

The file is a list of {"step": at which the run ended, "first_skipped": the first step of those that were skipped in a row,
"fields": the values of FIELDS}, oldest first. A run that went on has {"continued_from": step} in addition.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax.storage.atomic import write_json
from dit_jax.storage.bounded import read_records

FILE = "divergences.json"
FIELDS = (
    "optimizer.learning_rate",
    "optimizer.clip_norm",
    "optimizer.warmup_steps",
    "model.dtype",
    "codec.dtype",
)  # the remedies
FORM = [{"step": int, "first_skipped": int, "fields": {}}]


def read(workdir: Path) -> list[dict[str, Any]]:
    """The divergences of a run, oldest first; [] if there are none.

    Raises:
        UserError: the file cannot be read.
    """
    return read_records(workdir / FILE, FORM, "remove it to resume the run with its own settings")


def unsolved(workdir: Path) -> dict[str, Any] | None:
    """The last divergence if the run has not gone on since, else None."""
    records = read(workdir)
    return records[-1] if records and "continued_from" not in records[-1] else None


def add(workdir: Path, step: int, first_skipped: int, fields: Mapping[str, Any]) -> None:
    """Records that a run diverged; another start with the same fields that diverges again replaces the record."""
    records = read(workdir)
    if records and "continued_from" not in records[-1]:
        records.pop()
    write_json(workdir / FILE, [*records, {"step": step, "first_skipped": first_skipped, "fields": dict(fields)}])


def settle(workdir: Path, step: int) -> None:
    """Records that the run went on from a step, if its last divergence is unsolved."""
    records = read(workdir)
    if records and "continued_from" not in records[-1]:
        records[-1]["continued_from"] = step
        write_json(workdir / FILE, records)


def changes(divergence: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Lines "field: old -> new" for the fields that differ from those with which a run diverged."""
    old = divergence["fields"]
    return [f"{name}: {old.get(name)} -> {fields.get(name)}" for name in FIELDS if old.get(name) != fields.get(name)]
