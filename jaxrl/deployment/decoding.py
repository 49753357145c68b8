"""Decoding on a machine: every way to divide it, planned with few layers.

Layers stand apart in a decoding program, so that eighty of them take eighty times as long to trace
as one. Time and memory grow by the same with every layer: two programs of few layers say what all
layers take.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from jaxrl.deployment.parts import Part, Plans, planned
from jaxrl.deployment.programs import Program, Written, generation_programs
from jaxrl.deployment.workload import Workload
from jaxrl.models import DecoderConfig
from sharding import Cluster, DoesNotFit, Plan

_AXES = ("data", "fsdp", "tensor", "expert", "context")
_RETRIES = 3  # with less memory for few layers, where all layers take more than there is


class Decoding:
    """The decoding program of a workload, planned on machines."""

    def __init__(self, workload: Workload, plans: Plans, written: Written) -> None:
        """Nothing is planned yet.

        Args:
          workload: what is run.
          plans: that are kept, of all programs.
          written: programs that are kept.
        """
        self._workload, self._plans, self._written = workload, plans, written

    def planned(self, cluster: Cluster, prompts: int, memory: float) -> Part:
        """Decoding as it is fastest, of all ways that fit.

        Heads of keys are the most ways in which caches can be divided beside the batch: beyond
        them every device would hold whole ones.

        Args:
          cluster: the machine.
          prompts: that are decoded at once.
          memory: share of a device's memory that it may fill.

        Raises:
          sharding.DoesNotFit: no way fits; of the one that lacks least.
          ValueError: nothing divides it.
        """
        program = self._program(self._workload, prompts)
        limit, most = cluster.memory_bytes * memory, self._workload.policy.kv_heads
        found: list[Part] = []
        lacking: list[DoesNotFit] = []
        free = self._few_layers(program, cluster, prompts, memory, {})
        if free.plan.mesh.get("tensor", 1) <= most:
            found.append(self._all_layers(program, cluster, prompts, memory, free))
            if found[0].memory_bytes <= limit:
                return found[0]
        for tensor in (2**i for i in range(most.bit_length())):
            if tensor <= most and cluster.device_count % tensor == 0:
                try:
                    found.append(self._smaller(program, cluster, prompts, memory, tensor))
                except DoesNotFit as error:
                    lacking.append(error)
                except ValueError:  # nothing that the model has divides so
                    continue
        if not found and lacking:
            raise min(lacking, key=lambda error: error.shortfall_bytes)
        if not found:
            raise ValueError(
                f"nothing divides decoding of {prompts} prompts over the {cluster.device_count} "
                f"devices of {cluster.name}, heads into no more than the {most} of the keys"
            )
        fitting = [part for part in found if part.memory_bytes <= limit]
        if fitting:
            return min(fitting, key=lambda part: part.step_s)
        least = min(part.memory_bytes for part in found)
        raise DoesNotFit(
            f"decoding {prompts} prompts on {cluster.name} needs {least / 1e9:.1f} GB a device of "
            f"{limit / 1e9:.1f} GB that the other models leave, however it is divided",
            least,
            limit,
        )

    def _smaller(
        self, program: Program, cluster: Cluster, prompts: int, memory: float, tensor: int
    ) -> Part:
        """Decoding with heads divided so many ways: what fits, or else the smallest that was tried.

        Few layers may fit where all do not. Then few are planned again in what leaves every layer
        its part of the memory, beside what layers share: less than they took, and enough for every
        division that fits and whose layers share no more.

        Raises:
          sharding.DoesNotFit: not even few layers fit.
          ValueError: nothing divides it so.
        """
        limit, share = cluster.memory_bytes * memory, memory
        smallest: Part | None = None
        for _ in range(1 + _RETRIES):
            try:
                few = self._few_layers(program, cluster, prompts, share, {"tensor": tensor})
                part = self._all_layers(program, cluster, prompts, share, few)
            except DoesNotFit:
                if smallest is None:
                    raise
                break
            if smallest is None or part.memory_bytes < smallest.memory_bytes:
                smallest = part
            if part is few or part.memory_bytes <= limit:
                break
            layers, (longer, _) = self._workload.policy.layers, self._layers()
            each = (part.memory_bytes - few.memory_bytes) / (layers - longer)
            shared = max(0.0, few.memory_bytes - longer * each)
            share = (shared + (limit - shared) * longer / layers) / cluster.memory_bytes
        assert smallest is not None
        return smallest

    def _few_layers(
        self,
        program: Program,
        cluster: Cluster,
        prompts: int,
        memory: float,
        pinned: Mapping[str, int],
    ) -> Part:
        """Decoding planned with few layers, which stand apart; with all where these are few."""
        longer, _ = self._layers()
        if longer < self._workload.policy.layers:
            program = self._shortened(longer, prompts)
        return self._plans.planned(program, cluster, pinned=pinned, memory=memory)

    def _all_layers(
        self, program: Program, cluster: Cluster, prompts: int, memory: float, few: Part
    ) -> Part:
        """Decoding as it is planned with few layers, drawn out to all of them."""
        layers, (longer, shorter) = self._workload.policy.layers, self._layers()
        if few.program is program:
            return few
        short = self._shortened(shorter, prompts)
        fewer = _divided_alike(
            few.plan,
            lambda pins: self._plans.planned(short, cluster, pinned=pins, memory=memory),
        )

        def drawn(name: str) -> float:
            first, second = getattr(fewer, name), getattr(few, name)
            return second + (second - first) * (layers - longer) / (longer - shorter)

        names = ("step_s", "memory_bytes", "resident_bytes")
        return Part(program=program, plan=few.plan, **{name: drawn(name) for name in names})

    def _layers(self) -> tuple[int, int]:
        """How many layers decoding is planned with, and again with."""
        few = 2 * _period(self._workload.policy)
        return 2 * few, few

    def _shortened(self, layers: int, prompts: int) -> Program:
        policy = self._workload.policy
        short = replace(policy, layers=layers, windows=policy.windows[:layers])
        return self._program(replace(self._workload, policy=short), prompts)

    def _program(self, workload: Workload, prompts: int) -> Program:
        programs = self._written.get(generation_programs, workload, prompts)
        return next(p for p in programs if p.name == "decode")


def full_decode(part: Part, cluster: Cluster) -> Part:
    """Decoding with all its layers, divided as it was planned with a few."""
    if part.plan.args == part.program.args:
        return part
    return _divided_alike(part.plan, lambda pins: planned(part.program, cluster, pinned=pins))


def _divided_alike(plan: Plan, make: Callable[[Mapping[str, int]], Part]) -> Part:
    """Decoding with another number of layers, divided as a plan divides it.

    Where experts are divided and nothing else is, the mesh leaves open whether the rest is whole or
    gathered from their axis (ZeRO 0 or 3): layers that both have then say which it is.

    Args:
      plan: with its own number of layers.
      make: what plans with the other, given pins.
    """
    mesh = {axis: plan.mesh.get(axis, 1) for axis in _AXES}
    made = make(mesh)
    if mesh["expert"] == 1 or mesh["fsdp"] > 1 or _lies_alike(plan, made.plan):
        return made
    for stage in (3, 0):
        with contextlib.suppress(DoesNotFit):  # where it does not, the plan is not divided so
            other = make({**mesh, "zero": stage})
            if _lies_alike(plan, other.plan):
                return other
    return made


def _lies_alike(one: Plan, other: Plan) -> bool:
    """Whether all arguments that both have lie alike."""
    return all(one.inputs.get(path, spec) == spec for path, spec in other.inputs.items())


def _period(config: DecoderConfig) -> int:
    """After how many layers the windows repeat."""
    windows = config.windows
    return next(
        (
            n
            for n in range(1, len(windows))
            if all(w == windows[i % n] for i, w in enumerate(windows))
        ),
        1,
    )
