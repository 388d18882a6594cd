import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os
from dit_jax.runtime.host_memory import reuse_freed_memory
reuse_freed_memory()
c = ctypes.CDLL("libc.so.6")
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
block = c.malloc(3 << 30)
c.free(block)
print(block is not None, int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_stays():
    """A threshold below a step's temporaries: the system would take, and clear, gigabytes at each step of a model like S/2."""
    allocated, size = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True
    ).stdout.split()
    if allocated == "False":
        pytest.skip("the machine does not lend 3 GiB")
    assert int(size) > 3 << 30
