"""Sharding rules: tables from parameter paths to right-aligned PartitionSpecs.

The same table applies to parameters, their moving average and both Adam moments, because their paths have the same ending. A
path that matches no rule is an error, so that a new layer is not replicated unnoticed.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = tuple[tuple[str, tuple[str | None, ...]], ...]

TOO_MUCH = 0.1  # share of a device's bytes that may stay unsplit without a warning
FACTORED = re.compile(r"(^|/)v_(row|col)/")  # Adafactor's sums over rows and columns, of one dimension less than the parameter
SCALARS = re.compile(r"(step|count|notfinite_count|last_finite|total_notfinite)$")


def path_name(path: Iterable) -> str:
    """Joins a pytree path with "/": "params/blocks/attention/qkv/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def rule_of(name: str, shape: tuple[int, ...], rules: Rules) -> tuple[str | None, ...]:
    """The mesh axes of an array's trailing dimensions, from the table; () for a scalar.

    Raises:
        ValueError: no rule or several rules match the path.
    """
    if not shape and SCALARS.search(name):
        return ()
    found = [(pattern, spec) for pattern, spec in rules if re.search(rf"(^|/){pattern}$", name)]
    if len(found) > 1:  # a layer of a conditioner may be called as one of the network
        found = [(pattern, spec) for pattern, spec in found if pattern.startswith("conditioner/")]
    specs = [spec for _, spec in found]
    if len(specs) != 1:
        raise ValueError(
            f"{len(specs)} sharding rules match {name} {shape}, but exactly one must: fix the table in dit_jax/parallel/rules.py"
        )
    # (1,) is also what Adafactor keeps in place of the second moments, or the sums, that it does not use.
    return () if FACTORED.search(name) or shape == (1,) else specs[0]


def spec_of(name: str, shape: tuple[int, ...], mesh_shape: Mapping[Any, int], rules: Rules) -> PartitionSpec:
    """The PartitionSpec of one array.

    A mesh axis that does not divide its dimension is dropped (6 heads are not split over 4 devices). The fsdp axis, which only
    saves memory, then splits the longest other dimension that it divides (width 1152 over 256 devices: 4608). If there is none,
    it splits the depth of a stack of blocks, which costs most: the stack is gathered before its first block.

    Raises:
        ValueError: as `rule_of`.
    """
    rule = rule_of(name, shape, rules)
    stacked = len(shape) - len(rule)
    wanted = (None,) * stacked + rule
    axes = [axis if axis and size % mesh_shape[axis] == 0 else None for axis, size in zip(wanted, shape, strict=True)]
    if "fsdp" in wanted and "fsdp" not in axes:
        free = [
            i for i, size in enumerate(shape) if (axes[i] is None or mesh_shape[axes[i]] == 1) and size % mesh_shape["fsdp"] == 0
        ]
        if free:
            axes[max(free, key=lambda i: (i >= stacked, shape[i]))] = "fsdp"
    return PartitionSpec(*axes)


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """NamedShardings for a pytree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path_name(path), x.shape, mesh.shape, rules)), tree
    )


def whole_over_fsdp(tree: Any) -> Any:
    """The same NamedShardings without their fsdp axis."""
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(*(None if a == "fsdp" else a for a in s.spec))), tree)


def unsplit_bytes(tree: Any, mesh_shape: Mapping[Any, int], axis: str, rules: Rules) -> tuple[float, float, str]:
    """Finds arrays that the table would split over `axis`, but whose dimensions its size does not divide.

    tree: pytree of arrays or ShapeDtypeStructs.

    Returns:
        (bytes that a device holds, bytes of these arrays on a device, the path of the largest of them).
    """
    held, whole = 0.0, {"": 0.0}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        spec = spec_of(name, x.shape, mesh_shape, rules)
        size = x.size * x.dtype.itemsize / math.prod(mesh_shape[a] for a in spec if a)
        held += size
        if axis in rule_of(name, x.shape, rules) and axis not in spec:
            whole[name] = size
    return held, sum(whole.values()), max(whole, key=lambda name: whole[name])


def warnings(tree: Any, mesh: Mesh, rules: Rules) -> list[str]:
    """Warnings about axes that leave more than a tenth of a device's bytes unsplit, with the sizes that would split them."""
    messages = []
    for axis in ("fsdp", "tensor"):
        held, whole, name = unsplit_bytes(tree, mesh.shape, axis, rules)
        if mesh.shape[axis] == 1 or whole <= TOO_MUCH * held:
            continue
        devices, better = mesh.shape["data"] * mesh.shape[axis], []
        for size in range(2, devices + 1):
            if devices % size == 0:
                other = unsplit_bytes(tree, {**mesh.shape, axis: size, "data": devices // size}, axis, rules)
                better += [str(size)] if other[1] <= TOO_MUCH * other[0] else []
        remedy = f"mesh.{axis} = {', '.join(better)} splits them" if better else f"no mesh.{axis} for these devices splits them"
        messages.append(
            f"mesh.{axis}={mesh.shape[axis]} does not divide the dimensions of some arrays, the largest {name}: "
            f"{whole / 2**20:.0f} of {held / 2**20:.0f} MiB of state on each device are not split over {axis}; {remedy}, "
            "with mesh.data for the remaining devices"
        )
    return messages
