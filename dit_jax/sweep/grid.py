"""Sweep files, and their expansion into runs.

A sweep file is a Python file with `get_sweep()`, which returns a `Sweep`:

    def get_sweep():
        return Sweep(title="Width against learning rate", base="digits:process=flow",
                     grid={"model.width": [64, 128], "optimizer.learning_rate": [1e-3, 2e-3]}, seeds=[0, 1])
"""

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_collections

from dit_jax import config_file, registry
from dit_jax.errors import UserError
from dit_jax.runtime import user_code
from dit_jax.storage.upgrade import upgrade_path

UNFIT_FOR_NAMES = re.compile(r"[^A-Za-z0-9._=+-]+")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep: every variant with every combination of the grid's values and every seed.

    Fields:
        title: heading of the report.
        base: config file of the runs, as --config takes it: "digits" or "configs/digits.py", after a colon its argument; the
            sweep file itself if empty, which then has a `get_config` too.
        variants: {name: the argument of the config file, or {config path: value}}; one without a name if empty.
        grid: {config path: values}; a single value is a setting of all runs.
        seeds: values of `seed`; that of the config if empty.
        samplers: (name of a registered sampler, steps): the first seed of every model is sampled and scored with each, once it is
            finished; None for the steps of one that chooses its own.
        compare: config path whose values the report compares, such as "model.name": a line for each in the figures, against
            GMACs, parameters and measured time; every model is a point of its own if empty.
        paper: the report shows the twelve models of Peebles & Xie (2023) beside the runs.
        reference_curves: CSV of earlier loss curves, as a report writes it (curves.csv), beside the sweep file; none if empty.
        note: a sentence or two for the report's method.
    """

    title: str
    base: str = ""
    variants: Mapping[str, str | Mapping[str, Any]] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    samplers: Sequence[tuple[str, int | None]] = ()
    compare: str = ""
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
        return [*user_code.flags(), f"--config={self.config_file}", *self.overrides]

    @property
    def imports(self) -> list[str]:
        """The --import flags of verbs that read this run's folder."""
        return [f"--import={entry['name']}" for entry in self.config.get("imports", ())]


def find(path: str) -> Path:
    """The sweep file of a path, or of a name in configs/sweeps, see `config_file.find`."""
    return config_file.find(path, "sweep", "sweeps")


def load(path: str) -> Sweep:
    """Loads a sweep file.

    Args:
        path: a path or a name, see `find`; after a colon, the argument of its `get_sweep`.

    Raises:
        UserError: the file does not exist, fails, does not take the argument, or does not return a valid `Sweep`.
    """
    name, colon, argument = path.partition(":")
    file, arguments = find(name), (argument,) if colon else ()
    before = registry.entries()
    module = user_code.load_file(file, f"--sweep={path}")
    if not hasattr(module, "get_sweep"):
        raise UserError(f"--sweep={path} has no get_sweep(); it must be a sweep file, see configs/sweeps, not a config")
    try:
        inspect.signature(module.get_sweep).bind(*arguments)
    except TypeError:
        wrong = f"takes no argument; leave out :{argument}" if colon else f"needs an argument; write --sweep={name}:<argument>"
        raise UserError(f"--sweep={path}: get_sweep() {wrong}") from None
    sweep = user_code.run(lambda: module.get_sweep(*arguments), str(file))
    if not isinstance(sweep, Sweep):
        raise UserError(user_code.wrong_result(file, module.get_sweep, sweep, "a dit_jax.sweep.grid.Sweep"))
    _check_fields(sweep)
    if sweep.base and registry.entries() != before:  # what the sweep file registers, the processes of its runs must too
        user_code.import_all([str(file)])
    return sweep if sweep.base else replace(sweep, base=str(file))


def _check_fields(sweep: Sweep):
    if sweep.compare and sweep.paper:
        raise UserError("compare and paper are both set, and the paper's models are in the figures of models only; keep one")
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
            own, file = _variant(sweep.base, variant, choice, settings)
            parts = [variant] * bool(variant) + [f"{labels[path]}={settings[path]}" for path in axes]
            group = _name(parts or ["run"])
            for seed in sweep.seeds or (None,):
                chosen = settings | own | ({} if seed is None else {"seed": seed})
                name = f"{group}_seed={seed}" if len(sweep.seeds) > 1 else group
                given = (*overrides, *(f"--config.{path}={value}" for path, value in chosen.items()))
                runs.append(Run(name, group, variant or group, file, given, chosen, resolve(file, given, chosen)))
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


def resolve(name: str, overrides: Sequence[str], settings: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config that `python -m dit_jax.main --config=name *overrides` trains.

    Raises:
        UserError: as main would refuse it; or a setting that would arrive as another value.
    """
    config = config_file.read(name, [text.removeprefix("--config.") for text in overrides])
    for path, value in settings.items():
        arrived = config
        for key in upgrade_path(path).split("."):
            arrived = arrived[key]
        wanted = tuple(value) if isinstance(value, list) else value
        if arrived != wanted:
            raise UserError(
                f"{path} is {value!r} in the sweep, but the flag would set {arrived!r}: it must be a {type(arrived).__name__}"
            )
    return config
