"""The device mesh, and what is placed on it.

Axes are always ("data", "fsdp", "tensor"): the batch is split over data and fsdp, parameters over fsdp and tensor.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices of all hosts; data = -1 takes what the other two axes leave.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    for name, size in (("fsdp", fsdp), ("tensor", tensor)):
        if size < 1:
            raise UserError(f"mesh.{name} is {size}; it must be at least 1 (only mesh.data can be -1, for the rest)")
    if data == -1:
        data = max(1, len(devices) // (fsdp * tensor))
    if data < 1:
        raise UserError(f"mesh.data is {data}; it must be at least 1, or -1 for all remaining devices")
    if data * fsdp * tensor != len(devices):
        raise UserError(f"the mesh data x fsdp x tensor = {data} x {fsdp} x {tensor} = {data * fsdp * tensor} needs as many "
                        f"devices, and there are {len(devices)} ({devices[0].platform}); set mesh.data = -1 to use them "
                        "all, and choose mesh.fsdp and mesh.tensor so that their product divides that number")
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_per_step(mesh: Mesh) -> int:
    """How many ways a batch is split: its size must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_batch(mesh: Mesh, batch):
    """A host's rows (numpy arrays) -> one global array per leaf, split over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def split_rows(mesh: Mesh, x):
    """An array that every host holds whole -> a global array split over data and fsdp."""
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def constrain_batch(x):
    """Keeps x split over rows only, under `jax.set_mesh`; the identity where no mesh is set.

    x: [B, ...].
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))
