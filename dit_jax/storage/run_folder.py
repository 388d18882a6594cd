"""The folder of a run: its config, its lock and its layout.

config.json   the resolved config
classes.json  the names of the data set's classes, for pictures
checkpoints/  see `storage.checkpoints`
metrics.jsonl, tensorboard/   see `training.records`
samples/      grids of images by step
profile/      see `runtime.profile`
stacks.txt    see `runtime.watchdog`
divergences.json   see `storage.divergences`
codec/        the frozen codec of a diffusion run, or the result of an autoencoder run (see `interop.codec_folder`)
"""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from dit_jax.errors import UserError
from dit_jax.runtime import user_code
from dit_jax.runtime.console import say
from dit_jax.storage import divergences
from dit_jax.storage.atomic import remove_leftovers, write_json
from dit_jax.storage.bounded import check_form, parsed, read_json
from dit_jax.storage.claim import claim
from dit_jax.storage.paths import local_path
from dit_jax.storage.upgrade import upgrade_stored

SCORES, BEST_SCORE = "scores", "best.json"
CLASSES = "classes.json"

# Sections that may change when a run resumes. A change of any other field makes it another run.
RESUMABLE = (
    "num_steps",
    "mesh",
    "loader",
    "checkpoint",
    "log",
    "profile",
    "preview",
    "evaluation",
    "sampler",
    "guidance",
    "forecast",
    "scoring",
    "imports",
)
# Fields that change a network's speed but not its result, and paths whose content is compared by hash.
RESUMABLE_FIELDS = (
    "model.attention",
    "model.remat",
    "model.unroll",
    "codec.path",
    "data.path",
    "data.verify",
    "task.perceptual_path",
)
# Fields that may change too, but that the steps from then on depend on: a change is printed.
PRINTED_FIELDS = ("optimizer.decay_steps",)


def default_workdir(config: str, process_count: int) -> Path:
    """The folder of a run without --workdir: "configs/imagenet.py:B/4,256" trains in runs/imagenet-B-4-256.

    Args:
        config: the config's file or name, with its argument after a colon.

    Raises:
        UserError: there are several processes, which may not see the same folder.
    """
    if process_count > 1:
        raise UserError("give --workdir=<folder of the run> on storage that all hosts share")
    file, _, argument = config.partition(":")
    return Path("runs") / "-".join(filter(None, (Path(file).stem, *re.split("[/,=:]", argument))))


def flatten(config: dict, prefix: str = "") -> dict:
    """Flattens nested dicts: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(old: dict, new: dict, free: Sequence[str] = ()) -> list[str]:
    """Lines "field: old -> new" for changed fields that must not change when a run resumes.

    free: more fields that may change.
    """
    old, new = flatten(old), flatten(new)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        may_change = key.split(".")[0] in RESUMABLE or key in (*RESUMABLE_FIELDS, *PRINTED_FIELDS, *free)
        if old.get(key) != new.get(key) and not may_change:
            lines.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return lines


class Workdir:
    """Opens or creates a run's folder for training; a context manager that holds the claim on it.

    settings: the run's config as JSON values (`config_file.plain`).

    Raises on entry:
        UserError: another command is at work in it; its config differs; it holds something else.
    """

    def __init__(self, path: str | os.PathLike, settings: dict, first: bool = True):
        self.path = local_path(path).absolute()
        self.settings, self.first = settings, first
        self._claim = contextlib.ExitStack()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def __enter__(self):
        file = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder; give another --workdir")
        if file.exists():
            before = read_config(self.path)
            diverged = divergences.unsolved(self.path) is not None
            lines = differences(before, self.settings, divergences.FIELDS if diverged else ())
            if lines and self.checkpoints.exists():  # without a checkpoint there is nothing to resume
                raise UserError(
                    f"{self.path} contains a run with another config; use that config, or give a new --workdir. "
                    f"Different:\n  " + "\n  ".join(lines)
                )
            old, new = flatten(before), flatten(self.settings)
            for key in PRINTED_FIELDS:
                if old.get(key) != new.get(key) and self.checkpoints.exists():
                    say(f"{key}: {old.get(key)} -> {new.get(key)}, for the steps from here on")
            for line in user_code.changes(before.get("imports", ()), self.settings.get("imports", ())):
                say(line)
        elif self.checkpoints.exists():
            raise UserError(
                f"{self.path} has checkpoints but no config.json: it is not a complete run of this program; "
                "give another --workdir"
            )
        if self.first:
            with contextlib.ExitStack() as stack:
                stack.enter_context(claim(self.path, "training"))
                write_json(file, self.settings, indent=2)
                remove_leftovers(self.path, "config.json", CLASSES, divergences.FILE, "metrics.jsonl", "result.json", "codec")
                self._claim = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        self._claim.close()


def read_config(workdir: str | os.PathLike) -> dict:
    """Reads the config of a run and upgrades it to the current fields; user code that it names is not imported.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = local_path(workdir) / "config.json"
    remedy = "restore it from the run's config"
    try:
        config = upgrade_stored(read_json(file, remedy), str(file), remedy)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: {workdir} is not the --workdir of a dit_jax.main run") from None
    user_code.expect(config.get("imports", ()))
    return config


def read_best(workdir: str | os.PathLike) -> dict | None:
    """The best score of a run so far, {"step", "fid", ...}; None if there is none."""
    workdir = local_path(workdir)
    file = workdir / SCORES / BEST_SCORE
    try:
        return read_json(file, form={"step": int, "fid": float})
    except FileNotFoundError:
        return None
    except UserError as error:
        logging.warning("%s: the best step starts anew.", error)
        return None


def write_class_names(workdir: Path, names: Sequence[str]) -> None:
    """Keeps the names of the classes, which `read_class_names` reads without the data set."""
    write_json(workdir / CLASSES, list(names))


def read_class_names(workdir: Path) -> tuple[str, ...]:
    """The names of a run's classes; () for a run that has not kept them, or for a weights file."""
    try:
        names = parsed((workdir / CLASSES).read_bytes(), str(workdir / CLASSES))
        check_form(names, [str], str(workdir / CLASSES))
        return tuple(names)
    except (OSError, ValueError):
        return ()
