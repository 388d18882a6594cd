"""What a run was begun from: `branched_from.json` in the folder of a branch.

{"run": path of the other run, "step": of its checkpoint, "params": digest of its parameters, "commit": of this program, "time":
unix seconds, "reset_optimizer", "changed": {field: [old, new]}, "config": of the other run}. It is written before the branch has
a checkpoint of its own. From then on the other run is not read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax.storage.atomic import write_json
from dit_jax.storage.bounded import read_json

FILE = "branched_from.json"
FORM = {"run": str, "step": int, "params": str, "reset_optimizer": bool, "changed": {}, "config": {}}


def read(workdir: Path) -> dict[str, Any] | None:
    """The record of a branch; None for another run.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_json(workdir / FILE, "restore it, or begin again with --restart", FORM)
    except FileNotFoundError:
        return None


def write(workdir: Path, record: Mapping[str, Any]) -> None:
    """Writes the record of a branch."""
    write_json(workdir / FILE, dict(record))


def digest(fingerprints: Mapping[str, Any], entry: str = "params") -> str:
    """16 hexadecimal digits that change with any bit, name or shape of the arrays of an entry of the state.

    fingerprints: those of a checkpoint, {name of an array: [dtype, shape, uint32]}.
    """
    facts = {name: facts for name, facts in sorted(fingerprints.items()) if name.startswith(f"{entry}/")}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def lines(record: Mapping[str, Any]) -> list[str]:
    """For people: where the branch begins, and "field: old -> new" for what it changed."""
    changed = [f"{name}: {old} -> {new}" for name, (old, new) in record["changed"].items()]
    fresh = ["a new state of the optimizer"] if record["reset_optimizer"] else []
    return [f"{record['run']}, step {record['step']}", *fresh, *changed]
