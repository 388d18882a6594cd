"""Describes the machine of a measurement: devices, their peak, memory, versions, load."""

import os
import platform

import jax

from dit_jax.programs import chips
from dit_jax.runtime.versions import versions

MFU_FORMULA = "images/s x FLOPs per image / (devices x peak bfloat16 FLOP/s)"


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a kind of device; None if `chips` does not know it, as for a CPU."""
    chip = chips.of_kind(device_kind)
    return None if chip is None else chip.peak_flops


def utilization(images_per_second: float, flops_per_image: float, devices: list) -> float | None:
    """MFU: the model's FLOPs as a share of the devices' peak, without recomputation; None without a known peak."""
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else images_per_second * flops_per_image / (len(devices) * peak)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict:
    """Devices, cores, versions, and the load before the measurement (1-minute average, None if unavailable).

    compilation_cache: whether the compilation cache was enabled, so that compile times may be those of a read.
    """
    device = jax.devices()[0]
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds it when it is imported
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "compilation_cache": cache is not None,
        "cpu": cpu_model(),
        "cores": cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions("python", "jax", "jaxlib", "flax", "optax", "numpy"),
    }


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_bytes() -> int | None:
    """Peak memory of any device of this process since its start; None if the device does not report it (CPU)."""
    peaks = [stats["peak_bytes_in_use"] for d in jax.local_devices() if "peak_bytes_in_use" in (stats := d.memory_stats() or {})]
    return max(peaks, default=None)


def program_bytes(compiled) -> dict | None:
    """Bytes per device that a compiled program needs according to XLA; None if the backend does not report them.

    "peak" is the sum of arguments, outputs that do not reuse a donated argument, and temporaries.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    parts = {
        "arguments": plan.argument_size_in_bytes,
        "outputs": plan.output_size_in_bytes,
        "donated": plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
    }
    return {**parts, "peak": parts["arguments"] + parts["outputs"] - parts["donated"] + parts["temporaries"]}
