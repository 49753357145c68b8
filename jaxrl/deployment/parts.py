"""Programs on machines: planned, and what they take."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sharding
from jaxrl.deployment.programs import Program
from sharding import Cluster, Constraints, Plan

USABLE = 0.92
"""Share of a chip's memory that plans may fill: a little less than `sharding.Constraints` allows,
for what an actor's programs leave to one another is known less well."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A program on its machine.

    Attributes:
      program: what runs.
      plan: how; of a shortened program where `memory_bytes` is not the plan's own.
      step_s: predicted seconds of a call.
      memory_bytes: predicted, of the fullest device.
      resident_bytes: the arguments' part of it.
    """

    program: Program
    plan: Plan
    step_s: float
    memory_bytes: float
    resident_bytes: float


class Plans:
    """Plans of programs on machines, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Part | ValueError] = {}

    def __len__(self) -> int:
        return len(self._made)

    def planned(
        self,
        program: Program,
        cluster: Cluster,
        *,
        pinned: Mapping[str, int] | None = None,
        memory: float = USABLE,
    ) -> Part:
        """As `planned`, of a program whose step was planned so before: that plan, or that error."""
        key = program.step, cluster.name, tuple(sorted((pinned or {}).items())), memory
        if key not in self._made:
            try:
                self._made[key] = planned(program, cluster, pinned=pinned, memory=memory)
            except ValueError as error:
                self._made[key] = error
        made = self._made[key]
        if isinstance(made, ValueError):
            raise made
        return replace(made, program=program)  # which knows how often it is called


def planned(
    program: Program,
    cluster: Cluster,
    *,
    pinned: Mapping[str, int] | None = None,
    memory: float = USABLE,
) -> Part:
    """The best plan of one program.

    Args:
      program: what is planned.
      cluster: for which machine.
      pinned: degrees of parallelism that are given.
      memory: share of the device's memory that it may fill.

    Raises:
      sharding.DoesNotFit: nothing fits.
      ValueError: nothing keeps to what is pinned.
    """
    plan = sharding.plan(
        program.step, program.args, cluster=cluster, state=program.state, data=program.data,
        donate=program.donate,
        constraints=Constraints(pinned=dict(pinned or {}), memory_fraction=memory),
    )  # fmt: skip
    assert plan.prediction is not None
    return Part(
        program=program,
        plan=plan,
        # A loop on the device is started once, and not by the host at every turn.
        step_s=plan.step_time_s - (plan.breakdown.get("host", 0.0) if program.on_device else 0.0),
        memory_bytes=plan.memory_bytes,
        resident_bytes=plan.prediction.memory_breakdown["arguments"],
    )
