"""The device mesh, and what is placed on it.

Axes are always ("data", "fsdp", "tensor", "sequence"): the batch is split over data and fsdp, parameters over fsdp and tensor,
the tokens of activations over sequence.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None, *, sequence: int = 1) -> Mesh:
    """A mesh over all devices of all hosts; data = -1 takes what the other axes leave.

    Raises:
        UserError: the sizes do not multiply to the number of devices; slices of unequal size.
    """
    devices = jax.devices() if devices is None else devices
    for name, size in (("fsdp", fsdp), ("tensor", tensor), ("sequence", sequence)):
        if size < 1:
            raise UserError(f"mesh.{name} is {size}; it must be at least 1 (only mesh.data can be -1, for the rest)")
    if data == -1:
        data = max(1, len(devices) // (fsdp * tensor * sequence))
    if data < 1:
        raise UserError(f"mesh.data is {data}; it must be at least 1, or -1 for all remaining devices")
    sizes = (data, fsdp, tensor, sequence)
    if np.prod(sizes) != len(devices):
        raise UserError(
            f"the mesh {' x '.join(AXES)} = {' x '.join(map(str, sizes))} = {np.prod(sizes)} needs as many devices, "
            f"and there are {len(devices)} ({devices[0].platform}); set mesh.data = -1 to use them all, and choose "
            "the other axes so that their product divides that number"
        )
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(sizes: tuple[int, ...], devices) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours along the later axes as near to each other as their network allows.

    What `jax.make_mesh` does, and what it refuses: it splits no axis of a torus over two of the mesh (tensor = 2 on a v5p of
    4 x 4 x 4), and takes no devices of several slices, which GPUs of two hosts are to JAX. Slices, between which the network is
    slow, lie along the first axes.

    Raises:
        UserError: slices of unequal size.
    """
    slices = [getattr(device, "slice_index", 0) for device in devices]
    count = len(set(slices))
    if len({slices.count(index) for index in set(slices)}) > 1:
        raise UserError(
            f"the {len(devices)} devices lie in {count} slices (TPU slices, or hosts with GPUs) of unequal size: "
            f"{ {index: slices.count(index) for index in sorted(set(slices))} }; start the run on equal ones"
        )
    outer = []
    for size in sizes:
        outer.append(math.gcd(size, count // math.prod(outer)))
    inner = [size // ways for size, ways in zip(sizes, outer, strict=True)]
    if count == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_per_step(mesh: Mesh) -> int:
    """How many ways a batch is split: its size must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def reader_place(mesh: Mesh) -> tuple[int, int]:
    """(which part of every batch this process reads, in how many parts a batch is read).

    Usually the process's number and their count. Processes that hold the same rows, because tensor or sequence reaches over
    several of them, read the same part.

    Raises:
        UserError: the rows of two processes overlap without being the same.
    """
    rows = np.arange(rows_per_step(mesh)).repeat(mesh.devices.size // rows_per_step(mesh))
    held: dict[int, set[int]] = {}
    for row, device in zip(rows, mesh.devices.flat, strict=True):
        held.setdefault(device.process_index, set()).add(int(row))
    parts = sorted({tuple(sorted(mine)) for mine in held.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != rows_per_step(mesh):
        raise UserError(
            f"on the mesh {dict(mesh.shape)} the rows of a batch do not fall to whole processes, of which there are "
            f"{len(held)}: choose mesh.tensor x mesh.sequence as a divisor or a multiple of the devices of a process"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def shard_batch(mesh: Mesh, batch):
    """A host's rows (numpy arrays) -> one global array per leaf, split over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def split_rows(mesh: Mesh, x):
    """An array that every host holds whole -> a global array split over data and fsdp."""
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def place(tree, shardings):
    """Arrays that every host holds whole -> global arrays; each device is given its own part alone.

    tree: pytree of NumPy arrays; shardings: a pytree alike, or one sharding for all.
    """

    def one(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: one(x, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def constrain_batch(x, tokens: bool = False):
    """Keeps x split over rows only, or over rows and tokens, under `jax.set_mesh`; the identity elsewhere and in a `shard_map`.

    x: [B, ...], or [B, N, ...] with tokens; N need not be a multiple of the sequence axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *(["sequence"] if tokens else [])))
