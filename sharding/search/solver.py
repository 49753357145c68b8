"""Branch-and-bound over the search space: the best strategies, with a proof of how good they are.

A lower bound that costs almost nothing (products and passes over memory at the calibrated rates,
unpadded and divided by all devices, with the bubble and the recomputation that a strategy asks
for, and no communication at all) orders the candidates. They are costed exactly in that order,
many at once, until the bound of the next candidate is above the best found and what ties with it:
nothing that is left can be better. If a budget ends the search earlier, the gap to the smallest
bound left is reported. Of candidates whose times tie, the smallest is taken (`candidate.choose`).
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sharding.costs.constants import Calibration, shipped
from sharding.costs.cost import estimate
from sharding.costs.local import View
from sharding.costs.machine import machine
from sharding.costs.memory import memory
from sharding.costs.roofline import SCATTERED, precision_gain
from sharding.costs.strategies import Strategies, Strategy
from sharding.machines.topology import Cluster
from sharding.programs.program import Op, Program
from sharding.search import mixed
from sharding.search.candidate import TIE_TOLERANCE, candidate, choose
from sharding.search.candidate import Candidate as Candidate
from sharding.search.candidate import Solution as Solution
from sharding.search.space import Constraints, DoesNotFit, candidates, does_not_fit

# Candidates that are costed at once.
_CHUNK = 4096


def solve(
    program: Program,
    cluster: Cluster,
    *,
    constraints: Constraints | None = None,
    calibration: Calibration | None = None,
    stack: str = "",
    top: int = 5,
    budget: int | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> Solution:
    """Finds the fastest strategies that fit into memory; of equally fast ones, the smallest.

    Args:
      program: what is run.
      cluster: where.
      constraints: what strategies must keep to.
      calibration: constants; the shipped ones when None.
      stack: software; XLA when "".
      top: how many strategies to return.
      budget: most candidates to cost; None searches until the best is proven.
      tie_tolerance: share of the fastest time within which memory decides; 0 for time alone.

    Raises:
      DoesNotFit: none fits; the message names the smallest overshoot and what would fix it.
      ValueError: no strategy divides the program; or a tolerance below zero.
    """
    began = time.perf_counter()
    if not tie_tolerance >= 0:
        raise ValueError(
            f"a tolerance of ties is a share of the time, at least 0: {tie_tolerance=}"
        )
    constraints = constraints or Constraints()
    calibration = calibration or shipped()
    if cluster.is_mixed:
        return mixed.solve(program, cluster, constraints, calibration, stack, top=top,
                           budget=budget, tie_tolerance=tie_tolerance)  # fmt: skip
    constants = calibration.constants(cluster.chip.name, stack, cluster.measured)
    space = candidates(program, cluster, constraints)
    limit = cluster.memory_bytes * constraints.memory_fraction
    used, host = _memory_in_chunks(program, space)
    shared = cluster.chip.host_memory_bytes / cluster.chip.devices_per_chip
    fitting = np.flatnonzero((used <= limit) & (host <= shared))
    if not len(fitting):
        raise _overshoot(program, cluster, constraints, space, (used, limit), (host, shared))
    bounds = lower_bound(program, space[fitting], cluster, constants)
    order = np.lexsort((fitting, bounds))  # ties by position: the same answer every time
    fitting, bounds = fitting[order], bounds[order]
    times = np.full(len(fitting), np.inf)
    done, best, end = 0, np.inf, min(len(fitting), budget or len(fitting))
    while done < end and bounds[done] < best * (1 + tie_tolerance):
        rows = slice(done, min(done + _CHUNK, end))
        some = space[fitting[rows]]
        times[rows] = estimate(program, some, machine(cluster, some, constants)).step_s
        best = min(best, float(times[rows].min()))
        done = rows.stop
    remaining = float(bounds[done]) if done < len(fitting) else np.inf
    bound = min(best, remaining)
    costed, times = fitting[:done], times[:done]
    first, tied = choose(times, used[costed], space[costed], limit=cluster.memory_bytes,
                         tolerance=tie_tolerance)  # fmt: skip
    leaders = [first, *np.lexsort((costed, times)).tolist()]
    chosen = _distinct(space, costed, leaders, top)
    found = evaluate(program, [space.row(int(i)) for i in chosen], cluster,
                     calibration=calibration, stack=stack)  # fmt: skip
    chosen_s = float(times[first])
    return Solution(
        best=tuple(found),
        bound_s=bound,
        gap=max(0.0, (chosen_s - bound) / chosen_s),
        tied=tied,
        space=len(space),
        fitting=len(fitting),
        costed=done,
        search_time_s=time.perf_counter() - began,
    )


def evaluate(
    program: Program,
    strategies: list[Strategy],
    cluster: Cluster,
    *,
    calibration: Calibration | None = None,
    stack: str = "",
) -> list[Candidate]:
    """Costs given strategies, whether they fit or not.

    Raises:
      ValueError: a strategy for another number of devices.
    """
    for strategy in strategies:
        if strategy.devices != cluster.device_count:
            more, rest = divmod(cluster.device_count, strategy.devices)
            hint = f", as data {more * strategy.data}" if more > 1 and not rest else ""
            raise ValueError(
                f"strategy {strategy.mesh} takes {strategy.devices} devices, {cluster.name} has "
                f"{cluster.device_count}; change a degree{hint}"
            )
    if cluster.is_mixed:
        return mixed.evaluate(program, strategies, cluster, calibration or shipped(), stack)
    result = estimate(program, Strategies.stack(strategies), cluster, calibration=calibration,
                      stack=stack)  # fmt: skip
    return [candidate(strategy, result, i) for i, strategy in enumerate(strategies)]


def lower_bound(
    program: Program, strategies: Strategies, cluster: Cluster, constants: Any
) -> np.ndarray:
    """Seconds that no step is faster than: no padding, no communication, everything divided.

    Products run at the best rate, other operations at that of the memory over their activations,
    divided by all devices; recomputation and the bubble are those of each strategy.
    """
    total = np.zeros(len(strategies))
    layers = np.zeros(len(strategies))
    for block in program.blocks:
        for index, op in enumerate(block.ops):
            once = _least_time(program, op, cluster, constants) * block.repeat
            read = 1.0 if index in block.read_again else constants.dead
            again = strategies.recomputes(op) * float(block.checkpointed) * read
            spent = once * (1.0 + program.training * (op.backward_passes + again))
            total = total + spent
            layers = layers + spent * block.checkpointed
    bubble = (strategies.stage - 1) / (strategies.microbatches * strategies.interleave)
    return total + layers * bubble


def _least_time(program: Program, op: Op, cluster: Cluster, constants: Any) -> float:
    chip, devices = cluster.chip, cluster.device_count
    if op.is_matmul:
        share = constants.attention if op.kind == "attention" else constants.matmul
        share *= constants.grouped if op.kind == "grouped_dot" else 1.0
        peak = chip.peak_flops["bf16"]
        gain = precision_gain(chip.peak_flops, op.precision, constants)
        rate = peak * share * gain / chip.devices_per_chip
        return program.flops(op) / (rate * devices)
    if op.fused or op.kind == "gather":
        return 0.0
    names = [n for n in (*op.inputs, *op.outputs) if program.tensors[n].role == "activation"]
    share = constants.hbm * (constants.scatter if op.kind in SCATTERED else 1.0)
    rate = chip.hbm_bytes_per_s * share / chip.devices_per_chip
    return sum(program.bytes(n) for n in names) / (rate * devices)


def _memory_in_chunks(program: Program, space: Strategies) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a device and of its share of the host's memory."""
    repeats = [b.repeat for b in program.blocks]
    parts = [
        memory(View(program, space[start : start + 16 * _CHUNK], None), repeats)
        for start in range(0, len(space), 16 * _CHUNK)
    ]
    return np.concatenate([p.total for p in parts]), np.concatenate([p.host for p in parts])


def _distinct(space: Strategies, fitting: np.ndarray, order: Sequence[int], top: int) -> list[int]:
    """The first of each mesh: alternatives that differ, not the same with another micro-batch."""
    seen: set[tuple[int, ...]] = set()
    chosen: list[int] = []
    degrees = space.degrees
    for position in order:
        row = int(fitting[position])
        key = tuple(degrees[row].tolist())
        if key not in seen:
            seen.add(key)
            chosen.append(row)
        if len(chosen) == top:
            break
    return chosen


def _overshoot(
    program: Program,
    cluster: Cluster,
    constraints: Constraints,
    space: Strategies,
    device: tuple[np.ndarray, float],
    host: tuple[np.ndarray, float],
) -> DoesNotFit:
    """The error that nothing fits, from bytes of all strategies and the limit, of each place."""
    (used, limit), (away, shared) = device, host
    on_device = np.flatnonzero(used <= limit)
    if not len(on_device):
        least = int(np.argmin(used))
        nearest = f"{space.row(least).mesh}, remat {space.remat[least]}"
        return does_not_fit(program, cluster, float(used[least]), limit, constraints, nearest)
    least = int(on_device[np.argmin(away[on_device])])
    nearest = f"{space.row(least).mesh}, offload {space.offload[least]}"
    return DoesNotFit(
        f"no plan of {program.name} fits {cluster.name}: the smallest puts {away[least] / 1e9:.1f} "
        f"GB a device into the host's memory, of which its share is {shared / 1e9:.1f} GB "
        f"({nearest}); allow offload 'none', or take more devices",
        float(away[least]),
        shared,
        nearest=nearest,
        place="host",
    )
