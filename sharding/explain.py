"""What a plan is predicted to cost, and why it is what it is, as text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharding.compiled.hlo import Traffic

# Parts below this share are not printed.
_SMALL = 0.005


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step is predicted to cost.

    Attributes:
      step_time_s: seconds of a step.
      memory_bytes: of the fullest device.
      breakdown: seconds, term by term; they sum to `step_time_s`.
      memory_breakdown: bytes by use.
      collectives: of the whole step as it will run: kind to count and bytes; {} where only the
        strategy was costed.
      gap: distance to a proven lower bound of the search space, as a share of the step.
      search_time_s: of all rounds of the search, with the closer look at what each found; 0 if
        there was none.
      space: strategies in the space; 0 if there was no search.
      tied: of these as fast as the model can tell, the chosen one included: memory decided.
    """

    step_time_s: float
    memory_bytes: float
    breakdown: Mapping[str, float]
    memory_breakdown: Mapping[str, float]
    collectives: Mapping[str, Traffic] = field(default_factory=dict)
    gap: float = 0.0
    search_time_s: float = 0.0
    space: int = 0
    tied: int = 1


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A plan that was not chosen.

    Attributes:
      mesh: axis name to size.
      choices: its other choices, in words.
      step_time_s: predicted.
      memory_bytes: by the search's own sums, which are coarser than what is predicted of the
        chosen plan: that is followed as a program.
      fits: whether these sums are within what is usable.
    """

    mesh: Mapping[str, int]
    choices: str
    step_time_s: float
    memory_bytes: float
    fits: bool = True


def explain(plan: Any) -> str:
    """A `Plan` in words; the module of plans imports this one."""
    lines = [f"{plan.program or 'a step'} on {plan.cluster or _mesh(plan.mesh)}"]
    lines.append(f"  mesh: {_mesh(plan.mesh)}")
    if plan.prediction is not None:
        lines += _predicted(plan.prediction)
    for name, axes in plan.activations.items():
        lines.append(f"  {name} is divided over {' and '.join(axes)}")
    lines += _placed(plan.inputs)
    lines.append(f"  rematerialisation: {plan.remat}")
    if plan.offload != "none":
        lines.append(f"  in the host's memory: {plan.offload}")
    if plan.sequence_parallel:
        lines.append("  what layers hand on is divided along the sequence over tensor too")
    if plan.accumulation_steps > 1:
        lines.append(f"  gradients are accumulated over {plan.accumulation_steps} micro-batches")
    if plan.pipeline:
        layers = ", ".join(map(str, plan.pipeline))
        lines.append(f"  pipeline: {layers} layers a stage, {plan.microbatches} micro-batches")
    lines += [f"  note: {note}" for note in plan.notes]
    for other in plan.alternatives:
        lines.append(
            f"  alternative: {_mesh(other.mesh)}, {other.choices}: {other.step_time_s:.4g} s, "
            f"{_size(other.memory_bytes)} by the search's sums"
            f"{'' if other.fits else ', more than is usable'}"
        )
    return "\n".join(lines)


def _predicted(found: Prediction) -> list[str]:
    terms = sorted(found.breakdown.items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{name} {seconds / found.step_time_s:.1%}"
        for name, seconds in terms
        if seconds > _SMALL * found.step_time_s
    )
    uses = ", ".join(
        f"{name} {_size(held)}" for name, held in found.memory_breakdown.items() if held
    )
    lines = [
        f"  step: {found.step_time_s:.4g} s predicted ({shares})",
        f"  memory: {_size(found.memory_bytes)} a device predicted ({uses})",
    ]
    if found.space:
        lines.append(
            f"  within {found.gap:.2%} of the best of {found.space} strategies, "
            f"searched in {found.search_time_s:.2f} s"
        )
    if found.tied > 1:
        lines.append(f"  {found.tied} strategies are as fast as can be told: the smallest is taken")
    return lines


def _placed(inputs: Mapping[str, Any]) -> list[str]:
    """Arguments by spec: of many layers most lie alike."""
    groups: dict[str, list[str]] = {}
    for path, spec in inputs.items():
        groups.setdefault(str(spec), []).append(path)
    lines = []
    for spec, paths in groups.items():
        shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        lines.append(f"  {spec.replace('PartitionSpec', 'P')}: {shown}")
    return lines


def _mesh(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items()) or "one device"


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
