"""How the C library hands memory back, which decides a third of a training step on a CPU."""

import ctypes
import glob
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>


def reuse_freed_memory():
    """Makes glibc keep freed memory for the next allocation; call before JAX starts its threads.

    XLA on a CPU allocates its temporaries anew in each step, and glibc's default returns large blocks to the system, which
    then clears every page again: 25 to 35 % of a step. Does nothing where an accelerator does the work, or without glibc.
    """
    accelerators = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if accelerators and not os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # -1 is the largest size: a step's temporaries may be more than the 2 GiB that fit mallopt's int.
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**29)):
        mallopt(parameter, value)
