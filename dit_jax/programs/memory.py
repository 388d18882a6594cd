"""Memory of a device: sharded arrays, counted from their shapes, and the compiler's memory analysis of a program."""

import re
from typing import Any

import jax
import numpy as np

GIB = 2**30
HOST_KINDS = ("pinned_host", "unpinned_host")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)"
OUT_OF_MEMORY = re.compile(rf"required for ([\w ]+?) \({SIZE}B?\) exceeds available HBM \({SIZE}B?\)")


def bytes_per_device(tree: Any, in_host: bool = False) -> int:
    """Bytes of one device's shards of a pytree of arrays or ShapeDtypeStructs with shardings.

    in_host: count arrays in host memory instead of those in device memory.
    """
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if (x.sharding.memory_kind in HOST_KINDS) == in_host
    )


def of_program(compiled: Any, in_host: int = 0) -> dict[str, int]:
    """Memory of a compiled program on one device in bytes, as the compiler assigned it.

    total = arguments + outputs - aliased (outputs that reuse arguments) + temporaries + code. "host" is not part of it: it is
    host memory that the program holds for this device.

    in_host: bytes of donated arguments in host memory. XLA's CPU compiler counts them as device memory; they are subtracted.
    """
    stats = compiled.memory_analysis()
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes
    )
    mixed = 0 if host else in_host
    sizes = {
        "arguments": stats.argument_size_in_bytes - mixed,
        "outputs": stats.output_size_in_bytes - mixed,
        "aliased": stats.alias_size_in_bytes - mixed,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "host": host or in_host,
    }
    sizes["total"] = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"] + sizes["code"]
    return sizes


def asked_for(message: str) -> tuple[str, int, int] | None:
    """(purpose, required bytes, available bytes) from the TPU compiler's out-of-memory message; None for other messages."""
    match = OUT_OF_MEMORY.search(message)
    if match is None:
        return None
    what, wanted, unit, there, other = match.groups()
    return what, int(float(wanted) * UNITS[unit]), int(float(there) * UNITS[other])
