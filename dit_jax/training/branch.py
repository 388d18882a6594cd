"""A branch: a new run that begins from a checkpoint of another one, with other hyper-parameters."""

import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from dit_jax.build import TRAINING_ONLY, Run
from dit_jax.config_file import plain
from dit_jax.errors import UserError
from dit_jax.interop import codec_folder
from dit_jax.parallel import hosts
from dit_jax.runtime.console import say
from dit_jax.runtime.versions import check_numeric_settings, commit
from dit_jax.storage import branch_record
from dit_jax.storage.checkpoints import restore_subtree
from dit_jax.storage.fingerprint import leaf_names
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import RESUMABLE, RESUMABLE_FIELDS, SAVED, flatten, read_class_names, read_config
from dit_jax.storage.step_folder import BadStep, read_record, steps_in
from dit_jax.tasks.state import TrainState, on_device, with_structure

# What a branch may change, apart from what may change when a run resumes. A change of any other field is refused: the parameters
# would mean something else.
SECTIONS = ("optimizer", "task", "data", "seed", "batch_size", "microbatches", "ema_decay", "ema_warmup", "averages")
FIELDS = ("model.dtype", "codec.dtype", "transform.flip", "transform.upright", *(f"process.{name}" for name in TRAINING_ONLY))
UNKNOWN: tuple[Any, ...] = (None, "", (), [])  # of a field of the codec or the conditioner that is read with its weights
READ_WITH_WEIGHTS = ("codec.", "conditioner.sha256")


@dataclass(frozen=True)
class Branch:
    """The checkpoint that a run begins from, and what is kept of it.

    Fields:
        run: folder of the other run.
        step: of its checkpoint.
        config: of the other run.
        reset_optimizer: begin with a new state of the optimizer.
        begun: the new run has a checkpoint of its own, and the other run is not read.
    """

    run: Path
    step: int
    config: dict[str, Any]
    reset_optimizer: bool
    begun: bool

    def check_config(self, config: Any) -> None:
        """Raises a UserError if a field differs that a branch must keep, or if there are no steps left to train.

        config: the new run's. Fields of the codec that are read with its weights are compared once they are known.
        """
        lines = [
            f"{name}: {old!r} -> {new!r}"
            for name, (old, new) in self.changed(config).items()
            if not _may_change(name) and not (name.startswith(READ_WITH_WEIGHTS) and (old in UNKNOWN or new in UNKNOWN))
        ]
        if lines:
            raise UserError(
                f"a branch of {self.run} keeps its model, process, codec, conditioner, image size and task; leave these fields "
                "as they are, or train a new run. Different:\n  " + "\n  ".join(lines)
            )
        if config.num_steps <= self.step:
            raise UserError(
                f"num_steps is {config.num_steps}, and the branch begins at step {self.step} of {self.run}; give "
                f"--config.num_steps=<more than {self.step}>"
            )

    def changed(self, config: Any) -> dict[str, list[Any]]:
        """{field: [old, new]} of the fields in which a config differs from the other run's."""
        old, new = flatten(self.config), flatten(plain(config))
        names = sorted((old.keys() | new.keys()) - {"imports"})
        return {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}

    def with_codec(self, config: Any) -> Any:
        """This config of the other run with that run's copy of its codec, where the codec's path does not exist any more."""
        given, own = config.codec.get("path"), self.run / codec_folder.FOLDER
        if not given or local_path(given).exists() or not own.exists():
            return config
        with config.unlocked():
            config.codec.path = str(own)
        return config

    def check(self, run: Run) -> None:
        """Makes all checks that need no weights, before anything is written; reads the data set and the record of the checkpoint.

        run: the new one, with the weights of its codec.

        Raises:
            UserError: as `check_config`; the classes of the data, the optimizer or a setting of JAX differ.
        """
        self.check_config(run.config)
        before, names = read_class_names(self.run), tuple(run.source.class_names)
        if before and names and before != names:
            pairs = zip(before, names, strict=False)
            label = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(before), len(names)))
            raise UserError(
                f"the data of a branch has the classes of {self.run}, in their order; label {label} was "
                f"{[*before, None][label]!r} and is {[*names, None][label]!r}"
            )
        meta, stored = self._record()
        check_numeric_settings(meta.get("numerics", {}), f"the run in {self.run}")
        if not self.reset_optimizer:
            self._stored_optimizer(run, stored)
        if meta["data"] != run.loader.source.fingerprint:
            say(f"note: the data set is not that of {self.run}, or has changed since")

    def restore(self, run: Run) -> TrainState:
        """The state that the new run begins from, on its mesh.

        Parameters, moving averages, the state of the optimizer and the step count are the checkpoint's. A moving average that the
        other run does not have begins at the parameters; one that the new run does not have is dropped. A new state of the
        optimizer begins with its schedule at the step.

        Raises:
            UserError: the checkpoint is damaged, or its parameters do not fit.
        """
        wanted, (_, stored) = run.abstract_state, self._record()
        kept = {name: tree for name, tree in wanted.averages.items() if any(x.startswith(f"averages/{name}/") for x in stored)}
        parts: dict[str, Any] = {"step": wanted.step, "params": wanted.params, "ema_params": wanted.ema_params}
        if kept:
            parts["averages"] = kept
        if not self.reset_optimizer:
            parts["opt_state"] = self._stored_optimizer(run, stored)
        tree, _, _ = restore_subtree(self.run / "checkpoints", parts, self.step)
        if self.reset_optimizer:
            opt_state = _new_optimizer_state(run, tree["params"], self.step)
        else:
            opt_state = with_structure(tree["opt_state"], wanted.opt_state)
        averages = tree.get("averages", {}) | _begun(
            tree["params"], {name: average for name, average in wanted.averages.items() if name not in kept}
        )
        parts = {"step": tree["step"], "params": tree["params"], "ema_params": tree["ema_params"], "opt_state": opt_state}
        return dataclasses.replace(wanted, **parts, **({"averages": averages} if wanted.averages else {}))

    def note(self, workdir: Path, config: Any) -> None:
        """Records the branch in its folder, on the first process."""
        if not hosts.is_first():
            return
        record = {
            "run": str(self.run),
            "step": self.step,
            "params": branch_record.digest(self._record()[1]),
            "commit": commit(),
            "time": time.time(),
            "reset_optimizer": self.reset_optimizer,
            "changed": self.changed(config),
            "config": self.config,
        }
        branch_record.write(workdir, record)

    def _record(self) -> tuple[dict, dict]:
        path = epath.Path(self.run / "checkpoints" / str(self.step))
        try:
            return read_record(path)
        except BadStep as reason:
            raise UserError(
                f"the checkpoint {path} is damaged: {reason}; choose another one with --step={_of(self.run)}"
            ) from None

    def _stored_optimizer(self, run: Run, stored: Mapping[str, Any]) -> Any:
        """The abstract state of the optimizer as the checkpoint has it.

        Raises:
            UserError: it is the state of another optimizer.
        """
        old, new = self.config["optimizer"]["name"], run.config.optimizer.name
        saved = {name: facts[:2] for name, facts in stored.items() if name.startswith("opt_state/")}
        if old == new:
            for abstract in run.abstract_states():
                tree = {"opt_state": abstract.opt_state}
                leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
                if {name: [str(x.dtype), list(x.shape)] for name, x in leaves} == saved:
                    return abstract.opt_state
        what = (
            f"optimizer.name: {old!r} -> {new!r}" if old != new else f"its state of {new!r} has other arrays than this config's"
        )
        raise UserError(
            f"the state of the optimizer of {self.run} does not fit ({what}); give --reset_optimizer to begin with a new one at "
            f"step {self.step}, or keep the optimizer"
        )


def opened(
    run: str | os.PathLike, workdir: Path, step: int | None = None, reset_optimizer: bool = False, restart: bool = False
) -> Branch:
    """The branch of a run in a folder, that is begun or goes on. Processes agree on the step.

    Args:
        run: folder of the other run; it is only read, and may be training.
        workdir: of the branch.
        step: of the checkpoint; None for the newest, or for that with which the branch in `workdir` was begun.
        restart: whether what is in `workdir` will be renamed.

    Raises:
        UserError: there is no such run or step; `workdir` has another run, or a branch of another checkpoint.
    """
    source = local_path(run).absolute()
    if source.resolve() == workdir.resolve():
        raise UserError(f"--from={run} is the folder of --workdir; give a new folder, or go back in place with --rewind=<step>")
    record = None if restart else branch_record.read(workdir)
    # A run that was killed before its first checkpoint has metrics.
    has_run = not restart and bool(
        steps_in(workdir / "checkpoints")
        or (workdir / SAVED).exists()
        or (record is None and (workdir / "metrics.jsonl").exists())
    )
    is_same = record is not None and record["run"] == str(source) and step in (None, record["step"])
    if hosts.greatest(int(has_run)):
        if record is None or not is_same or record["reset_optimizer"] != reset_optimizer:
            was = "a run that is no branch" if record is None else f"a branch of {'; '.join(branch_record.lines(record)[:2])}"
            raise UserError(
                f"{workdir} has {was}; give a new --workdir for a branch of {source}, or resume the run there with the command "
                "that began it"
            )
        return Branch(source, record["step"], record["config"], reset_optimizer, begun=True)
    config, steps = read_config(source), steps_in(source / "checkpoints")
    if step is None:  # a start that was killed has recorded its step; the other run may have saved more since
        step = record["step"] if record is not None and is_same else max(steps, default=-1)
    agreed = hosts.greatest(step + 1 if hosts.is_first() and step in steps else 0) - 1
    if agreed < 0:
        raise UserError(
            f"--from={run} has no checkpoint of step {step}; the saved steps are: {_of(source)}"
            if steps
            else f"--from={run} has no checkpoint; train this run first"
        )
    return Branch(source, agreed, config, reset_optimizer, begun=False)


def check_unbegun(workdir: Path, latest_step: int | None) -> None:
    """Raises a UserError if a branch was killed before it had a checkpoint and is started without --from: it would begin anew."""
    record = branch_record.read(workdir) if latest_step is None else None
    if record is not None:
        raise UserError(
            f"{workdir} is a branch of {record['run']}, step {record['step']}, that has not begun; give --from={record['run']} "
            f"--step={record['step']} again, or another --workdir"
        )


def _of(run: Path) -> str:
    return ", ".join(map(str, steps_in(run / "checkpoints"))) or "none"


def _may_change(name: str) -> bool:
    section = name.split(".")[0]
    free = section in (*RESUMABLE, *SECTIONS) or name in (*RESUMABLE_FIELDS, *FIELDS)
    return free and name != "task.name"


def _new_optimizer_state(run: Run, params: Any, step: int) -> Any:
    """The optimizer's first state for these parameters, with its schedules at `step`."""

    def at_step(part):
        is_schedule = isinstance(part, optax.ScaleByScheduleState)
        return part._replace(count=jnp.full_like(part.count, step)) if is_schedule else part

    def init(params):
        state = run.task.init_optimizer(on_device(params))
        return jax.tree.map(at_step, state, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState))

    return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, run.abstract_state.opt_state))(params)


def _begun(params: Any, averages: Mapping[str, Any]) -> dict[str, Any]:
    """Moving averages that begin at the parameters. averages: {name: abstract}."""
    if not averages:
        return {}

    def copies(params):
        return {name: jax.tree.map(lambda x: jnp.copy(x.astype(jnp.float32)), on_device(params)) for name in averages}

    return jax.jit(copies, out_shardings=jax.tree.map(lambda x: x.sharding, dict(averages)))(params)
