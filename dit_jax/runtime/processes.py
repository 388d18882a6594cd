"""Flags that connect the processes of a run if the cluster is not detected."""

from absl import flags

from dit_jax.runtime import command_line

flags.disclaim_key_flags()  # --help lists them as the verb's own

FLAGS = ("coordinator_address", "num_processes", "process_id")


def define_flags() -> None:
    """Defines --coordinator_address, --num_processes and --process_id, for a verb that calls `join`."""
    command_line.group("Several processes, where the cluster is not detected")
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator_address.")
    flags.DEFINE_integer("process_id", None, "This process, from 0, with --coordinator_address.")


def join() -> None:
    """Joins the other processes, if there are any; call before anything else uses JAX. Raises as `hosts.initialize`."""
    from dit_jax.parallel import hosts

    values = flags.FLAGS
    hosts.initialize(values.coordinator_address, values.num_processes, values.process_id)
