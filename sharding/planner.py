"""`plan`: from a step and a cluster to a plan."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from sharding.costs.constants import Calibration
from sharding.costs.cost import estimate
from sharding.costs.strategies import Strategies, Strategy
from sharding.execution import stages
from sharding.execution.execute import TrainStep
from sharding.execution.specs import Layout, layout
from sharding.execution.step_trace import trace_step
from sharding.explain import Alternative
from sharding.machines.topology import Cluster
from sharding.plan import Plan
from sharding.search.candidate import TIE_TOLERANCE
from sharding.search.pipeline import cut_layers
from sharding.search.solver import Candidate, Solution, solve
from sharding.search.space import Constraints, DoesNotFit, policies
from sharding.simulation import (
    find_cluster,
    placement_of,
    predicted,
    returned,
    with_footprint,
    without_rule,
)
from sharding.tracing.trace import Trace

# Strategies that are tried, fastest first, when specs are fixed and some cannot hold them.
_TRIED = 64
# The search may use this much more memory than there is, until its choice is looked at closely;
# that many times, between these steps.
_HOPE = 1.25
_ROUNDS = 8
_LEAST_CUT, _MOST_CUT = 0.5, 0.97


def plan(
    step: Callable[..., Any],
    args: Sequence[Any],
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

    Args:
      step: a function that `jax.jit` takes, or what `train_step` returns, whose inside the plan
        may change too.
      args: its arguments, a sequence of pytrees of arrays or `jax.ShapeDtypeStruct`s.
      cluster: a name ("v5p:4x4x8", "h100:8x8"), a JSON file, JAX devices, or a `Cluster`.
      fixed: path of an argument to the spec that it must have, for programs that share
        parameters; the position of the argument may be left out of the path.
      constraints: what the search has to keep to.
      state: positions of arguments that are state (parameters, optimiser); inferred when None.
      data: positions of arguments whose leading axis is the batch; inferred when None.
      donate: positions of arguments whose memory results may take; the state that comes back
        when None.
      calibration: constants of the cost model; the shipped ones when None.
      top: how many plans to list, the chosen one included.
      tie_tolerance: predicted times that differ by less than this share are not told apart, and
        the plan that takes less memory is chosen; 0 for the fastest whatever it takes.

    Raises:
      ValueError: nothing divides the step, nothing fits (the message names the smallest
        overshoot and what would fix it), or nothing keeps to the constraints.
    """
    where = find_cluster(cluster)
    traced = trace_step(step, args, state=state, data=data)
    allowed, notes = _within_reach(step, traced, constraints or Constraints())
    if where.is_mixed:
        notes.append("uneven shares of the batch were out of reach: arrays are divided evenly")
    began = time.perf_counter()
    found, made = _fitting(
        step, args, traced, where, allowed, fixed,
        calibration=calibration,
        top=max(top, _TRIED if fixed else 1),
        tie_tolerance=tie_tolerance,
        notes=(*where.warnings, *notes),
        state=None if state is None else tuple(state),
        data=None if data is None else tuple(data),
        donate=returned(args, traced) if donate is None else tuple(donate),
    )  # fmt: skip
    spent_s = time.perf_counter() - began
    prediction = dataclasses.replace(
        made.prediction,
        gap=max(0.0, 1 - found.bound_s / made.prediction.step_time_s),
        search_time_s=spent_s,
        space=found.space,
        tied=found.tied,
    )
    others = [c for c in found.best if c.step_s != prediction.step_time_s][: max(0, top - 1)]
    return dataclasses.replace(
        made, prediction=prediction, alternatives=tuple(map(_alternative, others))
    )


def _fitting(
    step: Callable[..., Any],
    args: Sequence[Any],
    traced: Trace,
    where: Cluster,
    allowed: Constraints,
    fixed: Mapping[str, PartitionSpec] | None,
    *,
    calibration: Calibration | None,
    top: int,
    tie_tolerance: float,
    **fields: Any,
) -> tuple[Solution, Any]:
    """The best plan that fits as the program that will run.

    The search's own sums decide what is looked at. They start with more memory than there is,
    for they may be too careful, and get less by as much as they turn out too hopeful.
    """
    limit = where.memory_bytes * allowed.memory_fraction
    # The stages of a mixed cluster have memories of their own, which the search looks at.
    share = allowed.memory_fraction * (1.0 if where.is_mixed else _HOPE)
    smallest = float("inf")
    for _ in range(_ROUNDS):
        found = solve(
            traced.program, where, constraints=dataclasses.replace(allowed, memory_fraction=share),
            calibration=calibration, top=top, tie_tolerance=tie_tolerance)  # fmt: skip
        chosen, placed = _first_that_holds(traced, found.best, fixed)
        made = _plan(
            traced, where, chosen.strategy, placed, prediction=predicted(chosen), step=step,
            args=tuple(jax.eval_shape(lambda *a: a, *args)), where=where,
            calibration=calibration, **fields)  # fmt: skip
        made = with_footprint(made)
        if where.is_mixed or made.memory_bytes <= limit:
            return found, made
        smallest = min(smallest, made.memory_bytes)
        if made.pipeline and "stage" not in allowed.pinned:
            # The search's sums are of 1F1B, and the pipeline that runs keeps all micro-batches: how
            # far they miss says nothing about plans without stages.
            allowed = dataclasses.replace(allowed, pinned={**allowed.pinned, "stage": 1})
            continue
        share *= max(_LEAST_CUT, min(limit / made.memory_bytes, _MOST_CUT))
    raise DoesNotFit(
        f"no plan of {traced.program.name} was found that fits {where.name}: the smallest of "
        f"{_ROUNDS} needs {smallest / 1e9:.1f} GB a device of {limit / 1e9:.1f} GB usable; take "
        f"about {smallest / limit:.1f} times the devices, chips with more memory, or a smaller "
        "batch",
        smallest,
        limit,
    )


def _within_reach(
    step: Callable[..., Any], traced: Trace, wanted: Constraints
) -> tuple[Constraints, list[str]]:
    """Constraints that keep to what can be executed, and what they leave out, in words."""
    reach: dict[str, Any] = {"interleave": 1}
    remat, offload = policies(traced.program), ("none",)
    notes = without_rule(traced)
    if isinstance(step, TrainStep):
        obstacle = stages.obstacle(traced)
        if obstacle:
            reach["stage"] = 1
            notes.append(f"pipeline stages were out of reach: {obstacle}")
        else:
            notes.append(
                "several stretches of layers a stage were out of reach: layers that are stacked in "
                "their order would move between stages in every step"
            )
        if "projections" not in remat:
            notes.append(
                "rematerialisation that keeps projections was out of reach: the layers call none "
                "query, key, value or out; jax.ad_checkpoint.checkpoint_name does"
            )
        offload = ("none", "optimizer", "activations")
    else:
        reach |= {"stage": 1, "microbatches": 1}
        if traced.is_loss:
            notes.append(
                "accumulation and pipeline stages were out of reach: a bare loss; "
                "pass sharding.train_step(loss, optimizer)"
            )
        elif traced.program.training:
            remat = ("none",)
            notes.append(
                "rematerialisation, accumulation and pipeline stages were out of reach: the step "
                "is opaque; pass sharding.train_step(loss, optimizer)"
            )
    if traced.has_remat:
        remat = ("full",)
        notes.append("rematerialisation is the program's own, costed as full")
    clash = {
        name: value
        for name, value in wanted.pinned.items()
        if reach.get(name, value) != value
        or (name == "remat" and value not in remat)
        or (name == "offload" and value not in offload)
    }
    if clash:
        raise ValueError(f"{clash} cannot be executed for this step: {'; '.join(notes) or remat}")
    allowed = tuple(r for r in remat if not wanted.remat or r in wanted.remat)
    if not allowed:
        raise ValueError(f"remat allows {wanted.remat}, this step can do {remat}")
    if set(wanted.offload) - set(offload):
        raise ValueError(
            f"offload {wanted.offload} reaches inside the step, which can do {offload}: pass "
            "sharding.train_step(loss, optimizer)"
        )
    narrowed = dataclasses.replace(
        wanted,
        pinned={**reach, **wanted.pinned},
        remat=allowed,
        uneven_shares=False,
        offload=wanted.offload or offload,
    )
    return narrowed, notes


def _first_that_holds(
    traced: Trace, candidates: Sequence[Candidate], fixed: Mapping[str, PartitionSpec] | None
) -> tuple[Candidate, Layout]:
    """The fastest candidate whose mesh can hold the specs that are fixed."""
    reason: ValueError | None = None
    for candidate in candidates:
        try:
            return candidate, layout(traced, candidate.strategy, fixed=fixed)
        except ValueError as error:
            reason = reason or error
    raise ValueError(
        f"none of the {len(candidates)} fastest meshes holds the fixed specs ({reason}); pin the "
        "degrees that they need, as Constraints(pinned={'tensor': 2})"
    )


def _plan(
    traced: Trace,
    cluster: Cluster,
    strategy: Strategy,
    placed: Layout,
    *,
    calibration: Calibration | None,
    notes: Sequence[str],
    step: Callable[..., Any],
    **fields: Any,
) -> Plan:
    own = [leaf for leaf in traced.inputs if leaf.role == "param" and "/" in leaf.path]
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
        specs={leaf.path.partition("/")[2]: placed.inputs[leaf.path] for leaf in own},
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
        pipeline=_cuts(traced, cluster, strategy, calibration),
        microbatches=strategy.microbatches if strategy.stage > 1 else 1,
        notes=(*notes, *placed.notes),
        program=traced.program.name,
        cluster=cluster.name,
        in_tree=traced.in_tree,
        out_tree=traced.out_tree,
        step=step,
        **fields,
    )


def _cuts(
    traced: Trace, cluster: Cluster, strategy: Strategy, calibration: Calibration | None
) -> tuple[int, ...]:
    """Layers of every stage, the slowest stage as fast as can be."""
    if strategy.stage == 1:
        return ()
    blocks = traced.program.blocks
    if strategy.cuts:  # of mixed chips, with what is around the layers
        is_layer = [block.checkpointed for block in blocks for _ in range(block.repeat)]
        ends = np.cumsum([0, *strategy.cuts])
        sizes = [sum(is_layer[a:b]) for a, b in itertools.pairwise(ends.tolist())]
        while min(sizes) < 1:  # a stage of the embedding alone: a mesh axis divides layers
            sizes[int(np.argmax(sizes))] -= 1
            sizes[int(np.argmin(sizes))] += 1
        return tuple(sizes)
    stacked = Strategies.stack([strategy])
    result = estimate(traced.program, stacked, cluster, calibration=calibration)
    times = [
        float(time.total[0])
        for block, time in zip(traced.program.blocks, result.blocks, strict=True)
        for _ in range(block.repeat * block.checkpointed)
    ]
    table = np.tile(np.asarray(times), (strategy.stage, 1))
    return cut_layers(table, microbatches=strategy.microbatches).sizes


def _alternative(candidate: Candidate) -> Alternative:
    strategy = candidate.strategy
    choices = f"remat {strategy.remat}, {strategy.microbatches} micro-batches, ZeRO-{strategy.zero}"
    if strategy.offload != "none":
        choices += f", {strategy.offload} in the host's memory"
    return Alternative(
        mesh=strategy.mesh,
        choices=choices,
        step_time_s=candidate.step_s,
        memory_bytes=candidate.memory_bytes,
    )
