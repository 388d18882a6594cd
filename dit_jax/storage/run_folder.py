"""The folder of a run: its config, its lock and its layout.

config.json   the resolved config
classes.json  the names of the data set's classes, for pictures
saved.json    there from the first saved checkpoint on, see `check_not_lost`
checkpoints/  see `storage.checkpoints`
metrics.jsonl, tensorboard/   see `training.records`
starts.jsonl  see `training.starts`
result.json   the result; written at the end, and not again
samples/      grids of images by step
profile/      see `runtime.profile`
stacks.txt    see `runtime.watchdog`
divergences.json   see `storage.divergences`
initial_weights.json     the weights that training started from; base.safetensors: those that are frozen (see `training.initial`)
branched_from.json   see `storage.branch_record`
rewinds.json, rewound.<n>/   see `storage.rewinds`
codec/        the frozen codec of a diffusion run, or the result of an autoencoder run (see `interop.codec_folder`)
"""

import contextlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from etils import epath

from dit_jax.errors import UserError
from dit_jax.runtime import user_code
from dit_jax.runtime.console import say
from dit_jax.storage import branch_record, divergences, rewinds
from dit_jax.storage.atomic import remove_leftovers, write_json
from dit_jax.storage.bounded import check_form, parsed, read_json
from dit_jax.storage.claim import LOCK, claim
from dit_jax.storage.paths import local_path
from dit_jax.storage.step_folder import steps_in
from dit_jax.storage.upgrade import upgrade_stored

SCORES, BEST_SCORE = "scores", "best.json"
CLASSES, RESULT, SAVED, INIT = "classes.json", "result.json", "saved.json", "initial_weights.json"
RESULT_SECTIONS = ("evaluation", "validation", "sampler", "guidance", "forecast")  # that the results at the end depend on
# What a run writes, whose partial files the next start removes. A user may keep other files in these folders.
WRITTEN = (
    *("config.json", CLASSES, SAVED, INIT, "base.safetensors", divergences.FILE, branch_record.FILE, rewinds.FILE),
    *("metrics.jsonl", RESULT, "codec", "report.html", "wandb_id.txt"),
)
PICTURES = re.compile(r"(\d{8}(_final|_denoising|_originals|_reconstructions)?|real|plane)\.(png|npz)")
SCORE_FILES = re.compile(r"(\d{8}|best)\.json|reference\.npz")

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
    "validation",
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
    "process.sampling_grid",
    "codec.path",
    "conditioner.weights",
    "conditioner.tokenizers",
    "data.path",
    "data.verify",
    "task.perceptual_path",
)
# Fields that may change too, but that the steps from then on depend on: a change is printed.
PRINTED_FIELDS = ("optimizer.decay_steps", "optimizer.decay", "optimizer.decay_start")


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


def check_not_lost(workdir: Path, latest_step: int | None) -> None:
    """Raises a UserError if the run has saved a checkpoint before and has none now: it would train afresh, over its records.

    A run that was killed before its first checkpoint begins again.

    latest_step: the newest checkpoint, or None.
    """
    if latest_step is None and any((workdir / name).exists() for name in (SAVED, "result.json")):
        raise UserError(
            f"the run in {workdir} has saved checkpoints, and {workdir / 'checkpoints'} has none that can be used; put them "
            f"back, or begin again with --restart, which renames the folder to {free_name(workdir).name} and deletes nothing"
        )


def free_name(workdir: Path) -> Path:
    """<workdir>.<n> with the first n, from 1, for which there is nothing of that name."""
    return next(path for n in itertools.count(1) if not os.path.lexists(path := workdir.with_name(f"{workdir.name}.{n}")))


def set_aside(workdir: str | os.PathLike) -> Path | None:
    """Renames a run's folder to `free_name`; returns the new path, or None if there is no folder or it is empty.

    Raises:
        UserError: the folder is not that of a run, another command is at work in it, or it cannot be renamed.
    """
    workdir = local_path(workdir).absolute()
    if not workdir.exists() or not any(workdir.iterdir()):
        return None
    if not any((workdir / name).exists() for name in ("config.json", "checkpoints", "metrics.jsonl")):
        raise UserError(
            f"--restart: {workdir} is not the folder of a run of dit_jax.main, so it is not renamed; give another --workdir"
        )
    target = free_name(workdir)
    with claim(workdir, "renaming it"):
        try:
            workdir.rename(target)
        except OSError as error:
            raise UserError(
                f"--restart: {workdir} cannot be renamed ({error.strerror}); rename it, or give another --workdir"
            ) from None
        (target / LOCK).unlink(missing_ok=True)
    return target


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
    finished: the run has its result; its records are not written again.
    back: the step to which the run goes back, see `rewinds.decided`; then it may have another rate, as after a divergence.

    Raises on entry:
        UserError: another command is at work in it; its config differs; it holds something else.
    """

    def __init__(
        self, path: str | os.PathLike, settings: dict, first: bool = True, finished: bool = False, back: int | None = None
    ):
        self.path = local_path(path).absolute()
        self.settings, self.first, self.finished, self.back = settings, first, finished, back
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
            goes_back = self.back is not None or divergences.unsolved(self.path) is not None
            lines = differences(before, self.settings, divergences.FIELDS if goes_back else ())
            if lines and self.checkpoints.exists():  # without a checkpoint there is nothing to resume
                raise UserError(
                    f"{self.path} contains a run with another config; use that config, or give a new --workdir. "
                    f"Different:\n  " + "\n  ".join(lines)
                )
            old, new = flatten(before), flatten(self.settings)
            if self.finished:
                check_finished(self.path, old, new)
            for key in () if self.finished else PRINTED_FIELDS:
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
                if self.back is not None:
                    self._begin_rewind(self.back)
                if not self.finished:
                    write_json(file, self.settings, indent=2)
                remove_leftovers(self.path, *WRITTEN)
                remove_leftovers(self.samples, PICTURES)
                remove_leftovers(self.path / SCORES, SCORE_FILES)
                self._claim = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        self._claim.close()

    def _begin_rewind(self, step: int) -> None:
        before = read_config(self.path)
        old, new = flatten(before), flatten(self.settings)
        changed = {key: [old.get(key), new.get(key)] for key in divergences.FIELDS if old.get(key) != new.get(key)}
        rewinds.begin(self.path, step, max(steps_in(epath.Path(self.checkpoints)), default=step), before, changed)

    def note_begun_again(self) -> None:
        """Takes back `note_saved`, before all checkpoints are set aside: the run begins again at step 0."""
        if self.first:
            (self.path / SAVED).unlink(missing_ok=True)

    def note_saved(self) -> None:
        """Notes that the run has a checkpoint, for `check_not_lost`; a failure is logged."""
        file = self.path / SAVED
        try:
            if self.first and not file.exists():
                write_json(file, {"saved": True})
        except OSError as error:
            logging.warning("Cannot write %s (%s).", file, error)


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


def read_result(workdir: Path, num_steps: int) -> dict | None:
    """result.json of a run that is finished with `num_steps` steps, its samples included; None for another run."""
    try:
        result = read_json(workdir / RESULT, form={"step": int})
    except FileNotFoundError:
        return None
    except UserError as error:
        logging.warning("%s: the results are made again.", error)
        return None
    samples = result.get("samples")
    has_samples = not samples or (workdir / "samples" / Path(samples).name).exists()  # the folder may have moved
    return result if result["step"] == num_steps and has_samples else None


def check_finished(workdir: Path, old: dict, new: dict) -> None:
    """Raises a UserError if another config wants other results of a finished run; says which other fields have no effect.

    old, new: flat configs.
    """
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed}
    if other := [text for key, text in lines.items() if key.split(".")[0] in RESULT_SECTIONS]:
        raise UserError(
            f"the run in {workdir} is finished, with other settings of its results ({'; '.join(other)}); draw and score more "
            f"with dit_jax.sample and dit_jax.evaluate, or remove {RESULT} there to make the results again"
        )
    if lines:
        say(f"the run is finished; without effect: {'; '.join(lines.values())}")


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
