"""Caches compiled programs on disk, so that the second start of a run does not compile again."""

import hashlib
import platform
import sys
import tempfile
from pathlib import Path

import jax


def use() -> None:
    """Enables JAX's persistent compilation cache; call before anything is compiled.

    The folder is JAX_COMPILATION_CACHE_DIR if set, otherwise ~/.cache/dit_jax/xla/<kind of CPU>: programs for a CPU use its
    instructions, and different machines may share a home folder. Programs that compile in less than a second are not stored
    (JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS). JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. The folder may be
    deleted at any time, and a broken entry is compiled again. If the folder cannot be written, a line on stderr reports it.
    """
    # type: ignore: JAX adds the attributes of its options when it is imported.
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        folder = folder or str(Path("~/.cache/dit_jax/xla").expanduser() / cpu_kind())
    except RuntimeError:  # neither HOME nor an entry in passwd
        return _leave_off("there is no home folder to keep them in; set HOME or JAX_COMPILATION_CACHE_DIR")
    if "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            return _leave_off(
                f"{folder} cannot be written ({error.strerror}); set JAX_COMPILATION_CACHE_DIR to another folder, or "
                "JAX_ENABLE_COMPILATION_CACHE=false"
            )
    jax.config.update("jax_compilation_cache_dir", folder)


def _leave_off(why: str) -> None:
    print(f"compiled programs are not cached: {why}", file=sys.stderr, flush=True)
    jax.config.update("jax_enable_compilation_cache", False)


def cpu_kind() -> str:
    """A short name of the instruction set of this machine's CPU."""
    try:
        with open("/proc/cpuinfo") as file:
            facts = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        facts = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
