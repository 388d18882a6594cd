"""Estimates a program's run time by a roofline model: the time that arithmetic, memory and links need, and their overlap.

The estimate is only as good as its assumptions:
  compute       every device computes its share of the matrix products, at MATMUL_EFFICIENCY of the peak
  HBM           at HBM_EFFICIENCY; a matrix product overlaps the traffic of its operands with its arithmetic, while elementwise
                operations add the time of their own traffic
  collectives   rings over the links that a group of devices spans, at LINK_EFFICIENCY; a side of a slice that does not close to a
                ring has half of them. Collectives scheduled beside matrix products overlap with everything on the chip; the
                others, `exposed`, add their time
  not counted   launches, waiting for data, padding of the matrix units' tiles (a TPU pads head width 72 to 128), transfers of
                what `mesh.offload` and `model.remat=offload` keep in host memory
"""

from dataclasses import asdict, dataclass

import numpy as np
from jax.sharding import Mesh

from dit_jax.programs import chips, collectives
from dit_jax.programs.topology import GPUS_PER_HOST, Topology
from dit_jax.programs.traffic import Traffic


@dataclass(frozen=True)
class Times:
    """Seconds of one execution of a program, by resource."""

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
        """The resource that takes longest: "compute", "hbm" or "collectives"."""
        if self.collectives > self.on_chip:
            return "collectives"
        return "compute" if self.compute >= max(self.matmul_hbm, self.elementwise_hbm) else "hbm"

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"without_overlap": self.without_overlap}


def estimate(
    topology: Topology,
    mesh: Mesh,
    flops: float,
    traffic: Traffic,
    collective_ops: list[collectives.Collective],
    hidden_share: float | None,
) -> Times | None:
    """Estimated times of a program on a topology; None for simulated devices, whose speed is meaningless.

    Args:
        mesh: gives the order of devices that the collectives' groups index.
        flops: of all devices together.
        hidden_share: share of the sent bytes that overlap, see `overlap.hidden_share`.
    """
    chip = topology.chip
    if chip.peak_flops is None or chip.hbm_bandwidth is None:
        return None
    hbm = chip.hbm_bandwidth * chips.HBM_EFFICIENCY
    sending = sum(c.times * c.sent_bytes / (bandwidth(topology, mesh, c) * chips.LINK_EFFICIENCY) for c in collective_ops)
    return Times(
        compute=flops / mesh.devices.size / (chip.peak_flops * chips.MATMUL_EFFICIENCY),
        matmul_hbm=traffic.matmul / hbm,
        elementwise_hbm=traffic.other / hbm,
        collectives=sending,
        exposed=sending * (1 - (hidden_share or 0)),
    )


def bandwidth(topology: Topology, mesh: Mesh, collective: collectives.Collective) -> float:
    """Bytes/s that one device can send in a collective while all groups run.

    On a torus, a group uses both links of each dimension that it spans, or one link if that side is not a ring. A permute uses
    both, because the compiler sends half to each neighbour at the same time.

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
