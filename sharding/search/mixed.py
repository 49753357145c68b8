"""Chips that differ: each stage at the pace and in the memory of its own, and uneven shares.

Devices are taken node by node, stages outermost, so that a stage has the chips of some nodes. For
every kind of chip the program is costed as if all were of it. A stage then takes

t_i = max_r Σ_l (s_r/b·compute_l(kind of r) + rest_l(kind of r))

for replicas r that take s_r of R·b samples, and the step (m-1)·max t_i + Σ t_i beside what is
outside the micro-batches. Layers are cut by `pipeline.cut_layers`, exactly, with the memory of
each stage's smallest chip; shares are tried out. Replicas of the same chips take the same share.

A bound orders the strategies: shares that need not be whole, and stages that need not hold whole
layers. Arrays are over stages, then layers; "layers" here are all repetitions of all blocks.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from sharding.costs.constants import Calibration
from sharding.costs.strategies import Strategies, Strategy
from sharding.machines.topology import Cluster
from sharding.programs.program import Program
from sharding.search.candidate import Candidate, Solution, candidate, choose
from sharding.search.mixed_costs import Bytes, Costs
from sharding.search.pipeline import Cuts, NoCuts, cut_layers
from sharding.search.space import Constraints, DoesNotFit, candidates, does_not_fit

# Strategies whose stages are cut exactly before the search ends with the gap that is left.
_BUDGET = 400
# Divisions of a batch that are tried for a strategy: the even one, and those nearest to balance.
_SHARES = 64
# Strategies among which the nearest to fitting is looked for, and micro-batches that make the
# fullest stage count for everything.
_NEAREST = 64
_ONLY_THE_LARGEST = 1_000_000


def solve(
    program: Program,
    cluster: Cluster,
    constraints: Constraints,
    calibration: Calibration,
    stack: str,
    *,
    top: int,
    budget: int | None,
    tie_tolerance: float,
) -> Solution:
    """As `solver.solve`, for a cluster whose chips differ.

    Raises:
      DoesNotFit: no strategy can cut the layers so that every stage fits its smallest chip.
      ValueError: no strategy divides the program.
    """
    began = time.perf_counter()
    space = candidates(program, cluster, constraints)
    costs = Costs.of(program, space, cluster, calibration, stack)
    bounds = np.asarray([costs.bound_s(row) for row in range(len(space))])
    order = np.argsort(bounds, kind="stable")
    limit = budget or _BUDGET
    found: list[tuple[float, int, Candidate]] = []
    best, tried, end = np.inf, 0, len(order)
    for position, row in enumerate(order.tolist()):
        if bounds[row] >= best * (1 + tie_tolerance) or (tried >= limit and found):
            end = position
            break
        tried += 1
        one = _best_of(costs, row, constraints)
        if one is not None:
            found.append((one.step_s, row, one))
            best = min(best, one.step_s)
    remaining = float(bounds[order[end]]) if end < len(order) else np.inf
    if not found:
        raise _overshoot(costs, cluster, constraints)
    found.sort(key=lambda entry: entry[:2])
    costed = [one for _, _, one in found]
    times = np.asarray([one.step_s for one in costed])
    first, tied = choose(
        times,
        np.asarray([one.memory_bytes for one in costed]),
        Strategies.stack([one.strategy for one in costed]),
        limit=cluster.memory_bytes,
        tolerance=tie_tolerance,
    )
    chosen = costed[first]
    bound = min(best, remaining)
    return Solution(
        best=tuple(_distinct([chosen, *costed], top)),
        bound_s=bound,
        gap=max(0.0, (chosen.step_s - bound) / chosen.step_s),
        tied=tied,
        space=len(space),
        fitting=len(found),
        costed=tried,
        search_time_s=time.perf_counter() - began,
    )


def evaluate(
    program: Program,
    strategies: Sequence[Strategy],
    cluster: Cluster,
    calibration: Calibration,
    stack: str,
) -> list[Candidate]:
    """As `solver.evaluate`: cuts and shares that a strategy does not name are chosen for it.

    Raises:
      ValueError: cuts that do not make the layers, or more stages than layers.
    """
    costs = Costs.of(program, Strategies.stack(strategies), cluster, calibration, stack)
    found = []
    for row, strategy in enumerate(strategies):
        if strategy.cuts and sum(strategy.cuts) != len(costs.layers):
            raise ValueError(
                f"cuts {strategy.cuts} do not make the {len(costs.layers)} layers of "
                f"{program.name}, embedding and head included"
            )
        one = _best_of(costs, row, None, given=strategy)
        if one is None:
            raise ValueError(f"{strategy.stage} stages for {len(costs.layers)} layers")
        found.append(one)
    return found


def _overshoot(costs: Costs, cluster: Cluster, constraints: Constraints) -> DoesNotFit:
    """The error that nothing fits, of the cuts that come nearest.

    They are looked for among the strategies that take least memory on equal chips.
    """
    order = np.argsort(costs.results[0].memory.total, kind="stable")
    found = []
    for row in order[:_NEAREST].tolist():
        with contextlib.suppress(NoCuts):  # more stages than layers
            needed, limit = _tightest(costs, row, constraints)
            found.append((needed - limit, row, needed, limit))
    if not found:
        raise NoCuts(f"every stage needs a layer, and {costs.program.name} has too few of them")
    _, row, needed, limit = min(found)
    strategy = costs.strategies.row(row)
    nearest = f"the fullest stage of {strategy.mesh}, remat {strategy.remat}"
    return does_not_fit(costs.program, cluster, needed, limit, constraints, nearest)


def _tightest(costs: Costs, row: int, constraints: Constraints) -> tuple[float, float]:
    """Bytes and limit of the stage that lacks most, with cuts whose fullest stage is smallest."""
    strategy, of = costs.strategies.row(row), list(costs.layers)
    need = Bytes.of(costs, row)
    in_flight = [min(strategy.stage - i, strategy.microbatches) for i in range(strategy.stage)]
    held = np.asarray([need.state[of] + count * need.kept[of] for count in in_flight])
    cuts = cut_layers(held, microbatches=_ONLY_THE_LARGEST)
    limits = _limits(costs, row, constraints)
    stages = [
        (float(held[i, a:b].sum()) + need.transient, float(limits[i]))
        for i, (a, b) in enumerate(itertools.pairwise(cuts.boundaries))
    ]
    return max(stages, key=lambda stage: stage[0] - stage[1])


def _limits(costs: Costs, row: int, constraints: Constraints) -> np.ndarray:
    """(stages,) usable bytes of the smallest chip of each stage."""
    chips = costs.kinds.chips
    smallest = [min(chips[k].memory_bytes for k in np.unique(stage))
                for stage in costs.of_replicas(row)]  # fmt: skip
    return np.asarray(smallest) * constraints.memory_fraction


def _best_of(
    costs: Costs, row: int, constraints: Constraints | None, *, given: Strategy | None = None
) -> Candidate | None:
    """The best cuts and shares of one strategy; None if no cuts fit into memory.

    Without constraints memory is no limit.
    """
    strategy = given or costs.strategies.row(row)
    compute, rest = costs.slowest(row)
    program = costs.program
    replicas = compute.shape[1]
    samples = program.dims.get(program.batch_dim, 1) / (replicas * strategy.microbatches)
    need = Bytes.of(costs, row)
    limits = np.full(strategy.stage, np.inf)
    if constraints:
        if need.host > min(chip.host_memory_bytes for chip in costs.kinds.chips):
            return None
        limits = _limits(costs, row, constraints) - need.transient
    best: tuple[float, tuple[int, ...], Cuts] | None = None
    choices: list[tuple[int, ...]] = [()]
    if given and given.shares:
        choices = [given.shares]
    elif constraints is None or constraints.uneven_shares:
        choices = _shares(compute, samples)
    of = list(costs.layers)
    for shares in choices:
        load = np.asarray(shares) / samples if shares else np.ones(replicas)
        times = (compute * load[None, :, None] + rest).max(axis=1)[:, of]
        try:
            cuts = _cut(times, strategy, need.state[of], need.kept[of] * load.max(), limits)
        except NoCuts:
            continue
        if best is None or cuts.step_s < best[0]:
            best = cuts.step_s, shares, cuts
    if best is None:
        return None
    step_s, shares, cuts = best
    # Terms are those of the slowest kind of chip; the rest of the step is what that kind waits.
    kind = int(np.argmin([float(r.step_s[row]) for r in costs.results]))
    plain = candidate(strategy, costs.results[kind], row)
    total = step_s + costs.outside_s(row)
    terms = {**plain.terms, "bubble": 0.0}
    terms["bubble"] = total - sum(terms.values())
    sizes = cuts.sizes if strategy.stage > 1 else ()
    load = max(shares) / samples if shares else 1.0
    memory_terms = need.fullest(cuts, strategy.microbatches, load, of)
    return replace(
        plain,
        strategy=replace(strategy, cuts=sizes, shares=shares),
        step_s=total,
        terms=terms,
        memory_bytes=sum(memory_terms.values()),
        memory_terms=memory_terms,
    )


def _cut(
    times: np.ndarray, strategy: Strategy, state: np.ndarray, kept: np.ndarray, limits: np.ndarray
) -> Cuts:
    if not strategy.cuts:
        return cut_layers(times, microbatches=strategy.microbatches, state_bytes=state,
                          kept_bytes=kept, limit_bytes=limits.tolist())  # fmt: skip
    boundaries = (0, *np.cumsum(strategy.cuts).tolist())
    spent = [float(times[i, a:b].sum()) for i, (a, b) in enumerate(itertools.pairwise(boundaries))]
    return Cuts(
        boundaries=boundaries,
        step_s=(strategy.microbatches - 1) * max(spent) + sum(spent),
    )


def _shares(compute: np.ndarray, samples: float) -> list[tuple[int, ...]]:
    """Samples of every replica: even, and what is near to balance; () stands for even.

    Args:
      compute: (stages, replicas, layers) seconds of `samples` samples.
      samples: of a micro-batch and replica on average.
    """
    paces = compute.sum(axis=2).T  # (replicas, stages)
    classes: dict[tuple[float, ...], list[int]] = {}
    for replica, pace in enumerate(paces.tolist()):
        classes.setdefault(tuple(pace), []).append(replica)
    if len(classes) == 1 or samples != int(samples):
        return [()]
    members = list(classes.values())
    pace = [max(key) for key in classes]
    total = round(samples * len(paces))
    divisions = _divisions([len(m) for m in members], total)
    ranked = sorted(divisions, key=lambda d: max(s * p for s, p in zip(d, pace, strict=True)))
    found: list[tuple[int, ...]] = [()]
    for division in ranked[:_SHARES]:
        shares = [0] * len(paces)
        for share, mine in zip(division, members, strict=True):
            for replica in mine:
                shares[replica] = share
        found.append(tuple(shares))
    return found


def _divisions(sizes: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """All ways to give every member of each class the same share, at least one each."""
    first, *rest = sizes
    if not rest:
        if total % first == 0 and total >= first:
            yield (total // first,)
        return
    least = sum(rest)
    for share in range(1, (total - least) // first + 1):
        for others in _divisions(rest, total - first * share):
            yield (share, *others)


def _distinct(found: Sequence[Candidate], top: int) -> list[Candidate]:
    """The first of each mesh."""
    seen: dict[str, Candidate] = {}
    for one in found:
        seen.setdefault(repr(one.strategy.mesh), one)
    return list(seen.values())[:top]
