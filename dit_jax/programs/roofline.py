"""An estimated step time: what the arithmetic, the memory and the links each need at least, and how they overlap.

The assumptions, which the estimate is worth as much as:
  compute       every device does its share of the matrix products, at MATMUL_EFFICIENCY of the peak
  HBM           at HBM_EFFICIENCY; a matrix product hides the traffic of its own operands behind its arithmetic, while elementwise
                work reads and writes on its own
  collectives   rings over the links that a group of devices spans, at LINK_EFFICIENCY; a side of a slice that does not close to a
                ring has half. What the schedule puts beside matrix products overlaps with all that the chip does; the rest,
                `exposed`, comes on top
  not counted   launches, waiting for data, padding of the matrix units' tiles (head width 72 is 128 to a TPU), moving what
                `mesh.offload` and `model.remat=offload` keep in host memory
"""

from dataclasses import asdict, dataclass

import numpy as np

from dit_jax.programs import chips, collectives
from dit_jax.programs.topology import GPUS_PER_HOST, Topology
from dit_jax.programs.traffic import Traffic


@dataclass(frozen=True)
class Times:
    """Seconds of one run of a program, by what they are spent on."""

    compute: float
    matmul_hbm: float
    elementwise_hbm: float
    collectives: float
    exposed: float

    @property
    def on_chip(self) -> float:
        return max(self.compute, self.matmul_hbm) + self.elementwise_hbm

    @property
    def step(self) -> float:
        return max(self.on_chip, self.collectives - self.exposed) + self.exposed

    @property
    def without_overlap(self) -> float:
        return self.compute + self.matmul_hbm + self.elementwise_hbm + self.collectives

    @property
    def limit(self) -> str:
        """ "compute", "hbm" or "collectives": the one that takes longest."""
        if self.collectives > self.on_chip:
            return "collectives"
        return "compute" if self.compute >= max(self.matmul_hbm, self.elementwise_hbm) else "hbm"

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"without_overlap": self.without_overlap}


def estimate(
    topology: Topology, mesh, flops: float, traffic: Traffic, found: list[collectives.Collective], hidden_share: float | None
) -> Times | None:
    """Times of a program on a topology; None for simulated devices, whose speed means nothing.

    Args:
        mesh: whose order of devices the collectives' groups index.
        flops: of all devices together.
        hidden_share: of the bytes that the collectives send, see `overlap.hidden_share`.
    """
    chip = topology.chip
    if chip.peak_flops is None or chip.hbm_bandwidth is None:
        return None
    hbm = chip.hbm_bandwidth * chips.HBM_EFFICIENCY
    sending = sum(c.times * c.sent_bytes / (bandwidth(topology, mesh, c) * chips.LINK_EFFICIENCY) for c in found)
    return Times(
        compute=flops / mesh.devices.size / (chip.peak_flops * chips.MATMUL_EFFICIENCY),
        matmul_hbm=traffic.matmul / hbm,
        elementwise_hbm=traffic.other / hbm,
        collectives=sending,
        exposed=sending * (1 - (hidden_share or 0)),
    )


def bandwidth(topology: Topology, mesh, collective: collectives.Collective) -> float:
    """Bytes/s that one device can send in a collective, all of its groups at once.

    On a torus: both links of each dimension that a group spans, or one where that side is not a ring; a permute has both, because
    the compiler sends half to each neighbour at the same time.

    Raises:
        ValueError: the chip has no figures for its links.
    """
    chip, groups = topology.chip, collective.groups
    within = bool(topology.sides) or len({index // GPUS_PER_HOST for index in groups[0]}) == 1
    link = chip.link_bandwidth if within else chip.network_bandwidth
    if link is None:
        raise ValueError(f"{chip.name} has no figures for its links in dit_jax/programs/chips.py")
    if not topology.sides:
        return link
    if collective.kind == "collective-permute":
        return 2 * link
    coordinates = np.asarray([device.coords for device in mesh.devices.flat])
    links = 0
    for dimension, count in collectives.spans(groups, coordinates):
        closed = count == topology.sides[dimension] and count % chip.wraps == 0
        links += 2 if closed else 1
    return max(links, 1) * link
