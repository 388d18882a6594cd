"""Verified checkpoints: asynchronous sharded saves, retention, and restore of the newest valid step.

Layout of the directory: `<step>/` is a committed step; `<step>.corrupt` a damaged step that was set aside; `<step>.abandoned` a
step that became obsolete when the user went back to an older one; `<step>.orbax-checkpoint-tmp*` and `<step>.removed` are
leftovers of a killed process, deleted at the next start of the training job. Only names that consist of a number count as steps.
"""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from dit_jax.errors import UserError
from dit_jax.parallel import hosts
from dit_jax.storage import step_folder
from dit_jax.storage.fingerprint import leaf_names
from dit_jax.storage.step_folder import BadStep, steps_in

_MAX_FAILURES = 3
_UNVERIFIED, _DAMAGED = 1, 2
BEGIN_AGAIN = "restore them, or begin again with --restart, which renames the run's folder and deletes nothing"
_LEFTOVER = re.compile(r"^\d+(\.removed|\.orbax-checkpoint-tmp.*)$")


class SaveError(RuntimeError):
    """A checkpoint could not be written or read back."""


def restore_subtree(directory: str | os.PathLike, abstract: Any, step: int | None = None) -> tuple[Any, dict, int]:
    """Restores and verifies part of a saved state; returns (subtree, meta, step).

    The directory is only read, so that another job may be saving there.

    Args:
        directory: checkpoint directory.
        abstract: fields of the state or parts of them, e.g. {"ema_params": tree of jax.ShapeDtypeStruct with sharding}.
        step: step to restore; None for the newest valid one (damaged ones are skipped with a warning).
    Raises:
        FileNotFoundError: there is no checkpoint, or not this step.
        UserError: a leaf is missing or has another shape or dtype; every step (or this one) is damaged.
    """
    root = _absolute(directory)
    newest, bad = _newest_valid(root, abstract, step, partial=True)
    for number, reason in bad.items():
        logging.warning("Skipping the damaged checkpoint %s: %s.", root / str(number), reason)
    if newest is None:
        raise FileNotFoundError(f"no checkpoint in {root}: train first, or give the folder that contains numbered steps")
    return newest


class Checkpointer:
    """Saves a state every `every_steps` steps and restores the newest valid one onto any mesh. A context manager.

    All processes must call every method together. Not thread-safe.

    Args:
        directory: local (or bucket) folder, created by the first save; for one training job at a time.
        every_steps: saves every so many steps, and at the end.
        keep_last: number of newest steps to keep. An older step is deleted only after a newer one was read back from
            disk and verified, so there may be one or two more until the next save or `close`.
        keep_every_steps: multiples of this are kept forever; None keeps none.
    Fields:
        best_step: a step that is kept as long as it is set here; None keeps none.
        on_commit: called after each save that is committed.
    Raises: UserError if a count is not an integer of at least 1.
    """

    def __init__(self, directory: str | os.PathLike, every_steps: int, keep_last: int = 3, keep_every_steps: int | None = None):
        counts = {"every_steps": every_steps, "keep_last": keep_last}
        if keep_every_steps is not None:
            counts["keep_every_steps"] = keep_every_steps
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"checkpoint {name}={value!r} must be an integer of at least 1")
        self._root = _absolute(directory)
        self._every_steps, self._keep_last, self._keep_every_steps = every_steps, keep_last, keep_every_steps
        self.best_step = None
        self.on_commit: Callable[[], None] = lambda: None
        self._manager: Any = None
        self._pending: Any = None  # (step, treedef, names, fingerprints) of a save whose commit is not confirmed
        self._read_back: Any = None  # (step, future) of a committed step that is being verified
        self._verified = set()
        self._failures = 0
        self._last_save_failed = False
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc, traceback):
        try:
            self.close()
        except SaveError:
            if exc_type is None:
                raise
            if not issubclass(exc_type, SaveError):  # which says the same
                logging.exception("While closing after %s:", exc_type.__name__)  # must not hide the first error

    @property
    def latest_step(self) -> int | None:
        """Newest step on disk, or None. A save in flight counts after `wait`; a damaged step counts until `restore`."""
        return max(steps_in(self._root), default=None)

    @property
    def steps(self) -> list[int]:
        """All steps on disk, sorted, as `latest_step` counts them."""
        return steps_in(self._root)

    def due(self, step: int) -> bool:
        """True if `step` is a positive multiple of every_steps. Logs the failure of a background save.

        Raises: SaveError if that was the third failure in a row.
        """
        if jax.process_count() == 1 and self._pending is not None and not self._manager.is_saving_in_progress():
            self._settle()  # several processes agree on the outcome at the next save or wait
        return step > 0 and step % self._every_steps == 0

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts writing `state` as `step`; returns once the arrays may be donated. At most one save is in flight.

        Args:
            step: at least 0 and newer than every saved step.
            state: pytree of jax.Array, including typed PRNG keys.
            meta: dict of JSON values, returned by `restore` (tuples become lists, keys become strings).
        Raises:
            ValueError: step is not newer than the saved ones; a leaf is not a jax.Array; meta is not JSON.
            SaveError: the third failure in a row (now or in the background). Earlier failures are logged, and the run continues.
        """
        self._collect_read_back()
        self._settle()
        newest = self._agreed_latest_step()
        if step <= newest:
            raise ValueError(f"cannot save step {step} in {self._root}: step {newest} exists. Restore it, or move it.")
        names = leaf_names(state)
        for name, leaf in zip(names, jax.tree.leaves(state), strict=True):
            if not isinstance(leaf, jax.Array):
                raise ValueError(f"leaf {name} is a {type(leaf).__name__}: convert it to a jax.Array with jnp.asarray")
        record = step_folder.record(state, meta)
        arrays = ocp.args.PyTreeSave(step_folder.without_keys(state))
        try:
            args = ocp.args.Composite(state=arrays, meta=ocp.args.JsonSave(record))
            if not self._open().save(step, args=args, force=True):
                raise SaveError("orbax saved nothing and reported no error")
        except Exception as error:
            self._save_failed(step, error)
            return
        self._pending = (step, jax.tree.structure(state), names, record["fingerprints"])

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict] | None:
        """Restores (state, meta) of the newest valid step; returns None if the folder has no checkpoint.

        A damaged step is renamed to `<step>.corrupt` once an older valid one is found; if all are damaged, none is renamed.

        Args:
            abstract_state: pytree like the saved one, every leaf with shape, dtype and sharding (of any mesh).
            step: goes back to this step; newer ones are renamed to `<step>.abandoned`.
        Raises:
            UserError: leaves, shapes or dtypes differ from the saved ones (names them); every step, or the requested one, is
                damaged.
            FileNotFoundError: the requested step does not exist.
        """
        self._collect_read_back()
        self._settle()
        self._drop_manager()  # it would still list the steps that are renamed below
        self._remove_leftovers()
        newest, bad = _newest_valid(self._root, abstract_state, step, partial=False, remedy=BEGIN_AGAIN)
        if newest is None:
            corrupt = sorted(path.name for path in self._root.glob("*.corrupt*")) if self._root.exists() else []
            if corrupt:
                raise UserError(f"{self._root} has only damaged checkpoints {corrupt}; {BEGIN_AGAIN}")
            return None
        state, meta, number = newest
        for damaged, reason in bad.items():
            path = self._root / str(damaged)
            logging.error("CHECKPOINT DAMAGED: %s: %s. Falling back to step %d.", path, reason, number)
            self._set_aside(damaged, "corrupt")
        for newer in [other for other in steps_in(self._root) if other > number]:
            logging.warning("Going back to step %d: step %d is set aside.", number, newer)
            self._set_aside(newer, "abandoned")
        hosts.greatest(0)  # a barrier: no process saves before the renames are done
        self._verified = {other for other in self._verified if other < number} | {number}
        return state, meta

    def abandon_all(self) -> None:
        """Renames every step to `<step>.abandoned`, so that training begins anew."""
        self._collect_read_back()
        self._settle()
        self._drop_manager()
        for step in self.steps:
            logging.warning("Going back to step 0: step %d is set aside.", step)
            self._set_aside(step, "abandoned")
        hosts.greatest(0)  # a barrier, as in `restore`

    def restore_subtree(self, abstract: Any, step: int | None = None) -> tuple[Any, dict, int]:
        """Calls the function `restore_subtree` with this directory."""
        return restore_subtree(self._root, abstract, step)

    def wait(self) -> None:
        """Blocks until the save in flight is committed. Raises: SaveError if the last save failed, now or earlier."""
        self._settle()
        if self._last_save_failed:
            newest = self.latest_step
            raise SaveError(f"the last checkpoint was not written to {self._root} (see the log); the newest is {newest}")

    def close(self) -> None:
        """Commits and verifies the save in flight, applies retention and ends the threads. Raises: SaveError as `wait`."""
        try:
            self._collect_read_back()
            self._settle()
            self._collect_read_back()
            if self._verified:  # a process that was killed before it did may have left more
                self._prune()
            self.wait()
        finally:
            self._drop_manager()
            if self._failures:
                self._remove_leftovers()  # of writers that were still at work when the first of them failed
            self._background.shutdown()

    def _open(self):
        if self._manager is None:
            self._remove_leftovers()
            # Orbax's writers wait 300 s for a folder that cannot be created, and the process at its end for the writers. So one
            # process creates it before they start. Of several, the others would wait for the one that fails.
            asynchronous = ocp.AsyncOptions(create_directories_asynchronously=jax.process_count() > 1)
            options = ocp.CheckpointManagerOptions(async_options=asynchronous)  # deletes nothing by itself
            self._manager = ocp.CheckpointManager(self._root, options=options)
        return self._manager

    def _drop_manager(self):
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception:
                logging.exception("While closing the checkpoint manager of %s:", self._root)

    def _agreed_latest_step(self):
        return _from_first_process(max(steps_in(self._root), default=-1))

    def _settle(self):
        """Waits for the commit in flight, then starts its read-back or counts the failure, equally on all processes."""
        if self._pending is None:
            return
        (step, treedef, names, stored), self._pending = self._pending, None
        path = self._root / str(step)
        error: Exception | None = None
        try:
            self._manager.wait_until_finished()
            if not path.exists():
                error = SaveError(f"{path} is missing although its commit was reported")
        except Exception as failure:
            error = failure
        if hosts.greatest(int(error is not None)):
            self._save_failed(step, error or SaveError("another process failed to write its part"))
            return
        self._last_save_failed = False
        self.on_commit()
        self._read_back = (step, self._background.submit(step_folder.read_back, path, treedef, names, stored))

    def _save_failed(self, step, error):
        self._failures += 1
        self._last_save_failed = self._agreed_latest_step() < step
        brief = f"{type(error).__name__}: {error}"
        logging.error("CHECKPOINT NOT SAVED: step %d, failure %d in a row: %s", step, self._failures, brief)
        self._drop_manager()  # the failure may have left it in any state
        self._remove_leftovers()  # a partly written step would keep a full disk full
        if self._failures >= _MAX_FAILURES:
            raise SaveError(f"{self._failures} checkpoints in a row could not be saved in {self._root}: {brief}") from error

    def _collect_read_back(self):
        """Waits for the read-back in progress; after a valid step, older ones are deleted; a damaged step is set aside."""
        if self._read_back is None:
            return
        (step, future), self._read_back = self._read_back, None
        try:
            reason = future.result()
        except Exception as error:  # a fault of the machine, not of the step
            reason = None
            logging.warning("Step %d could not be read back and stays unverified: %s", step, error)
        verdict = hosts.greatest(_UNVERIFIED if reason is None else _DAMAGED if reason else 0)
        if verdict == _DAMAGED:
            self._settle()  # a commit may be in flight, and the manager is dropped next
            self._set_aside(step, "corrupt")
            reason = reason or "another process found it damaged"
            self._save_failed(step, SaveError(f"the checkpoint read back differs from the saved state: {reason}"))
        elif verdict != _UNVERIFIED:
            self._failures = 0
            self._verified.add(step)
            self._prune()

    def _prune(self):
        for step in steps_in(self._root)[: -self._keep_last]:
            forever = self._keep_every_steps is not None and step % self._keep_every_steps == 0
            kept = forever or step == self.best_step
            if not kept and step < max(self._verified) and jax.process_index() == 0:
                # Rename first: a process killed during removal must not leave a partial step under a step's name.
                removed = self._root / f"{step}.removed"
                (self._root / str(step)).rename(removed)
                self._background.submit(_remove, removed)

    def _set_aside(self, step, label):
        if jax.process_index() == 0 and (self._root / str(step)).exists():
            target, attempt = self._root / f"{step}.{label}", 1
            while target.exists():
                attempt += 1
                target = self._root / f"{step}.{label}{attempt}"
            (self._root / str(step)).rename(target)

    def _remove_leftovers(self):
        if jax.process_index() != 0 or not self._root.exists():
            return
        for path in self._root.iterdir():
            if _LEFTOVER.match(path.name):
                logging.info("Removing %s, left by an unfinished save or removal.", path)
                self._background.submit(_remove, path).result()  # on the only thread that removes


def _remove(path):
    try:
        path.rmtree()
    except FileNotFoundError:
        pass  # removed by an earlier call
    except OSError as error:
        logging.warning("Cannot remove %s: %s", path, error)


def _from_first_process(number):
    """The int of process 0; all processes must call this together."""
    if jax.process_count() == 1:
        return int(number)
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _absolute(directory):
    text = os.fspath(directory)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def _newest_valid(root, abstract, only_step, partial, remedy="use another step or folder"):
    """Restores the newest valid step: ((tree, meta, step) or None if there are no steps, {bad step: reason}).

    Process 0 chooses the steps to try.
    """
    steps = steps_in(root)
    if only_step is not None and not _from_first_process(only_step in steps):
        raise FileNotFoundError(f"no checkpoint of step {only_step} in {root}; there are {steps}")
    bad = {}
    while True:
        candidates = [step for step in steps if only_step in (None, step) and step not in bad]
        step = _from_first_process(max(candidates, default=-1))
        if step == -1:
            break
        path = root / str(step)
        # If one process alone fails in orbax's restore, the others hang in its barrier. So check the files first.
        reason = step_folder.damage(path, abstract, partial) if jax.process_count() > 1 else ""
        if not hosts.greatest(int(bool(reason))):
            try:
                tree, meta = step_folder.read_step(path, abstract, partial)
                return (tree, meta, step), bad
            except BadStep as error:
                reason = str(error)
        bad[step] = reason or "another process found it damaged"
    if bad:
        damage = "; ".join(f"step {step}: {reason}" for step, reason in bad.items())
        raise UserError(f"no valid checkpoint in {root} (nothing was changed there): {damage}; {remedy}")
    return None, bad
