"""Flags that connect the processes of a run if the cluster is not detected."""

from absl import flags

COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where the cluster is not detected.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator_address.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0, with --coordinator_address.")


def join():
    """Joins the other processes, if there are any; call before anything else uses JAX. Raises as `hosts.initialize`."""
    from dit_jax.parallel import hosts

    hosts.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
