"""Peak speeds, memory sizes and bandwidths of accelerators.

| figure | source |
|---|---|
| v4, v5e, v5p, v6e: peak, HBM, links | Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", system architecture |
| v4, v5e, v5p, v6e: usable HBM | the limit that libtpu 0.0.42's compiler reports if a program is too large |
| A100, H100, H200 | NVIDIA's data sheets; dense, without sparsity; links are NVLink, or the bus for PCIe cards |
| efficiencies | H200: 790 TFLOP/s on large products and 4.3 TB/s on a copy, measured; assumed for the others |
"""

from dataclasses import dataclass
from typing import Any

from dit_jax.errors import UserError

TERA, GIB, GB = 10**12, 2**30, 10**9
MATMUL_EFFICIENCY = 0.80
HBM_EFFICIENCY = 0.90
LINK_EFFICIENCY = 0.80


@dataclass(frozen=True)
class Chip:
    """One accelerator; speeds are None if an estimate would be meaningless.

    Fields:
        peak_flops: dense bfloat16 FLOP/s.
        hbm_bytes: memory of the chip.
        usable_bytes: memory available to a program; the system reserves the rest.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s sent over one link in one direction; a TPU has two links per dimension of its torus, a GPU has
            one (NVLink, to all GPUs of its host).
        network_bandwidth: bytes/s per chip between hosts if links do not leave the host (GPUs); otherwise None.
        wraps: a side of a slice closes to a ring if its length is a multiple of this.
    """

    name: str
    peak_flops: float | None
    hbm_bytes: int
    usable_bytes: int
    hbm_bandwidth: float | None
    link_bandwidth: float | None
    network_bandwidth: float | None = None
    wraps: int = 1


CHIPS = {
    "v4": Chip("TPU v4", 275 * TERA, 32 * GIB, int(30.75 * GIB), 1.228 * TERA, 50e9, wraps=4),
    "v5e": Chip("TPU v5e", 197 * TERA, 16 * GIB, int(15.75 * GIB), 0.819 * TERA, 50e9, wraps=16),
    "v5p": Chip("TPU v5p", 459 * TERA, 96 * GIB, int(95.74 * GIB), 2.765 * TERA, 100e9, wraps=4),
    "v6e": Chip("TPU v6e", 918 * TERA, 32 * GIB, int(31.25 * GIB), 1.638 * TERA, 100e9, wraps=16),
    # JAX uses 75 % of a GPU's memory by default (XLA_PYTHON_CLIENT_MEM_FRACTION); 92 % leaves room for cuDNN and NCCL.
    "h100": Chip("H100", 989 * TERA, 80 * GB, int(0.92 * 80e9), 3.35 * TERA, 450e9, network_bandwidth=50e9),
    "h100_nvl": Chip("H100 NVL", 835 * TERA, 94 * GB, int(0.92 * 94e9), 3.9 * TERA, 300e9, network_bandwidth=50e9),
    "h100_pcie": Chip("H100 PCIe", 756 * TERA, 80 * GB, int(0.92 * 80e9), 2.0 * TERA, 64e9, network_bandwidth=50e9),
    "h200": Chip("H200", 989 * TERA, 141 * GB, int(0.92 * 141e9), 4.8 * TERA, 450e9, network_bandwidth=50e9),
    "h200_nvl": Chip("H200 NVL", 835 * TERA, 141 * GB, int(0.92 * 141e9), 4.8 * TERA, 450e9, network_bandwidth=50e9),
    "a100_40gb": Chip("A100 40GB", 312 * TERA, 40 * GB, int(0.92 * 40e9), 1.555 * TERA, 300e9, network_bandwidth=25e9),
    "a100": Chip("A100 80GB", 312 * TERA, 80 * GB, int(0.92 * 80e9), 2.039 * TERA, 300e9, network_bandwidth=25e9),
}
# Prefix of JAX's `device_kind` -> chip; the first match wins.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "NVIDIA H100 PCIe": "h100_pcie",
    "NVIDIA H100 NVL": "h100_nvl",
    "NVIDIA H100": "h100",
    "NVIDIA H200 NVL": "h200_nvl",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-40GB": "a100_40gb",
    "NVIDIA A100-PCIE-40GB": "a100_40gb",
    "NVIDIA A100": "a100",
}


def of_kind(device_kind: str) -> Chip | None:
    """The chip of JAX's `device_kind`, such as "TPU v5 lite"; None if it is not in the table, as for a CPU."""
    return next((CHIPS[name] for prefix, name in KINDS.items() if device_kind.startswith(prefix)), None)


def of_device(device: Any) -> Chip | None:
    """The chip of a JAX device; None for a CPU.

    Raises:
        UserError: the device is not in the table.
    """
    if device.platform == "cpu":
        return None
    chip = of_kind(device.device_kind)
    if chip is None:
        raise UserError(
            f"the device {device.device_kind!r} is not in the table of chips ({', '.join(CHIPS)}): add it to "
            "dit_jax/programs/chips.py, or choose one of the topologies in --help with --topology"
        )
    return chip


def simulated(memory_bytes: int) -> Chip:
    """A simulated CPU device with its share of the host's memory and without speeds."""
    return Chip("simulated CPU device", None, memory_bytes, memory_bytes, None, None)
