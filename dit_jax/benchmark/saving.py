"""Measures saving and restoring the training state, as in the training loop."""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from dit_jax.benchmark.subject import Subject
from dit_jax.errors import UserError
from dit_jax.runtime.console import say
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.tasks.state import abstract_state

REPEATS = 3


def run(subject: Subject, folder: str | None) -> dict:
    """Saves and restores REPEATS times; seconds are medians.

      blocking_seconds   until training can continue, including opening the manager
      durable_seconds    from the same start until the step is committed
      verified_seconds   from the same start until it was read back and compared
      restore_seconds    a verified restore; from the page cache if the disk is local

    Args:
        folder: folder on the disk to measure, in which a temporary folder is created; None for the system's default.

    Raises:
        UserError: the folder does not exist.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--data={folder} is not a folder: give a folder on the disk to measure")
    abstract = abstract_state(subject.task, subject.mesh)
    state = jax.block_until_ready(trained_state(abstract, subject.seed))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    say(f"a state of {size / 1e6:,.1f} MB")
    rows = []
    with tempfile.TemporaryDirectory(prefix="dit_jax_checkpoint_", dir=folder) as root:
        for step in range(1, REPEATS + 1):
            rows.append(_save_and_restore(root, step, state, abstract))
            say("  ".join(f"{name} {seconds:.2f}" for name, seconds in rows[-1].items()))
        written = sum(p.stat().st_size for p in (Path(root) / str(REPEATS)).rglob("*") if p.is_file())
    medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    return {
        **medians,
        "repeats": REPEATS,
        "state_bytes": size,
        "written_bytes": written,
        "save_megabytes_per_second": size / 1e6 / medians["durable_seconds"],
        "restore_megabytes_per_second": size / 1e6 / medians["restore_seconds"],
    }


def trained_state(abstract, seed: int):
    """A state of normal random numbers. A new state is half zeros, which compression would remove."""

    def make(key):
        # One draw for all leaves: each is compressed separately, and one draw per leaf would take long to compile.
        numbers = jax.random.normal(key, (max(x.size for x in jax.tree.leaves(abstract)),))
        return jax.tree.map(lambda x: numbers[: x.size].reshape(x.shape).astype(x.dtype), abstract)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(jax.random.key(seed))


def _save_and_restore(root: str, step: int, state, abstract) -> dict[str, float]:
    start = time.perf_counter()
    with Checkpointer(root, every_steps=1, keep_last=1) as checkpointer:
        checkpointer.save(step, state, {})
        blocking = time.perf_counter() - start
        checkpointer.wait()
        durable = time.perf_counter() - start
    verified = time.perf_counter() - start
    start = time.perf_counter()
    with Checkpointer(root, every_steps=1) as checkpointer:
        jax.block_until_ready(checkpointer.restore(abstract)[0])
    return {
        "blocking_seconds": blocking,
        "durable_seconds": durable,
        "verified_seconds": verified,
        "restore_seconds": time.perf_counter() - start,
    }
