"""What strategies cost and hold on every kind of chip of a cluster, for `sharding.search.mixed`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sharding.costs.constants import Calibration
from sharding.costs.cost import Estimate, estimate
from sharding.costs.local import View
from sharding.costs.machine import machine
from sharding.costs.memory import kept_bytes
from sharding.costs.strategies import Strategies
from sharding.machines.topology import Chip, Cluster
from sharding.programs.program import Block, Program, dtype_bytes
from sharding.search.pipeline import Cuts


@dataclass(frozen=True)
class Kinds:
    """A cluster's chips that differ, and the kind of every device, node by node."""

    chips: tuple[Chip, ...]
    of_device: np.ndarray

    @classmethod
    def of(cls, cluster: Cluster) -> "Kinds":
        """Of a cluster with nodes."""
        chips = tuple({repr(n.chip): n.chip for n in cluster.nodes}.values())
        names = [repr(chip) for chip in chips]
        kinds = [names.index(repr(n.chip)) for n in cluster.nodes for _ in range(n.count)]
        return cls(chips, np.asarray(kinds))


@dataclass(frozen=True)
class Costs:
    """Strategies costed on every kind of chip.

    Attributes:
      program: what is run.
      strategies: N of them.
      kinds: the chips.
      results: of every kind.
      layers: block of each layer.
      compute: (kinds, blocks, N) seconds that grow with a replica's samples.
      rest: (kinds, blocks, N) seconds that do not.
    """

    program: Program
    strategies: Strategies
    kinds: Kinds
    results: tuple[Estimate, ...]
    layers: tuple[int, ...]
    compute: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(
        cls,
        program: Program,
        strategies: Strategies,
        cluster: Cluster,
        calibration: Calibration,
        stack: str,
    ) -> "Costs":
        """Costs strategies as if all chips were of one kind, for each kind, on the real wires."""
        kinds = Kinds.of(cluster)
        base = machine(cluster, strategies, None)
        results = []
        for chip in kinds.chips:
            constants = calibration.constants(chip.name, stack, cluster.measured)
            own = replace(
                base,
                peak=chip.peak_flops,
                hbm=chip.hbm_bytes_per_s,
                pcie=chip.pcie_bytes_per_s,
                tile=float(chip.matrix_tile),
                constants=constants,
            )
            results.append(estimate(program, strategies, own))
        layers = tuple(i for i, b in enumerate(program.blocks) for _ in range(b.repeat))
        one = np.ones(len(strategies))
        compute = np.asarray(
            [[(b.forward + b.backward + b.recompute) * one for b in r.blocks] for r in results]
        )
        total = np.asarray([[b.total * one for b in r.blocks] for r in results])
        return cls(program, strategies, kinds, tuple(results), layers, compute, total - compute)

    def of_replicas(self, row: int) -> np.ndarray:
        """(stages, replicas, devices of a replica): kinds."""
        strategies = self.strategies
        ways = int(strategies.tensor[row] * strategies.context[row])
        stages = int(strategies.stage[row])
        return self.kinds.of_device.reshape(stages, -1, ways)

    def outside_s(self, row: int) -> float:
        """What the step adds to its micro-batches, on the slowest chip."""
        return max(float(r.outside_s[row]) for r in self.results)

    def slowest(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(stages, replicas, blocks) compute and rest, each of a replica's slowest chip."""
        of = self.of_replicas(row)
        return (
            self.compute[:, :, row][of].max(axis=2),
            self.rest[:, :, row][of].max(axis=2),
        )

    def bound_s(self, row: int) -> float:
        """Seconds that no cuts and shares of a strategy are faster than.

        With shares that need not be whole a stage's replicas end together, after the harmonic
        mean of their times. With layers that need not be whole every stage is as slow as any:
        max t_i ≥ W / Σ 1/ρ_i, where a stage takes at least ρ_i of a reference's time, whatever
        layers it has, and W is the reference's time of all.
        """
        compute, rest = self.slowest(row)
        mean = compute.shape[1] / (1 / np.maximum(compute, 1e-30)).sum(axis=1)
        least = np.maximum(mean + rest.min(axis=1), 1e-30)  # (stages, blocks)
        reference = least.min(axis=0)
        slowness = (least / reference).min(axis=1)
        count = int(self.strategies.microbatches[row])
        work = sum(r * b.repeat for r, b in zip(reference, self.program.blocks, strict=True))
        slowest = work / (1 / slowness).sum()
        return (count - 1) * slowest + work + self.outside_s(row)


@dataclass(frozen=True)
class Bytes:
    """Bytes of a strategy's blocks on a device.

    Attributes:
      state: (blocks,) parameters, gradients and optimiser of a repetition.
      parts: share of `state` that each of the three is.
      kept: (blocks,) activations of a repetition that a micro-batch keeps.
      transient: the largest working set.
      host: of the whole strategy, in the host's memory.
    """

    state: np.ndarray
    parts: dict[str, float]
    kept: np.ndarray
    transient: float
    host: float

    @classmethod
    def of(cls, costs: Costs, row: int) -> "Bytes":
        """Of one of the strategies; they are the same on every kind of chip."""
        program, strategy = costs.program, costs.strategies[[row]]
        view = View(program, strategy, None)
        fsdp, zero = float(strategy.fsdp[0]), int(strategy.zero[0])
        widths = [dtype_bytes(t.dtype) for t in program.tensors.values() if t.role == "param"]
        away = strategy.offload[0]
        parts = {
            "parameters": max(widths, default=4.0) / (fsdp if zero == 3 else 1),
            "gradients": program.gradient_bytes / (fsdp if zero >= 2 else 1),
            "optimizer": program.state_bytes * (away != "optimizer") / (fsdp if zero >= 1 else 1),
        }
        each = sum(parts.values())
        kept = [
            float(kept_bytes(view, b)[0])
            if b.checkpointed and program.training and away != "activations"
            else 0.0
            for b in program.blocks
        ]
        memory = costs.results[0].memory
        transient, host = (
            float(np.broadcast_to(sizes, (len(costs.strategies),))[row])
            for sizes in (memory.transient, memory.host)
        )
        return cls(
            state=each * np.asarray([_count(view, b) for b in program.blocks]),
            parts={name: part / each for name, part in parts.items()},
            kept=np.asarray(kept),
            transient=transient,
            host=host,
        )

    def fullest(
        self, cuts: Cuts, microbatches: int, load: float, layers: Sequence[int]
    ) -> dict[str, float]:
        """By use, of the stage that needs most; stage i of p holds p - i micro-batches (1F1B)."""
        stages = []
        for stage, (a, b) in enumerate(itertools.pairwise(cuts.boundaries)):
            mine = list(layers[a:b])
            in_flight = min(len(cuts.sizes) - stage, microbatches)
            stages.append((self.state[mine].sum(), in_flight * load * self.kept[mine].sum()))
        state, kept = max(stages, key=sum)
        return {
            **{name: float(part * state) for name, part in self.parts.items()},
            "activations": float(kept),
            "transient": self.transient,
        }


def _count(view: View, block: Block) -> float:
    outside, experts = view.params(block)
    return float(outside[0] + experts[0])
