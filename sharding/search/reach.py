"""What of the search space a step can be executed with, and what it leaves out, in words."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sharding.costs.strategies import REMAT
from sharding.execution import stages
from sharding.execution.execute import TrainStep
from sharding.execution.rewrite import layer_scans
from sharding.search.space import Constraints, policies
from sharding.tracing.trace import Trace

_OPAQUE = "pass sharding.train_step(loss, optimizer)"


def within_reach(
    step: Callable[..., Any], traced: Trace, wanted: Constraints
) -> tuple[Constraints, list[str]]:
    """Constraints that keep to what can be executed for a step.

    Args:
      step: what is planned.
      traced: the same, understood.
      wanted: what the caller asks for.

    Returns:
      The constraints of the search, and what they leave out.

    Raises:
      ValueError: what is wanted cannot be executed; the message says why.
    """
    pins, notes = _pins(step, traced)
    remat, more = _policies(step, traced)
    notes += more
    offload: tuple[str, ...] = ("none",)
    if isinstance(step, TrainStep):
        offload += ("optimizer",)
        # What layers keep is moved under the names that a policy gives.
        offload += ("activations",) if set(remat) & {"dots", "projections"} else ()
    clash = {
        name: value
        for name, value in wanted.pinned.items()
        if pins.get(name, value) != value
        or (name == "remat" and value not in remat)
        or (name == "offload" and value not in offload)
    }
    if clash:
        raise ValueError(f"{clash} cannot be executed for this step: {'; '.join(notes) or remat}")
    allowed = tuple(filter(wanted.allows_remat, remat))
    if not allowed:
        raise ValueError(
            f"remat allows {wanted.remat or tuple(REMAT)}, at most {wanted.remat_at_most!r}; "
            f"this step can do {remat}"
            f"{': ' if notes else ''}{'; '.join(notes)}"
        )
    if set(wanted.offload) - set(offload):
        raise ValueError(
            f"offload {wanted.offload} reaches inside the step, which can do {offload}: "
            + (_OPAQUE if offload == ("none",) else "; ".join(notes))
        )
    narrowed = dataclasses.replace(
        wanted,
        pinned={**pins, **wanted.pinned},
        remat=allowed,
        uneven_shares=False,
        offload=wanted.offload or offload,
    )
    return narrowed, notes


def _pins(step: Callable[..., Any], traced: Trace) -> tuple[dict[str, Any], list[str]]:
    """Fields of a strategy that have one value for this step, and why."""
    if not isinstance(step, TrainStep):
        if traced.is_loss:
            why = f"accumulation and pipeline stages were out of reach: a bare loss; {_OPAQUE}"
        elif traced.program.training:
            why = (
                "rematerialisation, accumulation and pipeline stages were out of reach: the step "
                f"is opaque; {_OPAQUE}"
            )
        else:
            why = ""
        return {"interleave": 1, "stage": 1, "microbatches": 1}, [why] if why else []
    obstacle = stages.obstacle(traced)
    if obstacle:
        return {"interleave": 1, "stage": 1}, [f"pipeline stages were out of reach: {obstacle}"]
    return {"interleave": 1}, [
        "several stretches of layers a stage were out of reach: layers that are stacked in "
        "their order would move between stages in every step"
    ]


def _policies(step: Callable[..., Any], traced: Trace) -> tuple[tuple[str, ...], list[str]]:
    """Policies of rematerialisation that make a difference, and why there are no others."""
    if traced.has_remat:
        return ("full",), ["rematerialisation is the program's own, costed as full"]
    if not traced.program.training:
        return policies(traced.program), []
    if not isinstance(step, TrainStep) and not traced.is_loss:
        return ("none",), []
    scans = list(layer_scans(traced))
    if not any(found.is_rewritten for found in scans):
        where = f"its scan over layers is within a {scans[0].within[-1]}" if scans else (
            "it has no scan over stacked parameters; write its layers with sharding.layers"
        )  # fmt: skip
        return ("none",), [f"rematerialisation was out of reach: {where}"]
    found = policies(traced.program)
    if isinstance(step, TrainStep) and "projections" not in found:
        return found, [
            "rematerialisation that keeps projections was out of reach: the layers call none "
            "query, key, value or out; jax.ad_checkpoint.checkpoint_name does"
        ]
    return found, []
