"""Weak scaling: the training step on 1, 2, 4 ... devices with the same batch for each of them."""

from collections.abc import Callable

import jax

from dit_jax.benchmark import network
from dit_jax.benchmark.subject import Subject
from dit_jax.errors import UserError
from dit_jax.runtime.console import say

EFFICIENCY = "images/s over images/s of the first row, over how many times as many devices"
SIMULATED = "images/s over images/s of the first row: simulated devices share the cores, so that 1 is a split that costs nothing"


def counts(devices: int, group: int) -> list[int]:
    """How often the axis that grows divides: 1, 2, 4 ... as far as the devices go, each a `group` of devices.

    Raises:
        UserError: there are not two such groups.
    """
    most = devices // group
    if most < 2:
        raise UserError(
            f"--what=scaling needs at least {2 * group} devices, and there are {devices}: on a CPU they are "
            "simulated, as many as JAX_NUM_CPU_DEVICES says; elsewhere use a larger machine, or smaller other axes "
            "of the mesh"
        )
    return [2**i for i in range(most.bit_length())]


def grown(config, axis: str, ways: int):
    """The config with a mesh that divides `axis` so often, and as many times its batch."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.data = max(1, config.mesh.data)  # -1 would take all devices
        config.mesh[axis] = ways
        config.batch_size *= ways
    return config


def group(config, axis: str) -> int:
    """How many devices the axes of the config's mesh but `axis` take together."""
    mesh = grown(config, axis, 1).mesh
    return mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence


def run(subject_of: Callable[[int, list], Subject], group: int, seconds: float) -> dict:
    """Measures one count of devices after another, from the fewest, each with a state and a program of its own.

    On a CPU the devices are simulated and share its cores: what is measured there is how much the split and the collectives
    cost, not how much faster several devices are.

    Args:
        subject_of: (how often the axis that grows divides, as many groups of devices) -> what is trained on them.
        group: devices of the mesh's other axes together.
        seconds: to measure each count for.

    Returns:
        "by_devices": a row for each count, as of --what=train_step, and the last of them again as the result.
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
    found = network.run(subject, work, seconds, queue=True)
    return {"devices": subject.mesh.devices.size, **subject.describe(), **found}
