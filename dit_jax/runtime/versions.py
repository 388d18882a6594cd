"""What a result was computed with: versions of packages, the commit of this code, the device.

Files keep what these functions return and are compared with it later. Neither keys nor their order may change.
"""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import dit_jax
from dit_jax.errors import UserError

RANDOM = ("jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64")
PRECISION = "jax_default_matmul_precision"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def version(name: str) -> str:
    """Version of an installed distribution, of "dit_jax" as it was imported, or of "python"; "not installed"."""
    if name == "dit_jax":
        return dit_jax.__version__
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions(*names: str) -> dict[str, str]:
    """{"dit_jax": version, name: version, ...}, see `version`."""
    return {name: version(name) for name in ("dit_jax", *names)}


def device_kind() -> str:
    """Kind of this process's devices: "cpu", "NVIDIA H200", "TPU v5p"."""
    return jax.local_devices()[0].device_kind


def arithmetic() -> dict:
    """{"device", "matmul_precision"}: what, besides versions, decides how this process rounds."""
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # JAX adds it when it is imported
    return {"device": device_kind(), "matmul_precision": precision}


def random_settings() -> dict:
    """{option of JAX: its value} of the options that decide which random numbers a key gives, and in which precision."""
    return {name: getattr(jax.config, name) for name in RANDOM}


def numeric_settings() -> dict:
    """`random_settings`, and the precision of products of matrices: what the numbers of a run depend on, besides its config."""
    return {**random_settings(), PRECISION: getattr(jax.config, PRECISION)}


def check_numeric_settings(stored: Mapping[str, Any], what: str) -> None:
    """Raises a UserError if this process has other `numeric_settings` than those stored.

    stored: earlier ones; a setting that is not among them is not compared.
    what: whose they are, for the message: "the run in runs/digits".
    """
    now = numeric_settings()
    changed = [name for name in now if name in stored and stored[name] != now[name]]
    if changed:
        lines = [f"{name}: {stored[name]!r} -> {now[name]!r} (its environment variable is {name.upper()})" for name in changed]
        raise UserError(
            f"{what} was trained with other settings of JAX, which change its numbers; set them as before, or give a new "
            "--workdir. Different:\n  " + "\n  ".join(lines)
        )


def provenance() -> dict:
    """{"versions", "commit", "device", "num_devices"} of a result; "commit" as `commit` returns it."""
    return {
        "versions": versions("jax", "jaxlib", "numpy"),
        "commit": commit(),
        "device": device_kind(),
        "num_devices": jax.device_count(),
    }


def one_line() -> str:
    """The versions of PACKAGES and the commit, for people."""
    found = versions(*PACKAGES)
    return ", ".join(
        f"{name} {text}" for name, text in {"dit_jax": found.pop("dit_jax"), "commit": commit() or "unknown", **found}.items()
    )


def commit() -> str | None:
    """Commit of the checkout that this package is run from, with "+changes" if tracked files of the package differ from it.

    None if the package is not part of a git checkout, or git is not installed.
    """
    folder = Path(dit_jax.__file__).parent

    def git(*args) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10)

    try:
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:  # not the repository of something around it
            return None
        head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
