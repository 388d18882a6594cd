"""Every test runs with 8 simulated devices; what is not put on a mesh uses the first."""

import logging
import os
import signal
import subprocess
import sys
import tempfile

import jax
import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and the processes that they start inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")


def known(flag):
    """Whether XLA has the flag; a process that is given another one ends."""
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    process = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True)
    return process.returncode == 0


# Compiling is most of the time: compile quickly rather than well, and what several tests compile alike only once.
jax.config.update("jax_disable_most_optimizations", True)
if "PYTEST_XDIST_WORKER" not in os.environ:  # those inherit it, as the verbs that tests start do; nothing of the user is touched
    # DIT_JAX_TEST_CACHE=<folder> keeps compiled programs from one run of the tests to the next.
    _CACHE = os.environ.get("DIT_JAX_TEST_CACHE") or tempfile.TemporaryDirectory(prefix="jax_cache_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE if isinstance(_CACHE, str) else _CACHE.name
    # Loops that XLA writes itself, in place of those that go through MLIR, which take up to half of the time to compile.
    _FLAG = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = _FLAG if known(_FLAG) else ""
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"], os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = (
        "0.1",
        "-1",
    )
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def _warnings():
    """Warnings reach `caplog`, whatever level an earlier test or a verb has set."""
    logging.getLogger("absl").setLevel(logging.WARNING)
