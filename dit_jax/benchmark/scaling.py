"""Measures weak scaling: the training step on 1, 2, 4 ... devices with the same batch size per device."""

from collections.abc import Callable

import jax

from dit_jax.benchmark import network
from dit_jax.benchmark.subject import Subject
from dit_jax.errors import UserError
from dit_jax.runtime.console import say

EFFICIENCY = "(images/s / images/s of the first row) / (devices / devices of the first row)"
SIMULATED = "images/s / images/s of the first row: simulated devices share the cores, so that 1 means a split without cost"


def counts(devices: int, group: int) -> list[int]:
    """Sizes of the growing axis: 1, 2, 4 ... as far as there are devices, in groups of `group` devices.

    Raises:
        UserError: there are fewer than two groups.
    """
    most = devices // group
    if most < 2:
        raise UserError(
            f"--what=scaling needs at least {2 * group} devices, but there are {devices}: on a CPU, "
            "JAX_NUM_CPU_DEVICES sets the number of simulated ones; otherwise use a larger machine, or smaller other "
            "axes of the mesh"
        )
    return [2**i for i in range(most.bit_length())]


def grown(config, axis: str, ways: int):
    """Returns the config with size `ways` of the mesh axis, and `ways` times its batch size."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.data = max(1, config.mesh.data)  # -1 would take all devices
        config.mesh[axis] = ways
        config.batch_size *= ways
    return config


def group(config, axis: str) -> int:
    """Number of devices of all axes of the config's mesh except `axis`."""
    mesh = grown(config, axis, 1).mesh
    return mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence


def run(subject_of: Callable[[int, list], Subject], group: int, seconds: float) -> dict:
    """Measures increasing numbers of devices, each with its own state and program.

    On a CPU the devices are simulated and share its cores. There, the result is the cost of the split and of collectives, not
    the speed-up of several devices.

    Args:
        subject_of: (size of the growing axis, devices) -> what is trained on them.
        group: number of devices of the mesh's other axes.
        seconds: measurement time for each number of devices.

    Returns:
        "by_devices": a row for each number, as in --what=train_step; the fields of the last row are also the result's.
    """
    devices, rows = jax.devices(), []
    for ways in counts(len(devices), group):
        rows.append(_measured(subject_of(ways, devices[: ways * group]), seconds))
        first, row = rows[0], rows[-1]
        gain = row["images_per_second"] / first["images_per_second"]
        row["efficiency"] = gain if devices[0].platform == "cpu" else gain * first["devices"] / row["devices"]
        say(f"{row['devices']} devices: {row['images_per_second']:,.1f} images/s, efficiency {row['efficiency']:.3f}")
    return {**rows[-1], "efficiency_formula": SIMULATED if devices[0].platform == "cpu" else EFFICIENCY, "by_devices": rows}


def _measured(subject: Subject, seconds: float) -> dict:
    say(f"scaling: {subject.describe()}")
    work = network.train_step(subject)
    result = network.run(subject, work, seconds, queue=True)
    return {"devices": subject.mesh.devices.size, **subject.describe(), **result}
