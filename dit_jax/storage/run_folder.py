"""The folder of a run: its config, who is using it, and where things lie in it.

config.json   the resolved config
checkpoints/  see `checkpoint`
metrics.jsonl, tensorboard/   see `records`
samples/      grids of images by step
profile/      see `profile`
stacks.txt    see `watchdog`
codec/        the frozen codec of a diffusion run, or what an autoencoder run has made (see `codec_weights`)
"""

import contextlib
import json
from pathlib import Path

import ml_collections
from absl import logging

from dit_jax.errors import UserError
from dit_jax.runtime import user_code
from dit_jax.runtime.console import say
from dit_jax.storage.atomic import remove_leftovers, write_json
from dit_jax.storage.claim import claim
from dit_jax.storage.upgrade import upgrade

SCORES, BEST_SCORE = "scores", "best.json"

# May change when a run goes on; every other field makes it another run.
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
# What changes the speed of a network and not what it computes, and places whose content is compared by its hash.
RESUMABLE_FIELDS = (
    "model.attention",
    "model.remat",
    "model.unroll",
    "codec.path",
    "data.path",
    "data.verify",
    "task.perceptual_path",
)


def flatten(config: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def plain(config: ml_collections.ConfigDict) -> dict:
    """The config as JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def differences(old: dict, new: dict) -> list[str]:
    """Lines "field: old -> new" of the fields that may not change between two parts of one run."""
    old, new = flatten(old), flatten(new)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        may_change = key.split(".")[0] in RESUMABLE or key in RESUMABLE_FIELDS
        if old.get(key) != new.get(key) and not may_change:
            lines.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return lines


class Workdir:
    """Opens (or creates) a run's folder for training; a context manager that holds the claim on it.

    Raises on entry:
        UserError: another command is at work in it; its config differs; it holds something else.
    """

    def __init__(self, path, config: ml_collections.ConfigDict, first: bool = True):
        self.path = Path(path).expanduser().absolute()
        self.config, self.first = plain(config), first
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
            lines = differences(before, self.config)
            if lines and self.checkpoints.exists():  # a start that failed before its first checkpoint binds nobody
                raise UserError(
                    f"{self.path} holds a run with another config; go on with that one, or give a new --workdir. "
                    f"Different:\n  " + "\n  ".join(lines)
                )
            for line in user_code.changes(before.get("imports", ()), self.config.get("imports", ())):
                say(line)
        elif self.checkpoints.exists():
            raise UserError(
                f"{self.path} has checkpoints and no config.json: it is no run of this program, or was cut up; "
                "give another --workdir"
            )
        if self.first:
            with contextlib.ExitStack() as stack:
                stack.enter_context(claim(self.path, "training"))
                write_json(file, self.config, indent=2)
                remove_leftovers(self.path, "config.json", "metrics.jsonl", "result.json", "codec")
                self._claim = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        self._claim.close()


def read_config(workdir) -> dict:
    """The config that a run was started with, with today's fields; user code that it names is not imported.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = Path(workdir).expanduser() / "config.json"
    try:
        config = upgrade(json.loads(file.read_text()))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: {workdir} is not a --workdir that dit_jax.main has trained in") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it from the run's config") from None
    user_code.expect(config.get("imports", ()))
    return config


def read_best(workdir: Path) -> dict | None:
    """{"step", "fid", ...} of the best score of a run so far; None if there is none."""
    file = workdir / SCORES / BEST_SCORE
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logging.warning("%s cannot be read (%s): the best step starts anew.", file, error)
        return None
