"""A cluster as strategies see it: rates, and the speed of every axis of the mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding.costs.strategies import Strategies
from sharding.machines.topology import AXES, Cluster


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the cost model needs to know of a cluster; scalars, or arrays over strategies.

    Attributes:
      peak: FLOP/s of a device by precision.
      hbm: bytes/s of its memory.
      pcie: bytes/s to its host's memory.
      tile: edge of the matrix unit.
      torus: whether all-to-all pays for distance.
      domains: nodes or slices, which only the network joins.
      bandwidth: bytes/s by axis of `AXES`, (strategies, axes).
      crosses: whether an axis' groups reach beyond a node or slice, (strategies, axes).
      constants: a `Constants`, or anything with its attributes.
    """

    peak: Mapping[str, Any]
    hbm: Any
    pcie: Any
    tile: Any
    torus: Any
    domains: Any
    bandwidth: np.ndarray
    crosses: np.ndarray
    constants: Any

    def speed(self, axis: str) -> np.ndarray:
        """Bytes/s that a collective over an axis reaches."""
        i = AXES.index(axis)
        share = np.where(self.crosses[:, i], self.constants.network, self.constants.link)
        return np.maximum(self.bandwidth[:, i] * share, 1.0)

    def latency(self, axis: str) -> np.ndarray:
        """Seconds of a step of a collective over an axis."""
        crosses = self.crosses[:, AXES.index(axis)]
        return np.where(crosses, self.constants.network_s, self.constants.link_s)


def machine(cluster: Cluster, strategies: Strategies, constants: Any) -> Machine:
    """The machine that strategies see: bandwidth depends on how they lie on the wires."""
    degrees = strategies.degrees
    leaders, leader = np.unique(strategies.first, return_inverse=True)
    keys, inverse = np.unique(
        np.concatenate([degrees, leader.reshape(-1)[:, None]], axis=1), axis=0, return_inverse=True
    )
    table = np.asarray([cluster.axis_bandwidth(k[:-1].tolist(), str(leaders[k[-1]])) for k in keys])
    crosses = np.cumprod(degrees, axis=1) > cluster.node_size
    chip = cluster.chip
    per_device = 1.0 / chip.devices_per_chip
    return Machine(
        peak={name: peak * per_device for name, peak in chip.peak_flops.items()},
        hbm=chip.hbm_bytes_per_s * per_device,
        pcie=chip.pcie_bytes_per_s * per_device,
        tile=float(chip.matrix_tile),
        torus=cluster.is_torus,
        domains=max(1.0, cluster.device_count / cluster.node_size),
        bandwidth=table[inverse.reshape(-1)],
        crosses=crosses & (degrees > 1),
        constants=constants,
    )
