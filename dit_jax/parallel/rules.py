"""Which axis of the mesh each parameter is split over: a table from path to PartitionSpec, right-aligned.

The same table serves parameters, their moving average and both Adam moments, because their paths end alike. A path that
matches no rule is an error, so a new layer cannot end up replicated unnoticed.
"""

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = tuple[tuple[str, tuple[str | None, ...]], ...]

# The spec covers the trailing dimensions; a stack of blocks adds a leading one, which stays whole.
TRANSFORMER_RULES: Rules = (
    (r"(attention|cross_attention)/qkv/kernel", ("fsdp", None, "tensor", None)),  # [D, 3, H, E]
    (r"(attention|cross_attention)/qkv/bias", (None, "tensor", None)),
    (r"cross_attention/query/kernel", ("fsdp", "tensor", None)),  # [D, H, E]
    (r"cross_attention/query/bias", ("tensor", None)),
    (r"cross_attention/key_value/kernel", ("fsdp", None, "tensor", None)),  # [D, 2, H, E]
    (r"cross_attention/key_value/bias", (None, "tensor", None)),
    (r"(attention|cross_attention)/out/kernel", ("tensor", None, "fsdp")),  # [H, E, D]
    (r"mlp/in/kernel", ("fsdp", "tensor")),  # [D, 4D]
    (r"mlp/in/bias", ("tensor",)),
    (r"mlp/out/kernel", ("tensor", "fsdp")),  # [4D, D]
    # Never over tensor: with gate and MLP both split over (fsdp, tensor), XLA gave wrong numbers on meshes such as (2, 2, 2).
    (r"modulation/linear/kernel", ("fsdp", None, None)),  # [D, 6, D]
    (r"patch_embedding/kernel", (None, "fsdp")),
    (r"time_embedding/(in|out)/kernel", (None, "fsdp")),
    (r"label_embedding/embedding", (None, "fsdp")),
    (r"final/linear/kernel", ("fsdp", None)),
    (r"(out|linear|patch_embedding|time_embedding/in)/bias", ()),
    (r"norm(_\w+)?/(scale|bias)", ()),
)
# Convolutions [k, k, in, out], linears [in, out], and the vectors beside them. Convolutions never over tensor: split over fsdp
# and tensor, XLA gave gradients that were off by half on the mesh (2, 2, 2) (jax 0.10.2, CPU).
AUTOENCODER_RULES: Rules = (
    (r"(conv|quant_conv|post_quant_conv|down_\d+_downsample|up_\d+_upsample|conv_(in|out|shortcut|\d+)|conv\d)/kernel",
     (None, None, "fsdp", None)),
    (r"(query|key|value|out)/kernel", ("fsdp", "tensor")),
    (r"\w+/(bias|scale)", ()),
)
LARGE = 2**16  # numbers; splitting less saves nothing and costs a collective
SCALARS = re.compile(r"(step|count|notfinite_count|last_finite|total_notfinite)$")


def path_name(path) -> str:
    """A pytree path -> "params/blocks/attention/qkv/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def spec_of(name: str, shape: tuple[int, ...], mesh_shape, rules: Rules) -> PartitionSpec:
    """The PartitionSpec of one array.

    An axis of the mesh that does not divide its dimension is left out (6 heads over 4 devices stay whole). For fsdp, which only
    stores, a large array is then split along the longest other dimension that it divides (width 1152 over 256 devices: 4608).

    Raises:
        ValueError: no rule, or more than one, matches the path.
    """
    if not shape and SCALARS.search(name):
        return PartitionSpec()
    found = [spec for pattern, spec in rules if re.search(rf"(^|/){pattern}$", name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sharding rules match {name} {shape}, and exactly one must: mend the table in "
                         "dit_jax/parallel/rules.py")
    stacked = len(shape) - len(found[0])
    wanted = (None,) * stacked + found[0]
    axes = [axis if axis and size % mesh_shape[axis] == 0 else None for axis, size in zip(wanted, shape, strict=True)]
    if "fsdp" in wanted and "fsdp" not in axes and math.prod(shape) >= LARGE:
        free = [i for i in range(stacked, len(shape))
                if (axes[i] is None or mesh_shape[axes[i]] == 1) and shape[i] % mesh_shape["fsdp"] == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def shardings(tree, mesh: Mesh, rules: Rules = TRANSFORMER_RULES):
    """A NamedSharding for each leaf of a pytree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path_name(path), x.shape, mesh.shape, rules)), tree)


def whole_over_fsdp(tree):
    """The same NamedShardings without their fsdp axis."""
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(*(None if a == "fsdp" else a for a in s.spec))), tree)
