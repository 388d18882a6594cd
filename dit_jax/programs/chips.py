"""What chips can do: the figures that a plan divides by.

| figure | where it is from |
|---|---|
| v4, v5e, v5p, v6e: peak, HBM, links | Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", system architecture |
| v4, v5e, v5p, v6e: usable HBM | what the compiler of libtpu 0.0.42 says is available when a program is too large |
| A100, H100, H200 | NVIDIA's data sheets; dense, without sparsity; links are NVLink, of PCIe cards the bus |
| efficiencies | H200: 790 TFLOP/s on large products and 4.3 TB/s on a copy, measured; the others are assumed to be as good |
"""

from dataclasses import dataclass

from dit_jax.errors import UserError

TERA, GIB, GB = 10**12, 2**30, 10**9
MATMUL_EFFICIENCY = 0.80
HBM_EFFICIENCY = 0.90
LINK_EFFICIENCY = 0.80


@dataclass(frozen=True)
class Chip:
    """One accelerator; speeds are None where an estimate would mean nothing.

    Fields:
        peak_flops: dense bfloat16 FLOP/s.
        hbm_bytes: memory of the chip.
        usable_bytes: what one program may take of it; the rest is the system's reserve.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s that leave over one link, in one direction; a TPU has two links per dimension of its torus, a GPU
            one (NVLink, to all of its host).
        network_bandwidth: bytes/s per chip between hosts, where the links end at the host (GPUs); None where they do not.
        wraps: the sides of a slice whose links close to a ring are the multiples of this.
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
    # JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more; 92 % leaves room for cuDNN and NCCL.
    "h100": Chip("H100", 989 * TERA, 80 * GB, int(0.92 * 80e9), 3.35 * TERA, 450e9, network_bandwidth=50e9),
    "h100_nvl": Chip("H100 NVL", 835 * TERA, 94 * GB, int(0.92 * 94e9), 3.9 * TERA, 300e9, network_bandwidth=50e9),
    "h100_pcie": Chip("H100 PCIe", 756 * TERA, 80 * GB, int(0.92 * 80e9), 2.0 * TERA, 64e9, network_bandwidth=50e9),
    "h200": Chip("H200", 989 * TERA, 141 * GB, int(0.92 * 141e9), 4.8 * TERA, 450e9, network_bandwidth=50e9),
    "h200_nvl": Chip("H200 NVL", 835 * TERA, 141 * GB, int(0.92 * 141e9), 4.8 * TERA, 450e9, network_bandwidth=50e9),
    "a100_40gb": Chip("A100 40GB", 312 * TERA, 40 * GB, int(0.92 * 40e9), 1.555 * TERA, 300e9, network_bandwidth=25e9),
    "a100": Chip("A100 80GB", 312 * TERA, 80 * GB, int(0.92 * 80e9), 2.039 * TERA, 300e9, network_bandwidth=25e9),
}
# How JAX names a device: the first prefix decides.
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
    """The chip of a name of JAX's, such as "TPU v5 lite"; None for one that is not in the table, a CPU among them."""
    return next((CHIPS[name] for prefix, name in KINDS.items() if device_kind.startswith(prefix)), None)


def of_device(device) -> Chip | None:
    """The chip that a JAX device is one of; None for a CPU.

    Raises:
        UserError: a device whose figures are not in the table.
    """
    if device.platform == "cpu":
        return None
    chip = of_kind(device.device_kind)
    if chip is None:
        raise UserError(
            f"no figures for the device {device.device_kind!r}; known are {', '.join(CHIPS)}: add it to "
            "dit_jax/programs/chips.py, or give one of the topologies of --help with --topology"
        )
    return chip


def simulated(memory_bytes: int) -> Chip:
    """A simulated CPU device with its share of the host's memory, whose speed says nothing about an accelerator."""
    return Chip("simulated CPU device", None, memory_bytes, memory_bytes, None, None)
