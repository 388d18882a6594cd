"""What fills a device: sharded arrays counted from their shapes, and what the compiler says about the rest."""

import re
from typing import Any

import jax
import numpy as np

GIB = 2**30
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)"
OUT_OF_MEMORY = re.compile(rf"required for ([\w ]+?) \({SIZE}B?\) exceeds available HBM \({SIZE}B?\)")


def bytes_per_device(tree: Any) -> int:
    """Bytes of one device's shards of a pytree of arrays or ShapeDtypeStructs with shardings."""
    def shard(x) -> int:
        return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize

    return sum(map(shard, jax.tree.leaves(tree)))


def of_program(compiled) -> dict[str, int]:
    """Bytes of one device, as the compiler assigned them.

    total = arguments + outputs - aliased (outputs written over arguments) + temporaries + code.
    """
    stats = compiled.memory_analysis()
    found = {"arguments": stats.argument_size_in_bytes, "outputs": stats.output_size_in_bytes,
             "aliased": stats.alias_size_in_bytes, "temporaries": stats.temp_size_in_bytes,
             "code": stats.generated_code_size_in_bytes}
    found["total"] = found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"] + found["code"]
    return found


def asked_for(message: str) -> tuple[str, int, int] | None:
    """(what for, bytes wanted, bytes there are) of the TPU compiler's refusal; None if the message is about something else."""
    match = OUT_OF_MEMORY.search(message)
    if match is None:
        return None
    what, wanted, unit, there, other = match.groups()
    return what, int(float(wanted) * UNITS[unit]), int(float(there) * UNITS[other])
