"""The folder of a sweep and the state of its runs.

sweep.json           title of the sweep and flags of every run
runs/<name>/         workdir of one run, see `storage.run_folder`, and additionally:
    result.json      written by dit_jax.main at the end, here or elsewhere: the run is finished
    attempts.jsonl   one line per start on this machine: command, date, machine, seconds, exit status
    log.txt          output of the run, of all starts
    samplers/        scores with other samplers
launch/              scripts for other machines
parts.json           number of parts, if commands with --part share the runs
parts/0-of-3/        claimed by the command that trains the runs of a part
results.json, results.csv, curves.csv, report.html, figures/
"""

import contextlib
import re
from pathlib import Path

from dit_jax.config_file import plain
from dit_jax.errors import UserError
from dit_jax.runtime.console import STOPPED_STATUS
from dit_jax.runtime.job_array import Part
from dit_jax.storage.atomic import remove_leftovers, write_json
from dit_jax.storage.bounded import read_json
from dit_jax.storage.claim import LOCK, Claim, claim
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import RESUMABLE_FIELDS, flatten, read_config
from dit_jax.sweep.grid import Run
from dit_jax.training.records import read_lines

# Sections that affect only a run's speed and output files, not its result.
FREE_SECTIONS = ("mesh", "loader", "checkpoint", "log", "profile", "preview", "scoring", "imports")


class Folder:
    """A sweep's folder; entered, it is claimed, so that no second sweep works in it, and knows its runs.

    Args:
        part: claims that part of the runs only; other parts may be at work.

    Raises on entry:
        UserError: it cannot be written; another command is at work in it; it holds another sweep, or is shared by another number
            of parts.
    """

    def __init__(self, path, title: str, part: Part | None = None):
        self.path, self.title, self.part = local_path(path).absolute(), title, part
        self._exit = contextlib.ExitStack()
        self._claim: Claim | None = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            if self.part is None:
                self._claim = stack.enter_context(claim(self.path, "sweeping"))
                self.check_title()
                self.remove_leftovers()
            else:
                place = self.path / "parts" / f"{self.part.index}-of-{self.part.count}"
                self._claim = stack.enter_context(claim(place, f"training part {self.part}"))
                self.check_title()
                self._join_parts(self.part.count)
            self._exit = stack.pop_all()
        return self

    @property
    def lock(self) -> int:
        """Descriptor of the lock, while entered."""
        assert self._claim is not None  # entered
        return self._claim.descriptor

    def __exit__(self, *exc_info):
        self._exit.close()

    def check_title(self):
        """Raises UserError if the folder contains another sweep, or something else."""
        file = self.path / "sweep.json"
        try:
            before = read_json(file, "restore it or give another --workdir", {"title": str})["title"]
        except FileNotFoundError:
            if (self.path / "checkpoints").exists():
                raise UserError(f"{self.path} is the folder of a single run; give another --workdir") from None
            return
        if before != self.title:
            raise UserError(f"{self.path} contains the sweep {before!r}, not {self.title!r}; give another --workdir")

    @property
    def num_parts(self) -> int | None:
        """Number of the parts that share the runs; None if no command had --part."""
        try:
            return read_json(self.path / "parts.json", "delete it and start the parts again", {"parts": int})["parts"]
        except FileNotFoundError:
            return None

    def _join_parts(self, count: int) -> None:
        if (before := self.num_parts) is None:
            write_json(self.path / "parts.json", {"parts": count})  # all parts write the same
        elif before != count:
            raise UserError(
                f"{self.path} is shared by {before} parts, and --part={self.part} is of {count}; give a part of {before}, or "
                "delete parts.json there when no part is running"
            )

    def check_parts(self, runs: list[Run]) -> None:
        """Raises a UserError, which lists them, if the runs are shared by parts and some are unfinished."""
        count = self.num_parts
        missing = [(k, run.name) for k, run in enumerate(runs) if self.state(run) != "done"]
        if count is None or not missing:
            return
        parts = {k % count: [name for j, name in missing if j % count == k % count] for k, _ in missing}
        lines = [f"--part={index}/{count}: {', '.join(names)}" for index, names in sorted(parts.items())]
        raise UserError(
            f"{len(missing)} of {len(runs)} runs of {self.path} are not finished; run the same command with each of these parts, "
            "or delete parts.json to train them here:\n  " + "\n  ".join(lines)
        )

    def remove_leftovers(self):
        """Removes the partial files that a killed command left here; those of the runs go when a run starts again."""
        remove_leftovers(self.path, "sweep.json", "results.json", "results.csv", "curves.csv", "report.html")
        remove_leftovers(self.path / "figures", re.compile(r"\w+\.(png|svg|pdf)"))
        remove_leftovers(self.path / "launch", re.compile(r"array\.sbatch|gke\.sh|tpu_vm\.sh"))
        for samplers in (self.path / "runs").glob("*/samplers"):
            remove_leftovers(samplers, re.compile(r".*\.json"))

    def record(self, runs: list[Run]):
        """Writes the list of runs to sweep.json."""
        write_json(self.path / "sweep.json", {"title": self.title, "runs": {run.name: run.flags for run in runs}})

    def of(self, run: Run) -> Path:
        return self.path / "runs" / run.name

    def result(self, run: Run) -> dict | None:
        """result.json of a finished run; None if it is not finished, or has fewer steps than the sweep now requests."""
        if (self.of(run) / LOCK).exists():  # main writes its page after the result, and was killed, or is at work
            return None
        try:
            result = read_json(self.of(run) / "result.json", "delete it to finish the run again", {"step": int})
        except FileNotFoundError:
            return None
        return result if result["step"] >= run.config.num_steps else None

    def attempts(self, run: Run) -> list[dict]:
        return read_lines(self.of(run) / "attempts.jsonl")

    def metrics(self, run: Run) -> list[dict]:
        return read_lines(self.of(run) / "metrics.jsonl")

    def state(self, run: Run) -> str:
        """State of a run: "done", "failed", "begun" or "new"."""
        if self.result(run) is not None:
            return "done"
        attempts = self.attempts(run)
        if attempts and attempts[-1]["status"] not in (0, STOPPED_STATUS):
            return "failed"
        return "begun" if (self.of(run) / "checkpoints").exists() else "new"

    def check_configs(self, runs: list[Run]):
        """Raises UserError if a run that was started here has another config than the sweep now requests."""
        for run in runs:
            if not (self.of(run) / "config.json").exists():
                continue
            lines = differences(read_config(self.of(run)), plain(run.config))
            bound = (self.of(run) / "checkpoints").exists() or (self.of(run) / "result.json").exists()
            if lines and bound:
                raise UserError(
                    f"{self.of(run)} was started with another config than the sweep requests; give another --workdir, "
                    "or delete that folder to train it again. Different:\n  " + "\n  ".join(lines)
                )

    def strangers(self, runs: list[Run]) -> list[str]:
        """Names of run folders that do not belong to these runs."""
        names = {run.name for run in runs}
        folder = self.path / "runs"
        return sorted(x.name for x in folder.iterdir() if x.name not in names) if folder.exists() else []


def differences(old: dict, new: dict) -> list[str]:
    """Lines "field: old -> new" for changed fields that affect a run's result."""
    old, new = flatten(old), flatten(new)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        settled = key.startswith("codec.") and new.get(key) in (None, "")  # the run reads it from the codec's weights
        if key.split(".")[0] in FREE_SECTIONS or key in RESUMABLE_FIELDS or settled:
            continue
        if old.get(key) != new.get(key):
            lines.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return lines
