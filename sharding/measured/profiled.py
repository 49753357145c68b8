"""Steps of pipelines whose layers were measured, on nodes that differ in chips and links.

A profile says how long each layer's forward pass takes on each kind of chip for one sample. Part
of that is the host's and stays however many samples a micro-batch has; the rest is the device's,
grows with them, and is divided by tensor parallelism, which adds its reductions. Stages run at
the pace of their own chips; hand-overs and reductions of gradients share their node's network.

T = (m-1)·(max_i t_i + 2·max_i c_i) + Σ_i t_i + 2·Σ_i c_i + max_i r_i
t_i = Σ_l 3·(host_l(t) + b·device_l/t) + 2·reduce_l       (backward: two forward passes)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sharding.machines.topology import Cluster

_PASSES = 3
_FLOAT32 = 4.0


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """Measured layers of a model; arrays have one entry a layer.

    Attributes:
      forward_s: chip to seconds of a sample's forward pass, undivided.
      divided_s: (chip, degree of tensor parallelism) to the same of a divided layer, where it was
        profiled: of what the host does, which division makes more, not less.
      params: trained numbers of each layer.
      tables: positions of layers that share one table of `table_params` numbers, counted once a
        stage.
      table_params: see `tables`.
      reduced: whether tensor parallelism reduces the layer's result, forward and backward.
      activation_bytes: of a sample, between layers.
      kept_bytes: of a sample, for the backward pass, of what every member of a tensor-parallel
        group holds whole.
      divided_bytes: the same of what the group divides.
    """

    forward_s: Mapping[str, np.ndarray]
    divided_s: Mapping[tuple[str, int], np.ndarray] = field(default_factory=dict)
    params: np.ndarray
    tables: tuple[int, ...] = ()
    table_params: float = 0.0
    reduced: np.ndarray
    activation_bytes: float
    kept_bytes: np.ndarray
    divided_bytes: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ProfiledConstants:
    """What a profile of one sample at a time cannot tell.

    Attributes:
      host: chip to the host's share of a measured forward pass.
      device: chip to the device's share; the two need not sum to one, since a profile waits for
        each layer and a pipeline does not.
      link: share of the bandwidth within a node that reductions reach.
      network_bytes_per_s: what the hosts' network stacks move at most; in series with the wire.
      handover_s: seconds of a hand-over beside its bytes.
    """

    host: Mapping[str, float]
    device: Mapping[str, float]
    link: float
    network_bytes_per_s: float
    handover_s: float


@dataclass(frozen=True, kw_only=True)
class ProfiledPlan:
    """A division of profiled layers.

    Attributes:
      cuts: boundaries of stages, from 0 to the number of layers.
      tensor: ways in which layers are divided.
      data: replicas.
      microbatch: samples of a micro-batch.
      microbatches: of a step and a replica.
    """

    cuts: tuple[int, ...]
    tensor: int
    data: int
    microbatch: int
    microbatches: int

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return len(self.cuts) - 1

    def ranks(self, stage: int) -> list[list[int]]:
        """Devices of a stage, tensor-parallel groups within replicas; stages are outermost."""
        first = stage * self.data * self.tensor
        return [
            [first + replica * self.tensor + shard for shard in range(self.tensor)]
            for replica in range(self.data)
        ]


def step_time(
    profile: LayerProfile, plan: ProfiledPlan, cluster: Cluster, constants: ProfiledConstants
) -> float:
    """Seconds of a step.

    Args:
      profile: the layers.
      plan: how they are divided.
      cluster: nodes, filled in order; `Cluster.nodes` says what each is.
      constants: what the profile does not say.

    Raises:
      ValueError: a plan for another number of devices.
    """
    if plan.stages * plan.data * plan.tensor != cluster.chip_count:
        raise ValueError(
            f"a plan of {plan.stages} stages x {plan.data} replicas x {plan.tensor} ways takes "
            f"other than the cluster's {cluster.chip_count} chips"
        )
    stages = [_stage_time(profile, plan, cluster, constants, i) for i in range(plan.stages)]
    hand = [_handover(profile, plan, cluster, constants, i) for i in range(plan.stages - 1)]
    reduce_ = [_reduction(profile, plan, cluster, constants, i) for i in range(plan.stages)]
    slowest = max(stages) + 2 * max(hand, default=0.0)
    return (plan.microbatches - 1) * slowest + sum(stages) + 2 * sum(hand) + max(reduce_)


def _stage_time(
    profile: LayerProfile, plan: ProfiledPlan, cluster: Cluster, constants: ProfiledConstants,
    stage: int,
) -> float:  # fmt: skip
    """Of the slowest chip among the stage's."""
    rows = slice(plan.cuts[stage], plan.cuts[stage + 1])
    ways, samples = plan.tensor, plan.microbatch
    times = []
    for node in {_node_of(cluster, rank) for group in plan.ranks(stage) for rank in group}:
        chip = cluster.nodes[node].chip.name
        forward = profile.forward_s[chip][rows]
        divided = profile.divided_s.get((chip, ways), profile.forward_s[chip])[rows]
        busy = constants.host[chip] * divided + constants.device[chip] * forward * samples / ways
        moved = 2 * (ways - 1) / ways * profile.activation_bytes * samples
        speed = cluster.nodes[node].link_bytes_per_s * constants.link
        reductions = 2 * profile.reduced[rows].sum() * (moved / speed)
        times.append(_PASSES * busy.sum() + 2 * reductions * (ways > 1))
    return float(max(times))


def _handover(
    profile: LayerProfile, plan: ProfiledPlan, cluster: Cluster, constants: ProfiledConstants,
    stage: int,
) -> float:  # fmt: skip
    """One micro-batch from a stage to the next: members of a group send a share each."""
    size = profile.activation_bytes * plan.microbatch / plan.tensor
    pairs = [
        (_node_of(cluster, a), _node_of(cluster, b))
        for here, there in zip(plan.ranks(stage), plan.ranks(stage + 1), strict=True)
        for a, b in zip(here, there, strict=True)
    ]
    times = []
    for pair in set(pairs):
        if pair[0] == pair[1]:
            times.append(size * plan.tensor / cluster.nodes[pair[0]].link_bytes_per_s)
        else:
            times.append(size * pairs.count(pair) / _network(cluster, constants, pair))
    return max(times) + constants.handover_s


def _reduction(
    profile: LayerProfile, plan: ProfiledPlan, cluster: Cluster, constants: ProfiledConstants,
    stage: int,
) -> float:  # fmt: skip
    """Sum of a stage's gradients over replicas, in float32, by a ring."""
    if plan.data == 1:
        return 0.0
    size = _FLOAT32 * stage_params(profile, plan, stage)
    nodes = sorted({_node_of(cluster, group[0]) for group in plan.ranks(stage)})
    moved = 2 * (plan.data - 1) / plan.data * size
    if len(nodes) == 1:
        return moved / cluster.nodes[nodes[0]].link_bytes_per_s
    return moved * plan.tensor / _network(cluster, constants, nodes)


def stage_params(profile: LayerProfile, plan: ProfiledPlan, stage: int) -> float:
    """Parameters that a device of a stage holds."""
    first, last = plan.cuts[stage], plan.cuts[stage + 1]
    tables = any(first <= position < last for position in profile.tables)
    return (profile.params[first:last].sum() + tables * profile.table_params) / plan.tensor


def memory_bytes(profile: LayerProfile, plan: ProfiledPlan, state_bytes: float) -> float:
    """Bytes of the fullest device: state of its parameters, and micro-batches in flight (1F1B).

    Args:
      profile: the layers.
      plan: how they are divided.
      state_bytes: of a parameter: itself, its gradient and the optimiser's state.
    """
    kept = (profile.kept_bytes + profile.divided_bytes / plan.tensor) * plan.microbatch
    need = []
    for stage in range(plan.stages):
        in_flight = min(plan.stages - stage, plan.microbatches)
        rows = slice(plan.cuts[stage], plan.cuts[stage + 1])
        state = state_bytes * stage_params(profile, plan, stage)
        need.append(state + in_flight * float(kept[rows].sum()))
    return max(need)


def _node_of(cluster: Cluster, rank: int) -> int:
    for index, node in enumerate(cluster.nodes):
        if rank < node.count:
            return index
        rank -= node.count
    raise ValueError(f"{cluster.name} has no device {rank}")


def _network(cluster: Cluster, constants: ProfiledConstants, nodes: Sequence[int]) -> float:
    """Bytes/s between nodes: the slowest wire in series with what the hosts can drive."""
    wire = min(cluster.nodes[node].network_bytes_per_s for node in nodes)
    return 1 / (1 / wire + 1 / constants.network_bytes_per_s)
