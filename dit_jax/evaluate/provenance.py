"""Records how a result was computed: versions, the commit of the code, and the device."""

import subprocess
from pathlib import Path

import jax
import jaxlib
import numpy as np

import dit_jax


def provenance() -> dict:
    """{"versions", "commit", "device", "num_devices"} of this process; commit is None if the code is not a git checkout."""
    return {
        "versions": {
            "dit_jax": dit_jax.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
        },
        "commit": commit(),
        "device": jax.local_devices()[0].device_kind,
        "num_devices": jax.device_count(),
    }


def commit() -> str | None:
    """Commit of the checkout that contains this package, with "+changes" if tracked files of the package were modified."""
    folder = Path(dit_jax.__file__).parent

    def git(*args) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10)

    try:
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:  # an enclosing repository is not the package's
            return None
        head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
