"""How a cluster can be cut: a part for the learner, and actors of equal size in the rest."""

import itertools
import math
from dataclasses import dataclass, replace

from sharding import Cluster

_MOST_CUTS = 8
_HOST_EDGE = 4  # a host of a two-dimensional torus is 2 × 4 chips


@dataclass(frozen=True)
class Cut:
    """A cluster in two.

    Attributes:
      learner: the learner's part.
      actors: the rest.
    """

    learner: Cluster
    actors: Cluster

    @property
    def learner_share(self) -> float:
        return self.learner.chip_count / (self.learner.chip_count + self.actors.chip_count)


def cuts(cluster: Cluster) -> list[Cut]:
    """Every way to saw through the longest dimension (or between slices, or between nodes).

    Raises:
      ValueError: the cluster cannot be cut: one chip, or nodes that differ (name the two parts).
    """
    if cluster.nodes:
        raise ValueError(
            f"{cluster.name} has nodes that differ: name the learner's and the actors' part as "
            "two clusters"
        )
    if cluster.slices > 1:
        of = [
            (_part(cluster, cluster.shape, i), _part(cluster, cluster.shape, cluster.slices - i))
            for i in range(1, cluster.slices)
        ]
        return [Cut(*pair) for pair in of]
    axis = max(range(len(cluster.shape)), key=lambda i: (cluster.shape[i], i))
    if not cluster.is_torus:
        axis = 0  # between nodes
    size = cluster.shape[axis]
    least = _HOST_EDGE if cluster.is_torus and len(cluster.shape) == 2 else 1
    step = max(least, size // _MOST_CUTS)
    places = range(step, size, step)
    if not places:
        raise ValueError(
            f"{cluster.name} is too small to be cut: learner and actors need a host each"
        )
    return [Cut(_sawn(cluster, axis, i), _sawn(cluster, axis, size - i)) for i in places]


def half_and_half(cluster: Cluster) -> Cut:
    """The cut nearest to the middle."""
    return min(cuts(cluster), key=lambda cut: abs(cut.learner_share - 0.5))


def actor_sizes(region: Cluster) -> list[tuple[Cluster, int]]:
    """Machines of one actor, and how many of them the region holds, smallest first.

    On a torus boxes of whole hosts whose edges divide the region's, the most cubic of each size;
    on a switch parts of a node, or whole nodes.
    """
    if region.nodes:
        return [(region, 1)]
    found: dict[int, tuple[int, ...]] = {}
    divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in region.shape]
    for shape in itertools.product(*divisors):
        if not region.is_torus and shape[0] > 1 and shape[1] < region.shape[1]:
            continue  # parts of several nodes
        chips = math.prod(shape)
        if region.is_torus and not _of_hosts(region, shape):
            continue
        if chips not in found or max(shape) < max(found[chips]):
            found[chips] = shape
    if not found:
        found[region.chip_count // region.slices] = region.shape
    total = region.chip_count
    return [(_part(region, shape, 1), total // chips) for chips, shape in sorted(found.items())]


def _of_hosts(region: Cluster, shape: tuple[int, ...]) -> bool:
    """Whether a box is made of whole hosts: 2 × 2 × 1 chips, or 2 × 4 in two dimensions."""
    a, b, *_ = sorted(shape, reverse=True)
    host = (2, 2) if len(shape) == 3 else (_HOST_EDGE, 2)
    return math.prod(shape) >= region.chip.chips_per_host and not a % host[0] and not b % host[1]


def hosts(cluster: Cluster) -> int:
    """Machines with a network card of their own."""
    if not cluster.is_torus:
        return max(1, len(cluster.nodes) or cluster.shape[0])
    return max(1, cluster.chip_count // cluster.chip.chips_per_host)


def _sawn(cluster: Cluster, axis: int, size: int) -> Cluster:
    shape = list(cluster.shape)
    shape[axis] = size
    return _part(cluster, tuple(shape), 1)


def _part(cluster: Cluster, shape: tuple[int, ...], slices: int) -> Cluster:
    """Equal chips; a torus is written with its hosts first, as it is sold."""
    if cluster.is_torus:
        shape = tuple(sorted(shape, reverse=len(shape) == 3))
    name = f"{cluster.chip.name}:{'x'.join(map(str, shape))}"
    name += f"x{slices}slices" if slices > 1 else ""
    return replace(
        Cluster.of(cluster.chip, shape, slices=slices, name=name), measured=cluster.measured
    )
