"""What a planned step takes on one device: its peak memory and its collectives.

The search compares thousands of strategies by sums over a `Program` (`sharding.costs.memory`).
The one that is chosen is looked at again here, as the program that will run: traced with its
shardings, its rematerialisation and its update, partitioned, and followed instruction by
instruction.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from sharding.compiled.computation import Computation, computation
from sharding.compiled.hlo import Traffic
from sharding.compiled.liveness import Peak, fusion_of, peak
from sharding.compiled.partition import partition, partitioner_of
from sharding.execution.execute import Execution, leaf_specs, rewritten
from sharding.machines.topology import Cluster
from sharding.programs.fused import planning
from sharding.tracing.arguments import abstract
from sharding.tracing.dims import product


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one device.

    Attributes:
      peak: what is alive at most.
      collectives: kind to count and bytes, in the terms of `hlo.collectives`.
    """

    peak: Peak
    collectives: Mapping[str, Traffic]


def footprint(
    step: Callable[..., Any],
    args: Sequence[Any],
    execution: Execution,
    cluster: Cluster,
    *,
    donate: Sequence[int] = (),
    detail: bool = False,
    **roles: Any,
) -> Footprint:
    """Follows a planned step without compiling it.

    Args:
      step: the function.
      args: its arguments, arrays or shapes.
      execution: what the plan asks for; of its mesh only names and sizes are read.
      cluster: the machine, for what its compiler fuses.
      donate: positions of arguments whose memory results may take.
      detail: list what is alive at the peak.
      **roles: `state` and `data` of `sharding.plan`.
    """
    shapes = abstract(tuple(args))
    with planning(cluster.platform):
        run = rewritten(step, shapes, execution, **roles)
        traced = computation(run, shapes)
        results = jax.eval_shape(run, *shapes)
    mesh = dict(execution.mesh.shape)
    if execution.offload == "optimizer":
        for i in donated_leaves(args, (1,)):
            traced.inputs[i].on_host = bool(traced.inputs[i].shape)
    partitioner = partitioner_of(cluster)
    partition(
        traced, mesh, leaf_specs(shapes, execution.inputs), leaf_specs(results, execution.outputs),
        partitioner=partitioner)  # fmt: skip
    held = peak(traced, mesh, fusion_of(cluster), donated_leaves(args, donate), detail=detail)
    return Footprint(peak=held, collectives=_traffic(traced, mesh, partitioner.reduces))


def compiler_of(cluster: Cluster) -> Hashable:
    """What a footprint depends on of a cluster: what its compiler does."""
    return cluster.platform, partitioner_of(cluster), fusion_of(cluster)


def donated_leaves(args: Sequence[Any], donate: Sequence[int]) -> list[int]:
    """Positions, among all leaves, of those of donated arguments."""
    counts = [len(jax.tree.leaves(arg)) for arg in args]
    return [sum(counts[:i]) + j for i in donate for j in range(counts[i])]


def _traffic(
    step: Computation, mesh: Mapping[str, int], reduces: Collection[str]
) -> dict[str, Traffic]:
    found: dict[str, list[float]] = {}
    devices = product(mesh.values())

    def walk(body: Computation, times: int) -> None:
        for instruction in body.instructions:
            for move in instruction.moves:
                if all(mesh[axis] == 1 for axis in move.axes):
                    continue
                joins_all = product(mesh[axis] for axis in move.axes) == devices
                kind = "all-reduce" if joins_all and move.kind in reduces else move.kind
                total = found.setdefault(kind, [0.0, 0.0])
                total[0] += times
                total[1] += times * move.bytes
            # Of branches one is run: the one that moves most cannot be known, the last is taken.
            for inner in instruction.bodies[-1:]:
                walk(inner, times * instruction.trips)

    walk(step, 1)
    return {kind: Traffic(int(n), round(size)) for kind, (n, size) in sorted(found.items())}
