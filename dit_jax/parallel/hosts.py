"""Joins the processes of a multi-host run and lets them communicate."""

import glob
import os
import re
import sys
from collections import deque
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.errors import UserError

VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")  # options of JAX that the detection of SLURM sets
# A day: at the end each process waits for the others, and the first process may still score for hours. A process that died is
# detected by missing heartbeats, after 100 s.
SHUTDOWN_SECONDS = 86_400


def initialize(coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of this run, if there are any; call before anything else uses JAX.

    Without arguments the cluster is detected (TPU pod, GKE, SLURM, Open MPI); on a single machine nothing happens, nor if an
    engine such as Ray has joined them already. On SLURM and Open MPI, JAX gives each task one GPU. Here a task that is the only
    one on its node, or sees one GPU alone, keeps all that it sees.

    Raises:
        UserError: only some of the three arguments are given; they are inconsistent; or a cluster was detected, but its processes
            cannot be joined.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(
            f"--{' and --'.join(missing)} must be given too: --coordinator_address, --num_processes and --process_id "
            "go together; give none of them if the cluster is detected automatically"
        )
    if coordinator_address is not None and num_processes is not None and process_id is not None:
        if not (num_processes >= 1 and 0 <= process_id < num_processes):
            raise UserError(f"--process_id={process_id} must lie in 0 to num_processes - 1 = {num_processes - 1}")
        if not coordinator_address.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator_address={coordinator_address} must be host:port, for example 10.0.0.1:1234")
    if jax.distributed.is_initialized():
        return
    # JAX's own handler would swallow every SIGTERM, so that only SIGKILL could end a process. `SharedFlag` replaces it.
    jax.config.update("jax_enable_preemption_service", False)
    visible = {name: jax.config.values[name] for name in VISIBLE}  # flags, which are no attributes
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator_address,
            num_processes=num_processes,
            process_id=process_id,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        alone = str(error) == "coordinator_address should be defined." and not missing_steps(os.environ)
        if not alone:
            raise UserError(f"the processes of this run cannot be joined: {error} {missing_steps(os.environ)}".strip()) from error
        return  # JAX detected no cluster: this is the only process.
    if "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        tasks, gpus = tasks_on_node(os.environ), visible_gpus(os.environ)
        if tasks == 1 or gpus == 1:
            for name, value in visible.items():
                jax.config.update(name, value)
        elif tasks and gpus > tasks:
            mine = jax.config.values[VISIBLE[0]]
            print(
                f"note: this process uses GPU {mine}, 1 of {gpus}, and the {tasks} tasks of this node {tasks} of them; start a "
                "task per GPU, or one per node, which uses all",
                file=sys.stderr,
                flush=True,
            )


def tasks_on_node(environment: Mapping[str, str]) -> int:
    """Number of this job's tasks on this node, by the environment of SLURM or Open MPI; 0 if it does not say."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
    if environment.get("SLURM_NTASKS") == "1":
        return 1
    counts: list[int] = []  # of each node, as in "2(x3),1"
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 0


def visible_gpus(environment: Mapping[str, str]) -> int:
    """Number of the NVIDIA GPUs that this process sees, without starting them."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() and name.strip() != "-1"])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def missing_steps(environment: Mapping[str, str]) -> str:
    """Explains why this process is probably one of several although JAX detects no cluster; "" if there is no sign of it."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_NODELIST" not in environment and tasks.isdigit() and int(tasks) > 1:
        return (
            f"SLURM gave this job {tasks} tasks, but this process is not one of them: start it with srun, or with "
            "env -u SLURM_NTASKS to use only this machine."
        )
    return ""


def is_first() -> bool:
    """Whether this is process 0, which writes logs and records."""
    return jax.process_index() == 0


def to_host(x: jax.Array) -> np.ndarray:
    """Gathers a global array on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def wait_for_all(what: str) -> None:
    """A barrier: returns once every process has called it with the same `what`."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def greatest(number: int) -> int:
    """The maximum of a small int over all processes, which call this together; so it is also a barrier."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


class SharedFlag:
    """A flag that any process can raise and that all processes see raised at the same call, without waiting for one another.

    Each call starts a maximum over one number per device, and reads the result of the call `delay` calls earlier. Create it and
    call it on all processes.

    Args:
        delay: number of calls that may be unfinished. If the devices are that far behind the host anyway, a call does not wait.
    """

    def __init__(self, delay: int):
        mesh = Mesh(np.array(jax.devices()), ("device",))
        split = NamedSharding(mesh, PartitionSpec("device"))

        def everywhere(raised: int) -> jax.Array:
            return jax.make_array_from_callback((mesh.size,), split, lambda index: np.array([raised], np.int32))

        self._values = everywhere(0), everywhere(1)
        self._greatest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._delay, self._pending = delay, deque()

    def seen(self, raised: bool) -> bool:
        """Whether any process had raised the flag `delay` calls ago."""
        self._pending.append(self._greatest(self._values[raised]))
        return len(self._pending) > self._delay and bool(self._pending.popleft())
