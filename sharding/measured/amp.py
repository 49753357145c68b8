"""AMP's own cost model (NeurIPS 2022, arXiv:2210.07297), as a baseline with known predictions.

T = (B-1)·max_i t_i + Σ_i c_i + Σ_l e_l + T_dp                                    (section 3.3)

with e_l three forward times of layer l, t_i their sum over stage i, c_i the hand-over between
stages i and i+1, and T_dp the slowest reduction of gradients. Bandwidth counts float32 numbers a
second. The authors' released predictions come from this model with ranks placed stage by stage,
replica by replica; the head shares its matrix with the embedding, which a stage counts once.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# AMP costs a backward pass as two forward passes.
_PASSES = 3
# Parameters of a transformer layer in squares of its width.
_SQUARES_OF_WIDTH = 12


@dataclass(frozen=True, kw_only=True)
class AmpModel:
    """A model as AMP describes it.

    Attributes:
      width: hidden size.
      seq_len: tokens of a sample.
      vocab: vocabulary.
      layers: positions of transformer layers in the list of layers.
      tables: positions of the layers that hold the (shared) vocabulary matrix.
      head: position of the head, after which hand-overs carry logits.
    """

    width: int
    seq_len: int
    vocab: int
    layers: range
    tables: tuple[int, ...]
    head: int


@dataclass(frozen=True, kw_only=True)
class AmpCluster:
    """Nodes of equal size, each with a bandwidth within and one to others, float32 numbers/s.

    Attributes:
      node_size: GPUs of a node.
      within: of each node.
      between: of each node; a pair gets the smaller.
    """

    node_size: int
    within: tuple[float, ...]
    between: tuple[float, ...]

    def link(self, a: int, b: int) -> float:
        """Bandwidth between two ranks."""
        first, second = a // self.node_size, b // self.node_size
        if first == second:
            return self.within[first]
        return min(self.between[first], self.between[second])


# The GPT-2 of AMP's experiments: 30 layers, of which 24 are transformer layers.
GPT2 = AmpModel(width=1024, seq_len=1024, vocab=52256, layers=range(2, 26), tables=(0, 28), head=28)


def gigabits(rate: float) -> float:
    """Gb/s as float32 numbers a second."""
    return rate * 1e9 / 32


def amp_step_time(
    model: AmpModel,
    cluster: AmpCluster,
    forward_s: Sequence[float],
    *,
    cuts: Sequence[int],
    tensor: int,
    data: int,
    microbatch: int,
    global_batch: int,
) -> float:
    """AMP's prediction of a step, seconds.

    Args:
      model: what is trained.
      cluster: where.
      forward_s: seconds of a sample's forward pass of each layer at this tensor degree; of mixed
        chips their mean, which is AMP's treatment of them.
      cuts: boundaries of stages, from 0 to the number of layers.
      tensor: degree of tensor parallelism, whose collectives are inside `forward_s`.
      data: replicas.
      microbatch: samples of a micro-batch.
      global_batch: samples of a step.

    Raises:
      ValueError: cuts that do not cover the layers.
    """
    if cuts[0] != 0 or cuts[-1] != len(forward_s):
        raise ValueError(f"cuts run from 0 to {len(forward_s)} layers: {list(cuts)}")
    count = global_batch // (data * microbatch)
    times = [_PASSES * microbatch * t for t in forward_s]
    stages = [sum(times[a:b]) for a, b in itertools.pairwise(cuts)]
    handover = sum(
        _handover(model, cluster, stage, cuts[stage + 1], tensor, data, microbatch)
        for stage in range(len(stages) - 1)
    )
    reduction = max(
        _reduction(model, cluster, stage, cuts[stage : stage + 2], tensor, data)
        for stage in range(len(stages))
    )
    return (count - 1) * max(stages) + handover + sum(times) + reduction


def _rank(tensor: int, data: int, stage: int, replica: int, shard: int) -> int:
    return shard + tensor * (replica + data * stage)


def _handover(
    model: AmpModel,
    cluster: AmpCluster,
    stage: int,
    cut: int,
    tensor: int,
    data: int,
    microbatch: int,
) -> float:
    width = model.width if cut <= model.head else model.vocab / tensor
    volume = microbatch * model.seq_len * width
    total = 0.0
    for replica in range(data):
        total += volume / min(
            cluster.link(
                _rank(tensor, data, stage, replica, shard),
                _rank(tensor, data, stage + 1, replica, shard),
            )
            for shard in range(tensor)
        )
    return total / data


def _reduction(
    model: AmpModel,
    cluster: AmpCluster,
    stage: int,
    cut: Sequence[int],
    tensor: int,
    data: int,
) -> float:
    if data == 1:
        return 0.0
    first, last = cut
    layers = sum(position in model.layers for position in range(first, last))
    params = layers * _SQUARES_OF_WIDTH * model.width**2 / tensor
    if any(first <= position < last for position in model.tables):
        params += model.width * model.vocab / tensor
    slowest = min(
        cluster.link(
            _rank(tensor, data, stage, replica, shard),
            _rank(tensor, data, stage, (replica + 1) % data, shard),
        )
        for shard in range(tensor)
        for replica in range(data)
    )
    return 2 * (data - 1) / data * params / slowest
