"""Every test runs with 8 simulated devices; what is not put on a mesh uses the first."""

import os
import signal
import tempfile

import jax

# A shell that starts the tests in the background has them ignore Ctrl-C, and the processes that they start inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
# Compiling is most of the time: compile quickly rather than well, and what several tests compile alike only once.
jax.config.update("jax_disable_most_optimizations", True)
_CACHE = tempfile.TemporaryDirectory(prefix="jax_cache_")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name  # of the verbs that tests start, in place of the user's own
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
