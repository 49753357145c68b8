"""Strategies: degrees of parallelism, rematerialisation, micro-batches, and where they may go."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sharding.machines.topology import AXES
from sharding.programs.program import Op

# What rematerialisation keeps of a checkpointed block, by increasing recomputation: kinds and
# names of operations whose results are kept; None keeps everything.
REMAT: Mapping[str, frozenset[str] | None] = {
    "none": None,
    "attention": None,  # but the scores and what follows from them (arXiv:2205.05198, selective)
    "dots": frozenset({"dot", "grouped_dot"}),
    "projections": frozenset({"query", "key", "value", "out"}),
    "full": frozenset(),
}
_SCORES = ("scores", "softmax", "dropout", "attention")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a step is divided; the product of the six degrees is the number of devices.

    Attributes:
      data: replicas; each holds everything that the other axes do not divide.
      fsdp: ways in which the batch and, by `zero`, the training state are divided.
      tensor: ways in which layers are divided by heads and hidden width.
      context: ways in which sequences are divided.
      expert: ways in which experts are divided; other layers divide the batch instead.
      stage: pipeline stages.
      microbatches: of a step and a replica: gradient accumulation and the pipeline's filling.
      interleave: stretches of layers a stage holds (virtual stages).
      zero: what `fsdp` divides: 0 nothing, 1 optimiser state, 2 and gradients, 3 and parameters.
        Outside experts, whose axis divides the batch of all else, `expert` divides the same.
      remat: policy, a key of `REMAT`.
      sequence_parallel: what tensor parallelism leaves whole is divided along the sequence.
      offload: "none", "activations" or "optimizer": what lies in the host's memory.
      first: axis that takes the best torus dimensions; "host" is tensor, within a host's chips.
      cuts: layers of each stage, or () for equal stages. On mixed chips embedding and head count
        as layers.
      shares: samples of a micro-batch that each replica takes, or () for equal shares; replicas
        are counted as devices are, the stage's first.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    stage: int = 1
    microbatches: int = 1
    interleave: int = 1
    zero: int = 3
    remat: str = "none"
    sequence_parallel: bool = True
    offload: str = "none"
    first: str = "tensor"
    cuts: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (*AXES, "microbatches", "interleave"):
            if getattr(self, name) < 1:
                raise ValueError(f"a degree is at least 1: {name}={getattr(self, name)}")
        if self.remat not in REMAT:
            raise ValueError(f"rematerialisation policy {self.remat!r}; one of {', '.join(REMAT)}")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO has stages 0 to 3: {self.zero=}")
        if self.offload not in ("none", "activations", "optimizer"):
            raise ValueError(f"offload is none, activations or optimizer: {self.offload!r}")
        if self.cuts and len(self.cuts) != self.stage:
            raise ValueError(f"cuts names the layers of each stage: {self.cuts=}, {self.stage=}")
        replicas = self.data * self.fsdp * self.expert
        if self.shares and len(self.shares) != replicas:
            raise ValueError(f"shares names the samples of {replicas} replicas: {self.shares=}")

    @property
    def devices(self) -> int:
        """Devices that it takes."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def mesh(self) -> dict[str, int]:
        """Mesh axes and sizes, outermost first, without those of size one."""
        sizes = {axis: getattr(self, axis) for axis in reversed(AXES)}
        return {axis: size for axis, size in sizes.items() if size > 1}


@dataclass(frozen=True, kw_only=True)
class Strategies:
    """Many strategies as arrays, one entry each, so that they are costed at once.

    Attributes are those of `Strategy`; `remat`, `offload` and `first` as arrays of text.
    """

    data: np.ndarray
    fsdp: np.ndarray
    tensor: np.ndarray
    context: np.ndarray
    expert: np.ndarray
    stage: np.ndarray
    microbatches: np.ndarray
    interleave: np.ndarray
    zero: np.ndarray
    remat: np.ndarray
    sequence_parallel: np.ndarray
    offload: np.ndarray
    first: np.ndarray

    @classmethod
    def stack(cls, strategies: Sequence[Strategy]) -> "Strategies":
        """Turns a list into arrays; `cuts` are not carried."""
        return cls(
            **{f.name: np.asarray([getattr(s, f.name) for s in strategies]) for f in fields(cls)}
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: Any) -> "Strategies":
        return Strategies(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def row(self, index: int) -> Strategy:
        """One of them."""
        values = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        return Strategy(**{name: value.item() for name, value in values.items()})

    @property
    def degrees(self) -> np.ndarray:
        """Integers, one row a strategy, one column an axis of `AXES`."""
        return np.stack([getattr(self, axis) for axis in AXES], axis=1).astype(int)

    @property
    def state_ways(self) -> np.ndarray:
        """Ways in which ZeRO may divide the state of what lies outside experts."""
        return self.fsdp * self.expert

    @property
    def batch_ways(self) -> np.ndarray:
        """Ways in which the batch is divided."""
        return self.data * self.fsdp * self.expert

    def recomputes(self, op: Op) -> np.ndarray:
        """Whether each runs an operation of a checkpointed block again in the backward pass."""
        policies = {name: _recomputes(name, op) for name in REMAT}
        return np.asarray([policies[name] for name in self.remat.tolist()])


def _recomputes(policy: str, op: Op) -> bool:
    if policy == "attention":  # a fused attention never kept its scores
        return op.name in _SCORES and op.kind != "attention"
    kept = REMAT[policy]
    return kept is not None and op.kind not in kept and op.name not in kept


def divisors(number: int) -> list[int]:
    """All divisors, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
