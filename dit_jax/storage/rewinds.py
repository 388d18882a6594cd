"""How often a run went back by hand, `main --rewind=N`: `rewinds.json` in its folder.

The file is a list of {"to": step, "newest": the newest step before, "time": unix seconds, "changed": {field: [old, new]},
"done"}, oldest first. What belongs to later steps is set aside: checkpoints as `checkpoints/<step>.abandoned`; the result, the
page, pictures, scores and a copy of the metrics in `rewound.<n>`, where n counts the entries. A rewind that was killed is
finished by the next start.
"""

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.errors import UserError
from dit_jax.parallel import hosts
from dit_jax.runtime.console import say
from dit_jax.storage.atomic import remove_leftovers, write_atomic, write_json
from dit_jax.storage.bounded import read_json, read_records

FILE = "rewinds.json"
FORM = [{"to": int, "newest": int, "changed": {}, "done": bool}]
METRICS = "metrics.jsonl"
RESULTS = ("result.json", "report.html")
OF_A_STEP = re.compile(r"(\d{8})(_.*)?(\..*)?")  # pictures, samples and scores


def read(workdir: Path) -> list[dict[str, Any]]:
    """The rewinds of a run, oldest first; [] if there are none.

    Raises:
        UserError: the file cannot be read.
    """
    return read_records(workdir / FILE, FORM, "remove it to resume the run from its newest checkpoint")


def decided(workdir: Path, to: int | None, same_config: bool, steps: Sequence[int]) -> int | None:
    """The step to which this start goes back, the same on all processes; None if it does not.

    A start with the same step and config as the last rewind resumes, so that a supervisor may repeat its command.

    Args:
        to: the step that the user gave, or None.
        same_config: whether the config is that of the run's last start.
        steps: those that are saved.

    Raises:
        UserError: the step is not saved; another rewind was interrupted.
    """
    records = read(workdir)
    last, step = records[-1] if records else None, to
    if last is not None and not last["done"]:
        if to not in (None, last["to"]):
            raise UserError(
                f"the rewind of {workdir} to step {last['to']} was interrupted; let it finish with --rewind={last['to']}, and "
                f"then give --rewind={to}"
            )
        step = last["to"]
    elif last is not None and last["to"] == to and same_config:
        say(
            f"the run went back to step {to} before, and goes on from step {max(steps, default=0)}: the same --rewind and config "
            f"do not take it back again. To go back once more, remove {workdir / FILE}"
        )
        step = None
    elif to is not None and to not in steps:
        have = ", ".join(map(str, steps)) or "none"
        raise UserError(f"--rewind={to}: {workdir} has no checkpoint of this step; the saved steps are: {have}")
    agreed = hosts.greatest(0 if step is None or not hosts.is_first() else step + 1) - 1
    return None if agreed < 0 else agreed


def begin(workdir: Path, to: int, newest: int, config: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Records that the run is going back, if it is not recorded yet.

    Args:
        newest: the newest step that is saved.
        config: of the run so far, which `cancel` restores.
        changed: {field: [old, new]}.
    """
    records = read(workdir)
    if not records or records[-1]["done"]:
        entry = {"to": to, "newest": newest, "time": time.time(), "changed": dict(changed), "done": False, "config": dict(config)}
        write_json(workdir / FILE, [*records, entry])


def cancel(workdir: Path) -> None:
    """Takes back `begin`: the step cannot be restored, and nothing has changed."""
    *records, last = read(workdir)
    write_json(workdir / "config.json", last["config"], indent=2)
    write_json(workdir / FILE, records)


def set_aside(workdir: Path, step: int) -> None:
    """Moves what belongs to later steps to `rewound.<n>`, with a copy of the metrics. What was moved before stays there."""
    target = workdir / f"rewound.{len(read(workdir))}"
    target.mkdir(exist_ok=True)
    remove_leftovers(target, METRICS)
    if (workdir / METRICS).exists() and not (target / METRICS).exists():
        write_atomic(target / METRICS, (workdir / METRICS).read_bytes())
    for path in [workdir / name for name in RESULTS] + _of_later_steps(workdir, step):
        if path.exists():
            moved = target / path.relative_to(workdir)
            moved.parent.mkdir(exist_ok=True)
            os.replace(path, moved)


def _of_later_steps(workdir: Path, step: int) -> list[Path]:
    """Pictures, samples and scores of later steps, and the best score if it is one of them."""
    paths = [path for folder in ("samples", "scores") if (workdir / folder).is_dir() for path in (workdir / folder).iterdir()]
    later = [path for path in paths if (named := OF_A_STEP.fullmatch(path.name)) and int(named[1]) > step]
    best = workdir / "scores" / "best.json"
    try:
        return [*later, *[best] * (read_json(best, form={"step": int})["step"] > step)]
    except (FileNotFoundError, UserError):
        return later


def finish(workdir: Path) -> None:
    """Records that everything is set aside and the run goes on."""
    records = read(workdir)
    records[-1] = {name: value for name, value in records[-1].items() if name != "config"} | {"done": True}
    write_json(workdir / FILE, records)


def lines(workdir: Path) -> list[str]:
    """For people: one line per rewind."""
    return [
        "; ".join(
            (
                f"from step {entry['newest']} to step {entry['to']}",
                *(f"{name}: {old} -> {new}" for name, (old, new) in entry["changed"].items()),
            )
        )
        for entry in read(workdir)
    ]
