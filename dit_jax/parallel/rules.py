"""Which axis of the mesh each parameter is split over: a table from path to PartitionSpec, right-aligned.

The same table serves parameters, their moving average and both Adam moments, because their paths end alike. A path that
matches no rule is an error, so a new layer cannot end up replicated unnoticed.
"""

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = tuple[tuple[str, tuple[str | None, ...]], ...]

TOO_MUCH = 0.1  # of the bytes of a device, to be left whole without a word
SCALARS = re.compile(r"(step|count|notfinite_count|last_finite|total_notfinite)$")


def path_name(path) -> str:
    """A pytree path -> "params/blocks/attention/qkv/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def rule_of(name: str, shape: tuple[int, ...], rules: Rules) -> tuple[str | None, ...]:
    """The axes that the table gives the trailing dimensions of an array; () for a scalar.

    Raises:
        ValueError: no rule, or more than one, matches the path.
    """
    if not shape and SCALARS.search(name):
        return ()
    found = [spec for pattern, spec in rules if re.search(rf"(^|/){pattern}$", name)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} sharding rules match {name} {shape}, and exactly one must: mend the table in dit_jax/parallel/rules.py"
        )
    return found[0]


def spec_of(name: str, shape: tuple[int, ...], mesh_shape, rules: Rules) -> PartitionSpec:
    """The PartitionSpec of one array.

    An axis of the mesh that does not divide its dimension is left out (6 heads over 4 devices stay whole). For fsdp, which only
    stores, the longest other dimension that it divides is then split (width 1152 over 256 devices: 4608), and where there is none
    the depth of a stack of blocks, which costs most: the whole stack is gathered before its first block.

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


def shardings(tree, mesh: Mesh, rules: Rules):
    """A NamedSharding for each leaf of a pytree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path_name(path), x.shape, mesh.shape, rules)), tree
    )


def whole_over_fsdp(tree):
    """The same NamedShardings without their fsdp axis."""
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(*(None if a == "fsdp" else a for a in s.spec))), tree)


def left_whole(tree, mesh_shape, axis: str, rules: Rules) -> tuple[float, float, str]:
    """(bytes that a device holds, those of them that the table would split over the axis and that its size does not divide, the
    largest array among these).

    tree: pytree of arrays or ShapeDtypeStructs.
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


def warnings(tree, mesh: Mesh, rules: Rules) -> list[str]:
    """A sentence for each axis that leaves more than a tenth of what a device holds whole, with the sizes that would split it."""
    found = []
    for axis in ("fsdp", "tensor"):
        held, whole, name = left_whole(tree, mesh.shape, axis, rules)
        if mesh.shape[axis] == 1 or whole <= TOO_MUCH * held:
            continue
        devices, better = mesh.shape["data"] * mesh.shape[axis], []
        for size in range(2, devices + 1):
            if devices % size == 0:
                other = left_whole(tree, {**mesh.shape, axis: size, "data": devices // size}, axis, rules)
                better += [str(size)] if other[1] <= TOO_MUCH * other[0] else []
        remedy = f"mesh.{axis} of {', '.join(better)} splits them" if better else f"no mesh.{axis} of these devices splits them"
        found.append(
            f"mesh.{axis}={mesh.shape[axis]} does not divide the arrays, the largest {name}: {whole / 2**20:.0f} of "
            f"{held / 2**20:.0f} MiB of state on each device are not split over {axis}; {remedy}, the rest as mesh.data"
        )
    return found
