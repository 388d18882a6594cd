"""What fills a device: sharded arrays counted from their shapes, and what the compiler says about the rest."""

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

    in_host: count what lives in host memory, instead of what lives on the device.
    """
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if (x.sharding.memory_kind in HOST_KINDS) == in_host
    )


def of_program(compiled, in_host: int = 0) -> dict[str, int]:
    """Bytes of one device, as the compiler assigned them.

    total = arguments + outputs - aliased (outputs written over arguments) + temporaries + code. "host" is beside it: what the
    program holds in the host's memory for this device.

    in_host: bytes of the arguments that live in host memory and are written over; XLA's CPU compiler counts them as the device's,
        and they are taken out again here.
    """
    stats = compiled.memory_analysis()
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes
    )
    mixed = 0 if host else in_host
    found = {
        "arguments": stats.argument_size_in_bytes - mixed,
        "outputs": stats.output_size_in_bytes - mixed,
        "aliased": stats.alias_size_in_bytes - mixed,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "host": host or in_host,
    }
    found["total"] = found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"] + found["code"]
    return found


def asked_for(message: str) -> tuple[str, int, int] | None:
    """(what for, bytes wanted, bytes there are) of the TPU compiler's refusal; None if the message is about something else."""
    match = OUT_OF_MEMORY.search(message)
    if match is None:
        return None
    what, wanted, unit, there, other = match.groups()
    return what, int(float(wanted) * UNITS[unit]), int(float(there) * UNITS[other])
