"""Several processes as one program."""

import jax
import numpy as np


def initialize(coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None):
    """Joins the other processes of this run, if there are any; call before anything else touches JAX.

    With no argument the cluster is detected (TPU pod, GKE, SLURM, Open MPI); on a single machine nothing happens.
    """
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except ValueError as error:
        if coordinator_address is not None or "coordinator_address" not in str(error):
            raise
        # JAX found no cluster: one process.


def is_first() -> bool:
    """Whether this process writes the logs and records."""
    return jax.process_index() == 0


def to_host(x) -> np.ndarray:
    """A global array, whole, on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
