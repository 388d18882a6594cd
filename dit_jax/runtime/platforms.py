"""Selects JAX's platforms before JAX does: one line where a requested one is missing, and no TPU library without a TPU."""

import glob
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
from pathlib import Path

import jax

from dit_jax.errors import UserError

GOOGLE = "0x1ae0"  # PCI vendor
CUDA_PLUGIN = "xla_cuda"  # start of the names of JAX's plugins for CUDA 12, 13, ...
FAILED = "Unable to initialize backend"  # start of JAX's error


def requested() -> list[str]:
    """The platforms of JAX_PLATFORMS or jax_platforms; empty if JAX chooses."""
    names = jax.config.jax_platforms  # type: ignore[attr-defined]  # JAX adds it when it is imported
    return [name for name in (names or "").split(",") if name]


def check() -> None:
    """Raises a UserError if a requested platform is not installed or this machine has no such device."""
    for name in requested():
        remedy = f"or unset JAX_PLATFORMS, which is {','.join(requested())}"
        if name in ("cuda", "gpu") and not (plugins := _plugins()):
            raise UserError(f'this JAX does not support GPUs; pip install -U "jax[cuda13]", {remedy}')
        if name == "cuda" and not any(plugin.startswith(CUDA_PLUGIN) for plugin in plugins):
            raise UserError(f'this JAX does not support CUDA; pip install -U "jax[cuda13]", {remedy}')
        if name == "cuda" and not _has_nvidia():
            raise UserError(
                f"this machine has no NVIDIA GPU (/dev/nvidia0): install its driver, give the container GPUs, {remedy}"
            )
        if name == "tpu" and not importlib.util.find_spec("libtpu") and "TPU_LIBRARY_PATH" not in os.environ:
            raise UserError(f'this JAX does not support TPUs; pip install -U "jax[tpu]", {remedy}')
        if name == "tpu" and not (_has_tpu() or "JAX_FORCE_TPU_INIT" in os.environ):
            raise UserError(f"this machine has no TPU; start a TPU VM, {remedy}")


def unused_gpu() -> str | None:
    """A line for a machine with an NVIDIA GPU and a JAX that cannot use it; None where it can, or if platforms are requested."""
    if requested() or not _has_nvidia() or any(plugin.startswith(CUDA_PLUGIN) for plugin in _plugins()):
        return None
    return (
        "note: this machine has an NVIDIA GPU, and this JAX does not support CUDA, so the CPU is used; "
        'pip install -U "jax[cuda13]", or set JAX_PLATFORMS=cpu'
    )


def explain(error: Exception) -> str | None:
    """JAX's error that a platform does not start as one line with a remedy; None for another error."""
    text = " ".join(str(error).split())
    if not text.startswith(FAILED):
        return None
    return f"{re.sub(r' [(]([^()]*JAX_PLATFORMS=[^()]*)[)]$', '', text).rstrip('.')}; set JAX_PLATFORMS=cpu to go without it"


def leave_out_tpu() -> None:
    """Keeps JAX from starting libtpu on a machine without a TPU, where it would print ten lines of warnings.

    libtpu is also installed for its compiler, which `plan` uses. Does nothing if platforms are requested, or if there is a plugin
    for devices other than NVIDIA's, since only JAX then knows the platforms.
    """
    if requested() or "JAX_FORCE_TPU_INIT" in os.environ or _has_tpu():
        return
    plugins = _plugins()
    if all(plugin.startswith(CUDA_PLUGIN) for plugin in plugins):
        jax.config.update("jax_platforms", "cuda,cpu" if plugins and _has_nvidia() else "cpu")


def _plugins() -> list[str]:
    """Names of JAX's plugins for accelerators; libtpu is not one of them."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    modules = [module.name for module in pkgutil.iter_modules(folders)]
    return [*modules, *(entry.name for entry in importlib.metadata.entry_points(group="jax_plugins"))]


def _has_nvidia() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))  # as JAX looks for them


def _has_tpu() -> bool:
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    return any(Path(file).read_text().strip() == GOOGLE for file in glob.glob("/sys/bus/pci/devices/*/vendor"))
