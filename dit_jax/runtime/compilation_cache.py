"""Compiled programs kept on disk, so that the second start of a run does not compile again."""

import hashlib
import platform
import sys
import tempfile
from pathlib import Path

import jax


def use():
    """Lets JAX keep compiled programs in a folder; call before anything is compiled.

    The folder is JAX_COMPILATION_CACHE_DIR where that is set, else ~/.cache/dit_jax/xla/<kind of CPU>: programs for a CPU use its
    instructions, and a home may be shared by different machines. Programs that compile in less than a second are not kept
    (JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS). JAX_ENABLE_COMPILATION_CACHE=false turns it off. Nothing in the folder is ever
    needed: it may be deleted at any time, a broken entry is compiled again, and where it cannot be written one line says so.
    """
    # type: ignore: JAX adds the attributes of its options when it is imported.
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    folder = folder or str(Path("~/.cache/dit_jax/xla").expanduser() / cpu_kind())
    if "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            print(
                f"compiled programs are not kept: {folder} cannot be written ({error.strerror}); set JAX_COMPILATION_CACHE_DIR "
                "to another folder, or JAX_ENABLE_COMPILATION_CACHE=false",
                file=sys.stderr,
                flush=True,
            )
            jax.config.update("jax_enable_compilation_cache", False)
            return
    jax.config.update("jax_compilation_cache_dir", folder)


def cpu_kind() -> str:
    """A short name of the instructions that this machine's CPU has."""
    try:
        with open("/proc/cpuinfo") as file:
            facts = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        facts = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
