"""The devices to compile for: an absent TPU slice or GPUs, simulated devices, or the devices of this machine.

v5p:4x4x4    a TPU slice by its sides; libtpu compiles for it on any Linux machine
h200:8       GPUs, eight per host; JAX's CUDA plugin compiles for them without a GPU
cpu:8        simulated devices on this host
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from dit_jax.errors import UserError
from dit_jax.programs import chips

SIDES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
GPUS = ("h100", "h200")
GPUS_PER_HOST = 8
REMEDY = "pip install 'dit_jax[plan]' (Linux only; no TPU is needed), or omit --topology to plan for the devices of this machine"
KNOWN = (
    f"{', '.join(f'{name}:' + 'x'.join('4' * sides) for name, sides in SIDES.items())}, h100:8, h200:8, cpu:8, each also "
    "with other sizes"
)
# Without these, libtpu asks a metadata server which TPU this machine has, and only one process at a time can load it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# XLA's description of the device to compile for. H100 and H200 differ only in their memory.
GPU_TARGET = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
device_memory_size: {memory} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 minor: 0 }}
registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: 9 minor: 20 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
"""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for and the figures of their chip.

    Fields:
        sides: chips along each dimension of a TPU slice; empty for others.
    """

    name: str
    devices: tuple[Any, ...]
    chip: chips.Chip
    sides: tuple[int, ...] = ()


def find(name: str | None) -> Topology:
    """The topology of a name as in the module's docstring; None means the devices of this machine.

    Call this before anything else uses JAX's devices: simulated devices and XLA's flags cannot be set later.

    Raises:
        UserError: the topology is unknown or impossible, or its compiler is not installed.
    """
    if name is None:
        devices = tuple(jax.devices())
        chip = chips.of_device(devices[0]) or _simulated(len(devices))
        return Topology(f"{len(devices)} x {devices[0].device_kind}", devices, chip)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    sides = tuple(int(side) for side in match[2].split("x")) if match else ()
    if not match or match[1] not in (*SIDES, *GPUS, "cpu") or not all(sides):
        raise UserError(f"unknown topology {name!r}; known are {KNOWN}")
    kind = match[1]
    wanted = SIDES.get(kind, 1)
    if len(sides) != wanted:
        raise UserError(
            f"topology {name!r} has {len(sides)} sides, but {kind} has {wanted}, as in "
            f"{kind}:{'x'.join('4' * wanted) if kind in SIDES else '8'}"
        )
    if kind == "cpu":
        return _cpu(name, sides[0])
    # The local devices are not initialised: a plan on a TPU machine must not occupy its chips.
    jax.config.update("jax_platforms", "cpu")
    if kind in GPUS:
        return Topology(name, _gpus(kind, sides[0]), chips.CHIPS[kind])
    return Topology(name, _tpus(name, kind, sides), chips.CHIPS[kind], sides)


def _simulated(count: int) -> chips.Chip:
    return chips.simulated(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // count)


def _cpu(name: str, count: int) -> Topology:
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the devices are already initialised
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"topology {name!r} needs {count} simulated devices, but this process has {len(devices)}; set their number "
            "before JAX's devices are used"
        )
    return Topology(name, tuple(devices[:count]), _simulated(count))


def _tpus(name: str, kind: str, sides: tuple[int, ...]) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name} needs libtpu, the TPU compiler, which is not installed: {REMEDY}")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if kind in ("v5e", "v6e") and sides in ((1, 1), (2, 4)):
        options["chips_per_host_bounds"] = (*sides, 1)
    try:
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except Exception as error:  # any error of the compiler
        raise UserError(f"libtpu does not know the slice {name!r}: {str(error).splitlines()[0]}") from None
    if len(devices) != math.prod(sides):
        raise UserError(f"libtpu gives {len(devices)} devices for {name!r}, not one for each of its {math.prod(sides)} chips")
    return tuple(devices)


def _gpus(kind: str, count: int) -> tuple[Any, ...]:
    # In this order: find_spec of a plugin raises if its package does not exist.
    if any(importlib.util.find_spec(name) is None for name in ("jax_plugins", "jax_plugins.xla_cuda13")):
        raise UserError(f"--topology={kind}:{count} needs JAX's CUDA plugin (but no GPU): pip install 'dit_jax[cuda]'")
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise UserError(
            f"topology {kind}:{count}: a host has {GPUS_PER_HOST} GPUs, so a larger number must be a multiple of {GPUS_PER_HOST}"
        )
    # Without a GPU there is no autotuning, and without autotuning XLA picks invalid Triton tiles; cuBLAS chooses its own.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    from jax.experimental import topologies

    chip = chips.CHIPS[kind]
    target = GPU_TARGET.format(bandwidth=chip.hbm_bandwidth, memory=chip.hbm_bytes, name=chip.name)
    hosts = -(-count // GPUS_PER_HOST)
    shape = f"1x{hosts}x{count // hosts}"
    return tuple(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target).devices)
