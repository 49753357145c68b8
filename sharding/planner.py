"""`plan`: from a step and a cluster to a plan."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from sharding.costs.constants import Calibration
from sharding.costs.cost import estimate
from sharding.costs.strategies import Strategies, Strategy
from sharding.execution.execute import TrainStep
from sharding.execution.specs import DoesNotHold, Layout, layout
from sharding.execution.step_trace import trace_step
from sharding.explain import Alternative
from sharding.machines.topology import Cluster
from sharding.plan import Plan
from sharding.programs.fused import planning
from sharding.programs.program import Program
from sharding.search.candidate import TIE_TOLERANCE
from sharding.search.pipeline import cut_layers
from sharding.search.reach import within_reach
from sharding.search.solver import Candidate, Solution, solve
from sharding.search.space import Constraints, DoesNotFit, does_not_fit
from sharding.simulation import (
    described_plan,
    find_cluster,
    placement_of,
    predicted,
    returned,
    with_footprint,
    without_rule,
)
from sharding.tracing.arguments import abstract
from sharding.tracing.trace import Trace

# Strategies that are tried, fastest first, when specs are fixed and some cannot hold them.
_TRIED = 64
# The search may use this much more memory than there is, until its choice is looked at closely;
# that many times, between these steps.
_HOPE = 1.25
_ROUNDS = 8
_LEAST_CUT, _MOST_CUT = 0.5, 0.97


def plan(
    step: Callable[..., Any] | Program,
    args: Any = (),
    *,
    cluster: str | Cluster | Sequence[Any],
    fixed: Mapping[str, PartitionSpec] | None = None,
    constraints: Constraints | None = None,
    state: Sequence[int] | None = None,
    data: Sequence[int] | None = None,
    donate: Sequence[int] | None = None,
    calibration: Calibration | None = None,
    top: int = 5,
    tie_tolerance: float = TIE_TOLERANCE,
) -> Plan:
    """Finds how to divide a step over a cluster.

        step = sharding.train_step(loss, optimizer)  # loss(params, batch) -> a scalar
        plan = sharding.plan(step, (params, opt_state, batch), cluster="v5p:8x8x8")
        print(plan.explain())
        params, opt_state, value = plan.apply(step)(params, opt_state, batch)

    What a model would need that nobody has written, a description answers. It has no arrays: the
    plan holds the mesh, the choices and the prediction, and cannot be applied or checked.

        sharding.plan(sharding.transformer(layers=80, d_model=8192, ...), cluster="v5p:8x8x8")

    Args:
      step: a function that `jax.jit` takes; or what `train_step` returns, whose inside the plan
        may change too; or a description, as `transformer` gives.
      args: its arguments, a tuple of pytrees of arrays or `jax.ShapeDtypeStruct`s; () of a
        description.
      cluster: a name ("v5p:4x4x8", "h100:8x8"), a JSON file, JAX devices, or a `Cluster`.
      fixed: path of an argument, or the end of one, to the spec that it must have, for programs
        that share parameters. Every argument whose path ends with it is fixed, the moments of an
        optimiser with their parameters; of several ends the longest counts.
      constraints: what the search has to keep to.
      state: positions of arguments that are state (parameters, optimiser); inferred when None.
      data: positions of arguments whose leading axis is the batch; inferred when None.
      donate: positions of arguments whose memory results may take; the state that comes back
        when None.
      calibration: constants of the cost model; the shipped ones when None.
      top: how many plans to list, the chosen one included.
      tie_tolerance: predicted times that differ by less than this share are not told apart, and
        the plan that takes less memory is chosen; 0 for the fastest whatever it takes.

    Returns:
      The plan: mesh, specs, execution choices, prediction and alternatives; see `Plan`.

    Raises:
      DoesNotFit: nothing fits; the message names the smallest overshoot and what would fix it.
      ValueError: nothing divides the step, or nothing keeps to the constraints.
    """
    where = find_cluster(cluster)
    constraints = constraints or Constraints()
    if isinstance(step, Program):
        if args or fixed or state or data or donate:
            raise ValueError(
                "a description has no arguments: leave out args, fixed, state, data and donate"
            )
        return _described(step, where, constraints, calibration, top, tie_tolerance)
    with planning(where.platform):
        traced = trace_step(step, args, state=state, data=data)
    allowed, notes = within_reach(step, traced, constraints)
    notes = [*where.warnings, *without_rule(traced), *notes]
    if where.is_mixed:
        notes.append("uneven shares of the batch were out of reach: arrays are divided evenly")

    def solve_with(narrowed: Constraints) -> Solution:
        return solve(traced.program, where, constraints=narrowed, calibration=calibration,
                     top=max(top, _TRIED if fixed else 1), tie_tolerance=tie_tolerance)  # fmt: skip

    def make(found: Solution) -> tuple[Candidate, Plan]:
        chosen, placed = _first_that_holds(traced, found.best, fixed)
        made = _plan(
            traced, where, chosen, placed, calibration=calibration, step=step,
            args=abstract(args), where=where,
            state=None if state is None else tuple(state),
            data=None if data is None else tuple(data),
            donate=returned(args, traced) if donate is None else tuple(donate),
        )  # fmt: skip
        return chosen, with_footprint(made, traced)

    began = time.perf_counter()
    fitting = _fitting(traced.program, where, allowed, solve_with, make)
    made, found = fitting.made, fitting.found
    assert made.prediction is not None
    prediction = dataclasses.replace(
        made.prediction,
        gap=max(0.0, 1 - fitting.bound_s / made.step_time_s),
        search_time_s=time.perf_counter() - began,
        space=fitting.space,
        tied=found.tied,
    )
    others = [c for c in found.best if c.strategy != fitting.chosen.strategy][: max(0, top - 1)]
    return dataclasses.replace(
        made,
        prediction=prediction,
        alternatives=_alternatives(others, where, allowed),
        notes=(*notes, *made.notes, *fitting.notes),
    )


@dataclass(frozen=True)
class _Fitting:
    """The plan that fits as the program that will run.

    Attributes:
      chosen: its strategy and what the search says of it.
      made: the plan, with the memory and collectives of the program.
      found: the last search.
      bound_s: no strategy is faster, of all that fit by the first search's sums.
      space: strategies of that search.
      notes: what was passed over, in words.
    """

    chosen: Candidate
    made: Plan
    found: Solution
    bound_s: float
    space: int
    notes: tuple[str, ...]


def _fitting(
    program: Program,
    where: Cluster,
    allowed: Constraints,
    solve_with: Callable[[Constraints], Solution],
    make: Callable[[Solution], tuple[Candidate, Plan]],
) -> _Fitting:
    """The best plan that fits as the program that will run.

    The search's own sums decide what is looked at. They start with more memory than there is,
    for they may be too careful, and get less by as much as they turn out too hopeful. The stages
    of a mixed cluster have memories of their own, which the search looks at.
    """
    limit = where.memory_bytes * allowed.memory_fraction
    largest = max((n.chip.memory_bytes for n in where.nodes), default=where.memory_bytes)
    most = largest * allowed.memory_fraction if where.is_mixed else limit
    share = allowed.memory_fraction * (1.0 if where.is_mixed else _HOPE)
    smallest, notes, passed_over = float("inf"), [], 0
    first: Solution | None = None
    for _ in range(_ROUNDS):
        try:
            found = solve_with(dataclasses.replace(allowed, memory_fraction=share))
        except DoesNotFit as error:
            # Of mixed chips the first error names the stage that lacks memory, and its limit.
            if error.place == "host" or (where.is_mixed and first is None):
                raise
            # The search was allowed more than there is, or less.
            too_large = [n for n in (smallest, error.needed_bytes) if limit < n < float("inf")]
            needed = min(too_large, default=error.needed_bytes)
            raise does_not_fit(program, where, needed, limit, allowed, error.nearest) from None
        first = first or found
        chosen, made = make(found)
        if made.memory_bytes <= most:
            if passed_over:
                notes.append(
                    f"{passed_over} faster plans were passed over: as programs they take more than "
                    f"the {limit / 1e9:.1f} GB usable, of which the search's own sums knew nothing"
                )
            if made.memory_bytes > limit:
                notes.append(
                    f"{made.memory_bytes / 1e9:.1f} GB are of the stage that takes most; a device "
                    f"of the smallest chips has {limit / 1e9:.1f} GB usable"
                )
            return _Fitting(chosen, made, found, first.bound_s, first.space, tuple(notes))
        smallest = min(smallest, made.memory_bytes)
        if made.pipeline and "stage" not in allowed.pinned:
            # The search's sums are of 1F1B, and the pipeline that runs keeps all micro-batches: how
            # far they miss says nothing about plans without stages.
            notes.append(
                f"pipeline stages were left out: as a program the fastest, {chosen.strategy.mesh}, "
                f"takes {made.memory_bytes / 1e9:.1f} GB of {limit / 1e9:.1f} GB usable"
            )
            allowed = dataclasses.replace(allowed, pinned={**allowed.pinned, "stage": 1})
            continue
        passed_over += 1
        share *= max(_LEAST_CUT, min(most / made.memory_bytes, _MOST_CUT))
    raise does_not_fit(program, where, smallest, most, allowed, f"of {_ROUNDS} looked at")


def _described(
    program: Program,
    where: Cluster,
    constraints: Constraints,
    calibration: Calibration | None,
    top: int,
    tie_tolerance: float,
) -> Plan:
    """The plan of a description: what can be executed of the search space, by the search's sums."""
    allowed = dataclasses.replace(
        constraints, pinned={"interleave": 1, **constraints.pinned}, uneven_shares=False
    )
    found = solve(program, where, constraints=allowed, calibration=calibration, top=max(1, top),
                  tie_tolerance=tie_tolerance)  # fmt: skip
    chosen, *others = found.best
    cuts = _cuts(program, where, chosen.strategy, calibration)
    made = described_plan(program, where, chosen, cuts)
    assert made.prediction is not None
    prediction = dataclasses.replace(
        made.prediction, gap=found.gap, search_time_s=found.search_time_s, space=found.space,
        tied=found.tied)  # fmt: skip
    return dataclasses.replace(
        made, prediction=prediction, alternatives=_alternatives(others, where, allowed)
    )


def _first_that_holds(
    traced: Trace, candidates: Sequence[Candidate], fixed: Mapping[str, PartitionSpec] | None
) -> tuple[Candidate, Layout]:
    """The fastest candidate whose mesh can hold the specs that are fixed."""
    reason: DoesNotHold | None = None
    for candidate in candidates:
        try:
            return candidate, layout(traced, candidate.strategy, fixed=fixed)
        except DoesNotHold as error:
            reason = reason or error
    raise ValueError(
        f"none of the {len(candidates)} fastest meshes holds the fixed specs ({reason}); pin the "
        "degrees that they need, as Constraints(pinned={'tensor': 2})"
    )


def _plan(
    traced: Trace,
    cluster: Cluster,
    chosen: Candidate,
    placed: Layout,
    *,
    calibration: Calibration | None,
    step: Callable[..., Any],
    **fields: Any,
) -> Plan:
    strategy = chosen.strategy
    gradients, updates = {}, {}
    if isinstance(step, TrainStep):
        spread = layout(traced, dataclasses.replace(strategy, zero=3))
        divided = {leaf.path.partition("/")[2]: spread.inputs[leaf.path]
                   for leaf in traced.inputs if leaf.role == "param"}  # fmt: skip
        whole = {path: placed.inputs[f"0/{path}".rstrip("/")] for path in divided}
        # In ZeRO-1 too: sums that stay whole would be gathered again for every micro-batch.
        gradients = divided if strategy.zero in (1, 2) else whole
        if strategy.zero in (1, 2):
            updates = {path: spec for path, spec in divided.items() if spec != whole[path]}
    return Plan(
        mesh=placed.mesh,
        specs=_parameter_specs(traced, placed),
        batch=placed.activations.get("batch", ()),
        inputs=placed.inputs,
        outputs=placed.outputs,
        activations=placed.activations,
        gradients=gradients,
        offload=strategy.offload,
        sequence_parallel=strategy.sequence_parallel and strategy.tensor > 1,
        # The compiler for TPUs overlaps gathers that it places itself with the products.
        gathers_weights=strategy.zero == 3
        and strategy.fsdp * strategy.expert > 1
        and not cluster.is_torus,
        placement=placement_of(strategy, cluster),
        updates=updates,
        remat="none" if traced.has_remat else strategy.remat,
        accumulation_steps=strategy.microbatches if strategy.stage == 1 else 1,
        pipeline=_cuts(traced.program, cluster, strategy, calibration),
        microbatches=strategy.microbatches if strategy.stage > 1 else 1,
        prediction=predicted(chosen),
        notes=placed.notes,
        program=traced.program.name,
        cluster=cluster.name,
        in_tree=traced.in_tree,
        out_tree=traced.out_tree,
        step=step,
        **fields,
    )


def _parameter_specs(traced: Trace, placed: Layout) -> dict[str, PartitionSpec]:
    """Specs of parameters by their paths within their argument.

    Two arguments may hold parameters of one path. Where they lie alike one entry serves both; where
    they do not, each keeps the position of its argument in its path.
    """
    paths: dict[str, list[str]] = {}
    for leaf in traced.inputs:
        if leaf.role == "param":
            paths.setdefault(leaf.path.partition("/")[2], []).append(leaf.path)
    found: dict[str, PartitionSpec] = {}
    for inner, whole in paths.items():
        if len({placed.inputs[path] for path in whole}) == 1:
            found[inner] = placed.inputs[whole[0]]
        else:
            found |= {path: placed.inputs[path] for path in whole}
    return found


def _cuts(
    program: Program, cluster: Cluster, strategy: Strategy, calibration: Calibration | None
) -> tuple[int, ...]:
    """Layers of every stage, the slowest stage as fast as can be."""
    if strategy.stage == 1:
        return ()
    blocks = program.blocks
    if strategy.cuts:  # of mixed chips, with what is around the layers
        is_layer = [block.checkpointed for block in blocks for _ in range(block.repeat)]
        ends = np.cumsum([0, *strategy.cuts])
        sizes = [sum(is_layer[a:b]) for a, b in itertools.pairwise(ends.tolist())]
        while min(sizes) < 1:  # a stage of the embedding alone: a mesh axis divides layers
            sizes[int(np.argmax(sizes))] -= 1
            sizes[int(np.argmin(sizes))] += 1
        return tuple(sizes)
    stacked = Strategies.stack([strategy])
    result = estimate(program, stacked, cluster, calibration=calibration)
    times = [
        float(time.total[0])
        for block, time in zip(blocks, result.blocks, strict=True)
        for _ in range(block.repeat * block.checkpointed)
    ]
    table = np.tile(np.asarray(times), (strategy.stage, 1))
    return cut_layers(table, microbatches=strategy.microbatches).sizes


def _alternatives(
    others: Sequence[Candidate], cluster: Cluster, allowed: Constraints
) -> tuple[Alternative, ...]:
    limit = cluster.memory_bytes * allowed.memory_fraction
    found = []
    for candidate in others:
        strategy = candidate.strategy
        choices = (
            f"remat {strategy.remat}, {strategy.microbatches} micro-batches, ZeRO-{strategy.zero}"
        )
        if strategy.offload != "none":
            choices += f", {strategy.offload} in the host's memory"
        found.append(
            Alternative(
                mesh=strategy.mesh,
                choices=choices,
                step_time_s=candidate.step_s,
                memory_bytes=candidate.memory_bytes,
                fits=candidate.memory_bytes <= limit or cluster.is_mixed,
            )
        )
    return tuple(found)
