"""Sweep files, and their expansion into runs.

A sweep file is a Python file with `get_sweep()`, which returns a `Sweep`:

    def get_sweep():
        return Sweep(title="Width against learning rate", base="configs/digits.py:process=flow",
                     grid={"model.width": [64, 128], "optimizer.learning_rate": [1e-3, 2e-3]}, seeds=[0, 1])
"""

import importlib.util
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dit_jax.errors import UserError

UNFIT_FOR_NAMES = re.compile(r"[^A-Za-z0-9._=+-]+")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep: every variant with every combination of the grid's values and every seed.

    Fields:
        title: heading of the report.
        base: config file of the runs, as for --config: "configs/digits.py", optionally with a colon and its argument. If empty,
            the sweep file itself, which then also has a `get_config`.
        variants: {name: argument of the config file, or {config path: value}}; if empty, a single variant without a name.
        grid: {config path: values}; a single value applies to all runs.
        seeds: values of `seed`; the config's if empty.
        samplers: (name in `recipes.SAMPLERS`, steps). Once it is finished, the first seed of every model is sampled and scored
            with each of them. Steps are None for a sampler that chooses its own.
        paper: whether the report also shows the twelve models of Peebles & Xie (2023).
        reference_curves: CSV of earlier loss curves in the format of a report's curves.csv, in the sweep file's folder; none if
            empty.
        note: a sentence or two for the report's method section.
    """

    title: str
    base: str = ""
    variants: Mapping[str, str | Mapping[str, Any]] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    samplers: Sequence[tuple[str, int | None]] = ()
    paper: bool = False
    reference_curves: str = ""
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Fields:
        name: name of its folder; only letters, digits and ._=+-.
        group: the name without the seed; runs of one group are repetitions.
        config_file: value of --config.
        overrides: the other flags, such as --config.seed=1.
        settings: {config path: value} by which this run differs from the config file.
    """

    name: str
    group: str
    variant: str
    config_file: str
    overrides: tuple[str, ...]
    settings: Mapping[str, Any]
    config: ml_collections.ConfigDict

    @property
    def flags(self) -> list[str]:
        return [f"--config={self.config_file}", *self.overrides]


def load(path: str) -> Sweep:
    """Loads a sweep file.

    Raises:
        UserError: the file does not exist, fails, or does not return a valid `Sweep`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--sweep={path} does not exist; give a file such as configs/sweeps/digits.py")
    spec = importlib.util.spec_from_file_location(f"sweep_{file.stem}", file)
    if spec is None:
        raise UserError(f"--sweep={path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_sweep"):
            raise UserError(f"--sweep={path} has no get_sweep(); it must be a sweep file, see configs/sweeps, not a config")
        sweep = module.get_sweep()
    except UserError:
        raise
    except Exception as error:  # of the user's code
        raise UserError(f"--sweep={path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(sweep, Sweep):
        raise UserError(
            f"--sweep={path}: get_sweep() returned a {type(sweep).__name__}; it must return a dit_jax.sweep.grid.Sweep"
        )
    _check_fields(sweep)
    return sweep if sweep.base else replace(sweep, base=str(file))


def _check_fields(sweep: Sweep):
    for path, values in sweep.grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise UserError(f"the grid's {path} is {values!r}; it must be a list of at least one value")
        if len({repr(value) for value in values}) < len(values):
            raise UserError(f"the grid's {path} has a value twice: {values!r}")
    if sweep.seeds and "seed" in sweep.grid:
        raise UserError("seed is in the grid and in seeds; keep one of them")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"seeds has a value twice: {list(sweep.seeds)}")
    for entry in sweep.samplers:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise UserError(f"samplers has {entry!r}; each must be (name, steps), as in ('ddim', 50)")


def expand(sweep: Sweep, overrides: Sequence[str] = ()) -> list[Run]:
    """Expands a sweep into its runs, ordered by variant, then grid, then seed.

    Args:
        overrides: flags for all runs, such as --config.data.path=/data; those of the grid and variants take precedence.

    Raises:
        UserError: a config does not exist or fails, it lacks a path, a value has another type, or names are equal.
    """
    for text in overrides:
        path = text.removeprefix("--config.").partition("=")[0]
        owners = [name for name, value in sweep.variants.items() if not isinstance(value, str) and path in value]
        if path in sweep.grid or owners or (path == "seed" and sweep.seeds):
            raise UserError(f"{text}: the sweep itself sets {path}; change the sweep file, or omit the flag")
    runs = []
    axes = {path: values for path, values in sweep.grid.items() if len(values) > 1}
    labels = {path: path.rpartition(".")[2] for path in axes}
    if len(set(labels.values())) < len(labels):
        labels = {path: path for path in axes}
    for variant, choice in (sweep.variants or {"": {}}).items():
        for values in itertools.product(*sweep.grid.values()):
            settings = dict(zip(sweep.grid, values, strict=True))
            own, config_file = _variant(sweep.base, variant, choice, settings)
            parts = [variant] * bool(variant) + [f"{labels[path]}={settings[path]}" for path in axes]
            group = _name(parts or ["run"])
            for seed in sweep.seeds or (None,):
                chosen = settings | own | ({} if seed is None else {"seed": seed})
                name = f"{group}_seed={seed}" if len(sweep.seeds) > 1 else group
                given = (*overrides, *(f"--config.{path}={value}" for path, value in chosen.items()))
                runs.append(Run(name, group, variant or group, config_file, given, chosen, resolve(config_file, given, chosen)))
    _check_names(runs)
    return runs


def _variant(base: str, variant: str, choice, settings: Mapping[str, Any]) -> tuple[dict, str]:
    """(settings of a variant, the config file with its argument)."""
    if isinstance(choice, str):
        if ":" in base:
            raise UserError(f"variant {variant!r} is an argument of the config file, but base {base!r} already has one; keep one")
        return {}, f"{base}:{choice}"
    if not isinstance(choice, Mapping):
        raise UserError(
            f"variant {variant!r} is {choice!r}; it must be the config file's argument (a string) or {{config path: value}}"
        )
    if both := choice.keys() & settings.keys():
        raise UserError(f"variant {variant!r} and the grid both set {', '.join(sorted(both))}; keep one of them")
    return dict(choice), base


def _name(parts: Sequence[str]) -> str:
    return UNFIT_FOR_NAMES.sub("-", "_".join(parts)).strip("-.") or "run"


def _check_names(runs: list[Run]):
    seen: dict[str, Run] = {}
    for run in runs:
        if (other := seen.setdefault(run.name.lower(), run)) is not run:
            raise UserError(
                f"two runs would have the same folder {run.name!r} (variants {other.variant!r} and {run.variant!r}); rename one"
            )


def resolve(config_file: str, overrides: Sequence[str], settings: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Resolves the config that `python -m dit_jax.main --config=config_file *overrides` trains, with the same parser.

    Raises:
        UserError: main would refuse it; or a flag cannot express a setting, or would set another value.
    """
    for path, value in settings.items():
        if value is None:
            raise UserError(
                f"{path} is None, which a flag cannot express; set None in the config file (as a variant of its argument) instead"
            )
    values, arguments = flags.FlagValues(), ["main", f"--config={config_file}", *overrides]
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True, sys_argv=arguments)
    try:
        values(arguments)
        config = holder.value
        config.keys()
    except UserError:
        raise
    except OSError:
        raise UserError(
            f"the base config {config_file} does not exist in {Path.cwd()}; start from the folder that contains it"
        ) from None
    except (AttributeError, KeyError) as error:
        hint = " ".join(str(error.args[0]).split())  # its own text breaks the line
        raise UserError(f"the config {config_file} has no field {hint}; it was given by the sweep file or a flag") from None
    except (flags.Error, TypeError, ValueError, SyntaxError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{config_file} {' '.join(overrides)}: {text[-1].removeprefix('dit_jax.errors.UserError: ')}") from None
    except Exception as error:  # of the user's config file
        raise UserError(f"{config_file} fails: {type(error).__name__}: {error}") from error
    for path, value in settings.items():
        arrived = config
        for key in path.split("."):
            arrived = arrived[key]
        wanted = tuple(value) if isinstance(value, list) else value
        if arrived != wanted:
            raise UserError(
                f"{path} is {value!r} in the sweep, but the flag would set {arrived!r}: it must be a {type(arrived).__name__}"
            )
    return config
