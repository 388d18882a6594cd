"""The device mesh and the placement of arrays on it.

The axes are always ("data", "fsdp", "tensor", "sequence"). The batch is split over data and fsdp, parameters over fsdp and
tensor, and the tokens of activations over sequence.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, *, sequence: int = 1
) -> Mesh:
    """Makes a mesh over all devices of all hosts; data = -1 uses all devices that the other axes leave.

    Args:
        data: devices over which the batch is split, with a copy of the parameters each; -1 for all that are left.
        fsdp: devices over which the batch and the parameters are split.
        tensor: devices over which heads and the MLP's features are split.
        sequence: devices over which the tokens of an example are split.

    Raises:
        UserError: the product of the sizes is not the number of devices, or slices have unequal sizes.
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
            f"the mesh {' x '.join(AXES)} = {' x '.join(map(str, sizes))} needs {np.prod(sizes)} devices, "
            f"but there are {len(devices)} ({devices[0].platform}); set mesh.data = -1 to use them all, and choose "
            "the other axes so that their product divides that number"
        )
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges devices in the shape of the mesh, so that neighbours along the later axes are close in the network.

    Like `jax.make_mesh`, but without two of its restrictions: that one cannot split an axis of a torus over two axes of the mesh
    (tensor = 2 on a v5p of 4 x 4 x 4), and does not accept devices of several slices (JAX treats GPU hosts as slices). Slices are
    connected by a slow network, so they lie along the first axes.

    Raises:
        UserError: slices have unequal sizes.
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
    """Sharding of a batch: the first axis over data and fsdp, the others unsharded."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_per_step(mesh: Mesh) -> int:
    """Number of shards of a batch; the batch size must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def reader_place(mesh: Mesh) -> tuple[int, int]:
    """(index of the part of each batch that this process reads, number of parts).

    Usually the process index and the process count. Processes that hold the same rows, because the tensor or sequence axis spans
    several of them, read the same part.

    Raises:
        UserError: the rows of two processes overlap but differ.
    """
    rows = np.arange(rows_per_step(mesh)).repeat(mesh.devices.size // rows_per_step(mesh))
    held: dict[int, set[int]] = {}
    for row, device in zip(rows, mesh.devices.flat, strict=True):
        held.setdefault(device.process_index, set()).add(int(row))
    parts = sorted({tuple(sorted(mine)) for mine in held.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != rows_per_step(mesh):
        raise UserError(
            f"on the mesh {dict(mesh.shape)} the rows of a batch cannot be divided among {len(held)} processes: choose "
            "mesh.tensor x mesh.sequence as a divisor or a multiple of the number of devices per process"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Makes global arrays, split over data and fsdp, from this host's rows (a pytree of NumPy arrays)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def split_rows(mesh: Mesh, x: np.ndarray) -> jax.Array:
    """Splits an array that every host holds in full over data and fsdp, as a global array."""
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def place(tree: Any, shardings: Any) -> Any:
    """Makes global arrays from arrays that every host holds in full; each device receives only its shard.

    tree: pytree of NumPy arrays; shardings: a pytree of the same structure, or one sharding for all.
    """

    def one(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: one(x, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def constrain(x: jax.Array, spec: Callable[[Mapping[str, int]], PartitionSpec]) -> jax.Array:
    """Constrains x, and its gradient, to the split that `spec` gives for the axes of the mesh, under `jax.set_mesh`.

    Without a mesh and inside a `shard_map` it is the identity.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh.shape))


def constrain_batch(x: jax.Array, tokens: bool = False) -> jax.Array:
    """Constrains x to be split over rows only, or over rows and tokens, under `jax.set_mesh`.

    Without a mesh and inside a `shard_map` it is the identity.

    x: [B, ...], or [B, N, ...] with `tokens`; N need not be a multiple of the sequence axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *(["sequence"] if tokens else [])))
