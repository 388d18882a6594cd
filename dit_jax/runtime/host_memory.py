"""Configures the C library's allocator, which accounts for up to a third of a training step on a CPU."""

import ctypes
import glob
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>


def reuse_freed_memory() -> None:
    """Makes glibc keep freed memory for later allocations; call before JAX starts its threads.

    On a CPU, XLA allocates its temporaries in each step. By default glibc returns large blocks to the system, which then has to
    zero every page again: 25 to 35 % of a step. Does nothing if there is an accelerator, or without glibc.
    """
    accelerators = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if accelerators and not os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # -1 means the largest size: a step's temporaries may exceed the 2 GiB that fit in mallopt's int.
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**29)):
        mallopt(parameter, value)
