"""The devices that a plan is made for: a slice that is not here, simulated ones, or those that are here.

v5p:4x4x4    a TPU slice by its sides: libtpu compiles for it on any Linux machine
h200:8       GPUs, eight to a host: the CUDA plugin of JAX compiles for them without one
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
REMEDY = "pip install 'dit_jax[plan]' (Linux only; no TPU is needed), or leave --topology out to plan for the devices here"
KNOWN = (
    f"{', '.join(f'{name}:' + 'x'.join('4' * sides) for name, sides in SIDES.items())}, h100:8, h200:8, cpu:8, each with "
    "other sizes too"
)
# libtpu otherwise asks a metadata server which TPU this machine has, and refuses to be loaded by two processes at a time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# XLA's description of the device to compile for; an H100 by its memory, which is all that differs.
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
    """Devices and what each can do.

    Fields:
        sides: of a TPU slice, chips along each dimension; empty for others.
    """

    name: str
    devices: tuple[Any, ...]
    chip: chips.Chip
    sides: tuple[int, ...] = ()


def find(name: str | None) -> Topology:
    """The devices of a name as in the table above; those of this machine for None.

    Call before anything else touches JAX's devices: simulated ones and XLA's flags cannot be had later.

    Raises:
        UserError: an unknown or impossible topology, or the compiler for it is not installed.
    """
    if name is None:
        devices = tuple(jax.devices())
        chip = chips.of_device(devices[0]) or _simulated(len(devices))
        return Topology(f"{len(devices)} x {devices[0].device_kind}", devices, chip)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    sides = tuple(int(side) for side in match[2].split("x")) if match else ()
    if not match or match[1] not in (*SIDES, *GPUS, "cpu") or not all(sides):
        raise UserError(f"no topology {name!r}; known are {KNOWN}")
    kind = match[1]
    wanted = SIDES.get(kind, 1)
    if len(sides) != wanted:
        raise UserError(
            f"topology {name!r} has {len(sides)} sides and {kind} has {wanted}, as in "
            f"{kind}:{'x'.join('4' * wanted) if kind in SIDES else '8'}"
        )
    if kind == "cpu":
        return _cpu(name, sides[0])
    # The devices here are not asked for: a plan on a TPU machine must not take its chips.
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
    except RuntimeError:  # the devices are there already
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"topology {name!r} needs {count} simulated devices and this process has {len(devices)}; ask for them "
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
    except Exception as error:  # of the compiler, which tells what it does not like
        raise UserError(f"libtpu knows no slice {name!r}: {str(error).splitlines()[0]}") from None
    if len(devices) != math.prod(sides):
        raise UserError(f"libtpu makes {len(devices)} devices of {name!r}, not one for each of its {math.prod(sides)} chips")
    return tuple(devices)


def _gpus(kind: str, count: int) -> tuple[Any, ...]:
    # One after the other: a plugin is not looked for in a package that is not there.
    if any(importlib.util.find_spec(name) is None for name in ("jax_plugins", "jax_plugins.xla_cuda13")):
        raise UserError(
            f"--topology={kind}:{count} needs JAX's CUDA plugin, which compiles for GPUs without one: pip install 'dit_jax[cuda]'"
        )
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise UserError(f"topology {kind}:{count}: {GPUS_PER_HOST} GPUs make a host, so more than that must be a multiple of it")
    # There is nothing to try kernels on, and without trying XLA picks Triton tiles that do not exist: cuBLAS has its own choice.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    from jax.experimental import topologies

    chip = chips.CHIPS[kind]
    target = GPU_TARGET.format(bandwidth=chip.hbm_bandwidth, memory=chip.hbm_bytes, name=chip.name)
    hosts = -(-count // GPUS_PER_HOST)
    shape = f"1x{hosts}x{count // hosts}"
    return tuple(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target).devices)
