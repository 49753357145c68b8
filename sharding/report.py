"""Strategies and searches as JSON and as text."""

from typing import Any

import numpy as np

from sharding.compiled.compile_check import Report
from sharding.compiled.hlo import Traffic
from sharding.costs.cost import estimate
from sharding.costs.strategies import Strategies, Strategy
from sharding.machines.topology import Cluster
from sharding.programs.program import Program
from sharding.search.pipeline import Cuts, cut_layers
from sharding.search.solver import Candidate, Solution

# Terms below this share of the step are not printed.
_SMALL = 0.005


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """One strategy and its prediction."""
    strategy = candidate.strategy
    return {
        "mesh": strategy.mesh or {"data": 1},
        "microbatches": strategy.microbatches,
        "interleave": strategy.interleave,
        "zero": strategy.zero,
        "remat": strategy.remat,
        "offload": strategy.offload,
        "executed": strategy.interleave == 1 and not strategy.shares,
        **({"cuts": strategy.cuts} if strategy.cuts else {}),
        **({"shares": strategy.shares} if strategy.shares else {}),
        "step_time_s": candidate.step_s,
        "memory_bytes": round(candidate.memory_bytes),
        "breakdown": {n: s for n, s in candidate.terms.items() if s},
        "memory_breakdown": {n: round(b) for n, b in candidate.memory_terms.items()},
    }


def solution_json(
    program: Program, cluster: Cluster, solution: Solution, *, stages: Cuts | None = None
) -> dict[str, Any]:
    """What `python -m sharding plan --json` prints."""
    best = solution.best[0]
    return {
        "model": program.name,
        "cluster": cluster.name,
        "devices": cluster.device_count,
        **candidate_json(best),
        "stage_layers": list(stages.sizes) if stages else None,
        "model_flops_utilisation": utilisation(program, cluster, best),
        "bound_s": solution.bound_s,
        "gap": solution.gap,
        "search_time_s": solution.search_time_s,
        "space": solution.space,
        "costed": solution.costed,
        "tied": solution.tied,
        "alternatives": [candidate_json(c) for c in solution.best[1:]],
        "warnings": list(cluster.warnings),
    }


def check_json(checked: Report) -> dict[str, Any]:
    """Predicted against compiled; bytes are of a device."""
    return {
        "predicted_bytes": checked.predicted_bytes,
        "compiled_bytes": checked.peak_bytes,
        "memory_error": checked.memory_error,
        "collective_error": checked.collective_error,
        "collectives": {
            kind: {
                "compiled_bytes": traffic.bytes,
                "predicted_bytes": checked.predicted_collectives.get(kind, Traffic(0, 0)).bytes,
            }
            for kind, traffic in checked.collectives.items()
        },
        "compile_s": checked.compile_s,
    }


def utilisation(program: Program, cluster: Cluster, candidate: Candidate) -> float:
    """Model FLOPs of the step over what the chips could do in its time, without recomputation."""
    passes = 3 if program.training else 1
    peak = cluster.chip.peak_flops["bf16"] * cluster.chip_count
    if cluster.nodes:
        peak = sum(node.chip.peak_flops["bf16"] * node.count for node in cluster.nodes)
    return passes * program.forward_flops / (candidate.step_s * peak)


def stage_cuts(program: Program, cluster: Cluster, strategy: Strategy) -> Cuts | None:
    """The best cuts of a strategy's pipeline; None without one, or with several stretches a stage.

    Layers are the repetitions of all blocks in order, the ends of the model included.
    """
    if strategy.stage == 1 or strategy.interleave > 1:
        return None
    if cluster.is_mixed:  # the search has cut them
        boundaries = (0, *np.cumsum(strategy.cuts).tolist())
        return Cuts(boundaries=boundaries, step_s=float("nan"))
    result = estimate(program, Strategies.stack([strategy]), cluster)
    times = [
        float(time.total[0])
        for block, time in zip(program.blocks, result.blocks, strict=True)
        for _ in range(block.repeat)
    ]
    return cut_layers(
        np.tile(np.asarray(times), (strategy.stage, 1)), microbatches=strategy.microbatches
    )


def candidate_text(candidate: Candidate) -> str:
    """One strategy, its time and memory, term by term."""
    strategy = candidate.strategy
    mesh, choices = _divided(strategy), _choices(strategy)
    time = ", ".join(
        f"{name} {seconds / candidate.step_s:.1%}"
        for name, seconds in sorted(candidate.terms.items(), key=lambda item: -item[1])
        if seconds > _SMALL * candidate.step_s
    )
    uses = dict(candidate.memory_terms)
    away = uses.pop("host", 0.0)
    memory = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in uses.items() if size)
    if away:
        memory += f"; {away / 1e9:.2f} GB a device in the host's memory"
    return (
        f"{mesh}; {', '.join(choices)}\n"
        f"  step {candidate.step_s:.4g} s: {time}\n"
        f"  memory {candidate.memory_bytes / 1e9:.2f} GB a device: {memory}"
    )


def simulation_text(program: Program, cluster: Cluster, candidate: Candidate) -> str:
    """One strategy of a program on a cluster, with its share of the peak and all warnings."""
    lines = [
        *(f"warning: {warning}" for warning in cluster.warnings),
        f"{program.name} on {cluster.name} ({cluster.device_count} devices)",
        candidate_text(candidate),
        f"  {utilisation(program, cluster, candidate):.1%} of the chips' bf16 peak, recomputation "
        "not counted",
    ]
    if candidate.strategy.interleave > 1 or candidate.strategy.shares:
        lines.append(
            "  costed for schedules that other software has: plan.apply runs one stretch a stage "
            "and even shares (--pin interleave=1)"
        )
    return "\n".join(lines)


def _divided(strategy: Strategy) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in strategy.mesh.items()) or "one device"


def _choices(strategy: Strategy) -> list[str]:
    """What a strategy chooses beside its mesh, in words."""
    choices = [f"remat {strategy.remat}", f"micro-batches {strategy.microbatches}"]
    if strategy.fsdp > 1:
        choices.append(f"ZeRO-{strategy.zero}")
    if strategy.interleave > 1:
        choices.append(f"{strategy.interleave} stretches a stage")
    if strategy.cuts:
        choices.append(f"layers of the stages {list(strategy.cuts)}")
    if strategy.shares:
        choices.append(f"samples of the replicas {list(strategy.shares)}")
    if strategy.offload != "none":
        choices.append(f"{strategy.offload} in host memory")
    return choices


def solution_text(program: Program, cluster: Cluster, solution: Solution) -> str:
    """The best strategy with its proof, and the alternatives."""
    best = solution.best[0]
    lines = [
        simulation_text(program, cluster, best),
        f"  within {solution.gap:.2%} of the best of {solution.space} strategies "
        f"({solution.costed} costed in {solution.search_time_s:.2f} s)",
    ]
    if solution.tied > 1:
        lines.append(
            f"  {solution.tied} strategies are as fast as can be told: the smallest is taken"
        )
    others = [
        (f"{other.step_s:.4g} s", f"{other.step_s / best.step_s - 1:+.1%}",
         f"{other.memory_bytes / 1e9:.1f} GB", _divided(other.strategy),
         ", ".join(_choices(other.strategy)))
        for other in solution.best[1:]
    ]  # fmt: skip
    if others:
        lines.append("the fastest with other meshes:")
        widths = [max(map(len, column)) for column in zip(*others, strict=True)]
        for *numbers, mesh, choices in others:
            cells = [f"{n:>{w}}" for n, w in zip(numbers, widths, strict=False)]
            lines.append(f"  {'  '.join(cells)}  {mesh:<{widths[-2]}}  {choices}")
    return "\n".join(lines)
