"""The weights that a run starts from (config section `init`).

<workdir>/initial_weights.json   what they were, with their SHA-256; a resumed run does not read them again
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.build import Run
from dit_jax.data import class_names
from dit_jax.errors import UserError
from dit_jax.interop import base_file, text_encoders
from dit_jax.interop import weights as weights_file
from dit_jax.models.network import position_grid, scales_positions, size_unit
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import place
from dit_jax.parallel.rules import path_name
from dit_jax.runtime.console import say
from dit_jax.sample import trained
from dit_jax.storage.atomic import write_json
from dit_jax.storage.bounded import read_json
from dit_jax.storage.run_folder import INIT, read_class_names
from dit_jax.storage.step_folder import steps_in
from dit_jax.tasks.diffusion import CONDITIONER
from dit_jax.tasks.state import TrainState, abstract_state

# Fields of a network that may differ from those of the weights.
FREE = (
    "name",
    "num_classes",
    "position_grid",
    "attention",
    "remat",
    "unroll",
    "dtype",
    "param_dtype",
)


def settled(run: Run, workdir: Path) -> Run:
    """The run with the grid of positions of its weights, if that is another one; a resumed run has stored it.

    Raises:
        UserError: there are no such weights.
    """
    if not starts_from_weights(run) or not scales_positions(run.network) or run.config.model.get("position_grid"):
        return run
    file = workdir / INIT
    if file.exists():
        grid = read_json(file, form={"sha256": str}).get("position_grid")
    else:
        source = Run(opened(run).config)
        if not scales_positions(source.network):  # another kind of network, which `check_fits` refuses
            return run
        grid = position_grid(source.network, source.latent_shape)
        grid = None if grid == grid_of(run) else grid
    if grid is None:
        return run
    config = ml_collections.ConfigDict(run.config.to_dict())
    config.model.position_grid = tuple(grid)
    say(f"positions  scaled to the grid {grid[0]} x {grid[1]} of the weights; this run has {' x '.join(map(str, grid_of(run)))}")
    return run.with_config(config.lock())


def opened(run: Run) -> trained.Trained:
    """The weights that a run starts from, opened."""
    sections = weights_file.sections_of(run.config.to_dict())
    if "trainable" in sections["conditioner"]:  # weights of other code are those of the network alone
        sections["conditioner"] = {**sections["conditioner"], "trainable": False}
    return trained.read(run.config.init.weights, sections)


def grid_of(run: Run) -> tuple[int, ...]:
    """(rows, columns) of the network's positions."""
    return position_grid(run.network, run.latent_shape)


class Initial:
    """The weights that a run starts from, read when they are first needed.

    Fields:
        run: the run; with its frozen parameters, if there are some.

    Args:
        run: the run of the config, whose section `init` names weights.
        workdir: folder of the run, which has the frozen parameters if the run was begun.
        parent: folder of the run whose checkpoint a branch begins from: it has what the branch keeps.

    Raises:
        UserError: the weights do not exist, or do not fit the network: lists every difference.
    """

    def __init__(self, run: Run, workdir: Path, parent: Path | None = None):
        self._section, self._workdir, self._parent = run.config.init, workdir, parent
        self.run = run
        if parent is None and not steps_in(workdir / "checkpoints"):
            self.params  # before any work
        if run.adaptation.active:
            self.run = run.with_base(self._base())

    def _base(self) -> Any:
        adaptation = self.run.adaptation
        if "params" in vars(self):
            return adaptation.base(self.params)
        return base_file.read(self._parent or self._workdir, adaptation.base(self._shapes))

    @cached_property
    def _shapes(self) -> Any:
        return jax.eval_shape(self.run.task.init_params, jax.random.key(0))

    @cached_property
    def _opened(self) -> trained.Trained:
        weights = opened(self.run)
        self._step = weights.check(self._section.get("step"), self._section.average)
        return weights

    @cached_property
    def _source(self) -> Run:
        """The run of the weights, on the mesh of this one."""
        config = ml_collections.ConfigDict(self._opened.config.to_dict())
        config.mesh = self.run.config.mesh
        return Run(config, devices=self.run.devices)

    @cached_property
    def params(self) -> Any:
        """The network's parameters at the start, as NumPy arrays on every host."""
        say(f"reading {self._section.weights}, the weights to start from")
        check_fits(self._source, self.run, self._section.weights)
        params, step = self._opened.params(self._source, self._step, self._section.average)
        source = {name: np.asarray(hosts.to_host(x)) for name, x in flatten_dict(params, sep="/").items()}
        self.record = {
            "weights": str(self._opened.path),
            "step": step,
            "average": self._section.average,
            "sha256": base_file.sha256(unflatten_dict(source, sep="/")),
            "position_grid": self.run.config.model.get("position_grid"),
        }
        wanted = flatten_dict(self._shapes, sep="/")
        if (table := label_table(self.run)) in wanted:
            source[table] = self._label_table(table, source.get(table), wanted[table].shape[0] - 1)
        if lacking := wanted.keys() - source.keys():  # text encoders, which the weights may not have, see `check_fits`
            source |= {name: x for name, x in _encoders(self.run).items() if name in lacking}
        params = {name: source[name].astype(x.dtype) for name, x in wanted.items()}
        return unflatten_dict(params, sep="/")

    def _label_table(self, table: str, rows: np.ndarray | None, classes: int) -> np.ndarray:
        """The table of this run: rows of classes of the same name, and of the null label, are kept; the others are random."""
        names, kept, new = tuple(self.run.source.class_names), {}, self._random(table)
        if rows is not None:
            kept = kept_rows(self._names_of_weights(len(rows) - 1), names, len(rows) - 1, classes)
            for to, start in {**kept, classes: len(rows) - 1}.items():
                new[to] = rows[start]
        self.record["classes_kept"], self.record["classes"] = len(kept), classes
        others = "; the others are random" if len(kept) < classes else ""
        say(f"labels     {len(kept)} of {classes} classes keep their row of {self._section.weights}{others}")
        return new

    def _names_of_weights(self, classes: int) -> tuple[str, ...]:
        if self._section.class_names:
            names = tuple(class_names.read(self._section.class_names, "init.class_names"))
            if len(names) != classes:
                raise UserError(
                    f"init.class_names={self._section.class_names} has {len(names)} names, and the weights have {classes} "
                    "classes; give one name for each"
                )
            return names
        names = read_class_names(self._opened.path)
        origin = self._opened.weights.origin if self._opened.weights is not None else {}
        names = names or tuple(origin.get("class_names", ()))
        return names if len(names) == classes else ()

    def _random(self, name: str) -> np.ndarray:
        """One parameter of a new network; nothing else is computed."""
        init = jax.jit(lambda key: flatten_dict(self.run.task.init_params(key), sep="/")[name])
        return np.array(init(jax.random.key(self.run.config.seed)))

    def state(self) -> TrainState:
        """The state at the start of training, on the mesh; the parameters on the host are let go."""
        run = self.run
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run.whole().task, run.mesh).params)
        params = place(self.params, shardings)
        del self.params
        out = jax.tree.map(lambda x: x.sharding, run.abstract_state)
        key = jax.random.key(run.config.seed)
        return jax.jit(lambda params: jax.tree.map(jnp.copy, run.task.state_of(params, key)), out_shardings=out)(params)

    def keep(self) -> None:
        """Writes the record and the frozen parameters to the folder of the run; call it on the first process.

        Raises:
            UserError: an earlier start of the run, which saved no checkpoint, read other weights.
        """
        file = self._workdir / INIT
        if self._parent is not None:
            self.record = read_json(self._parent / INIT, form={"sha256": str})
        elif "params" not in vars(self):  # resumed
            return
        if file.exists() and (before := read_json(file, form={"sha256": str})["sha256"]) != self.record["sha256"]:
            raise UserError(
                f"{self._section.weights} has changed since this run began (SHA-256 {self.record['sha256'][:12]}, was "
                f"{before[:12]}); give the same weights, or begin again with --restart"
            )
        write_json(file, self.record, indent=2)
        if self.run.adaptation.active:
            base_file.keep(self._workdir, self.run.base)


def check_fits(source: Run, run: Run, path: Any) -> None:
    """Raises a UserError that lists every difference between two networks, except in their label tables.

    A difference in the size of the images is none where the network takes other sizes (`models.network.Resizable`); other
    processes, codecs and dtypes are said.
    """
    table = label_table(run)
    have, wanted = (
        {name: x.shape for name, x in flatten_dict(jax.eval_shape(one.task.init_params, jax.random.key(0)), sep="/").items()}
        for one in (source, run.whole())
    )
    have.pop(table, None), wanted.pop(table, None)
    for name in [name for name in wanted if name.startswith(_of_encoders(run)) and name not in have]:
        del wanted[name]  # it starts from the weights of the text encoder
    lines = []
    for name in sorted({*source.config.model, *run.config.model} - {*FREE}):
        theirs, ours = getattr(source.network, name, None), getattr(run.network, name, None)
        if _as_stored(theirs) != _as_stored(ours):
            lines.append(f"model.{name} is {ours}, and the weights have {theirs}")
    channels = source.latent_shape[-1], run.latent_shape[-1]
    if channels[0] != channels[1]:
        lines.append(f"the data has {channels[1]} channels, and the weights have {channels[0]}")
    sizes = source.latent_shape[:-1], run.latent_shape[:-1]
    if sizes[0] != sizes[1] and size_unit(run.network) is None:
        theirs, ours = (" x ".join(map(str, size)) for size in sizes)
        lines.append(f"the input is {ours}, the weights have {theirs}, and {run.config.model.name!r} takes only its trained size")
    outputs = [one.process.output_channels(one.latent_shape[-1]) // one.latent_shape[-1] for one in (source, run)]
    if outputs[0] != outputs[1]:
        learned = {1: "no learned variance", 2: "a learned variance"}
        lines.append(
            f"process {run.config.process.name!r} has {learned.get(outputs[1], outputs[1])}, and the weights have "
            f"{learned.get(outputs[0], outputs[0])}"
        )
    if have != wanted and not lines:
        names = sorted(name for name in have.keys() | wanted.keys() if have.get(name) != wanted.get(name))
        lines = [f"{name} is {wanted.get(name)}, and the weights have {have.get(name)}" for name in names[:5]]
    if lines:
        raise UserError(f"init.weights={path} does not fit the network; set what the weights have:\n  " + "\n  ".join(lines))
    for what, value in source.predicts().items():
        if what in ("process", "codec") and run.predicts()[what] != value:
            say(f"warning: the weights were trained with another {what} ({value}) than this run has ({run.predicts()[what]})")


def _of_encoders(run: Run) -> tuple[str, ...]:
    """What the paths of the parameters of pretrained text encoders begin with, where they are trained."""
    return () if run.text is None else tuple(f"{CONDITIONER}/{name}/" for name in run.text.tuned)


def _encoders(run: Run) -> dict[str, np.ndarray]:
    """{path: array} of the pretrained text encoders that are trained, from their files."""
    if run.text is None or not run.text.tuned:
        return {}
    say(f"reading the text encoders {', '.join(run.text.tuned)}, which are trained from their weights on")
    return flatten_dict({CONDITIONER: text_encoders.read_all(run.text)}, sep="/")


def with_encoders(run: Run, state: TrainState) -> TrainState:
    """A new state whose parameters and averages have the weights of the pretrained text encoders that are trained.

    Raises:
        UserError: see `text_encoders.read_all`.
    """
    weights = _encoders(run)
    if not weights:
        return state

    def replaced(tree: Any) -> Any:
        def one(path: Any, x: jax.Array) -> jax.Array:
            new = weights.get(path_name(path))
            return x if new is None else place(new.astype(x.dtype), x.sharding)

        return jax.tree_util.tree_map_with_path(one, tree)

    parts: dict[str, Any] = {"params": replaced(state.params), "ema_params": replaced(state.ema_params)}
    if state.averages:
        parts["averages"] = {name: replaced(tree) for name, tree in state.averages.items()}
    return dataclasses.replace(state, **parts)


def kept_rows(theirs: Sequence[str], ours: Sequence[str], their_classes: int, classes: int) -> dict[int, int]:
    """{class of this run: class of the weights}: classes of the same name; of the same number where names are not known.

    Without names, an equal number of classes keeps all rows, and another number keeps none.
    """
    if theirs and ours:
        return {label: theirs.index(name) for label, name in enumerate(ours) if name in theirs}
    return {label: label for label in range(classes)} if their_classes == classes else {}


def _as_stored(value: Any) -> Any:
    """The value as a config has it that was read from a file: with lists for tuples."""
    return [_as_stored(x) for x in value] if isinstance(value, (tuple, list)) else value


def label_table(run: Run) -> str:
    """The path of the network's label table; "" for a network that does not say it."""
    return getattr(run.network, "label_table", "")


def starts_from_weights(run: Run) -> bool:
    """Whether a run starts from weights."""
    return bool(run.config.get("init", {}).get("weights"))
