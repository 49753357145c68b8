"""Plans every program of a run for machines that are not there, and asks their compilers.

Each program is compiled in a process of its own by `Plan.check`; that needs the extra `aot`.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from jaxrl.deployment.division import (
    DEVICE_TRAFFIC,
    Division,
    NothingFits,
    Part,
    Planner,
    divide,
    planned,
)
from jaxrl.deployment.machines import half_and_half
from jaxrl.deployment.programs import Program
from jaxrl.deployment.workload import Workload
from kernels import sparse_delta
from sharding import Cluster, Plan, leaf_path
from sharding.compile_check import Report

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One program of the run.

    Attributes:
      part: the program with its plan.
      machine: where it runs.
      others_bytes: of other models that lie on the same devices meanwhile.
      report: what the compiler said; None where it was not asked.
      error: why it could not be asked; None where all went well.
    """

    part: Part
    machine: Cluster
    others_bytes: float = 0.0
    report: Report | None = None
    error: str | None = None

    @property
    def needed_bytes(self) -> float:
        """A device's memory, by the compiler where it was asked, with the other models."""
        own = self.part.memory_bytes if self.report is None else float(self.report.peak_bytes)
        return own + self.others_bytes

    @property
    def shortfall_bytes(self) -> float:
        """What the fullest device lacks; negative where there is room."""
        return self.needed_bytes - self.machine.memory_bytes

    def to_json(self) -> dict[str, Any]:
        report = None
        if self.report is not None:
            report = {
                "peak_bytes": self.report.peak_bytes,
                "compile_s": round(self.report.compile_s, 1),
                "collectives": {
                    kind: dataclasses.asdict(t) for kind, t in self.report.collectives.items()
                },
            }
        return {
            "program": self.part.program.name,
            "side": self.part.program.side,
            "machine": self.machine.name,
            "mesh": dict(self.part.plan.mesh),
            "calls": self.part.program.calls,
            "predicted_s": self.part.step_s,
            "predicted_bytes": round(self.part.memory_bytes),
            "others_bytes": round(self.others_bytes),
            "compiled": report,
            "error": self.error,
        }


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would need and do.

    Attributes:
      workload: what is run.
      cluster: name of the machines.
      best: how they are divided.
      half: the best division of the cut through the middle; None where the parts were given,
        or where nothing fits it.
      rows: the programs.
    """

    workload: Workload
    cluster: str
    best: Division
    half: Division | None
    rows: tuple[Row, ...]

    @property
    def shortfall_bytes(self) -> float:
        """What the fullest device lacks; negative where everything fits."""
        return max(row.shortfall_bytes for row in self.rows)

    @property
    def fits(self) -> bool:
        return self.shortfall_bytes <= 0

    @property
    def compiled(self) -> bool:
        return all(row.report is not None for row in self.rows)

    def to_json(self) -> str:
        def described(division: Division | None) -> dict[str, Any] | None:
            if division is None:
                return None
            names = (
                "actors", "prompts", "codec", "update_s", "generation_s", "transfer_s", "pause_s",
                "step_s", "staleness", "tokens_per_s", "limit",
            )  # fmt: skip
            found = {name: getattr(division, name) for name in names}
            return found | {"learner": division.learner.name, "actor": division.actor.name}

        return json.dumps({
            "cluster": self.cluster,
            "workload": self.workload.summary().splitlines(),
            "division": described(self.best),
            "half_and_half": described(self.half),
            "fits": self.fits,
            "shortfall_bytes": round(self.shortfall_bytes),
            "programs": [row.to_json() for row in self.rows],
        }, indent=1)  # fmt: skip


def dry_run(
    workload: Workload,
    cluster: Cluster,
    actors: Cluster | None = None,
    *,
    compiles: bool = True,
    max_staleness: int = 8,
    told: Callable[[str], None] = lambda line: None,
) -> DryRun:
    """Divides the chips, plans every program on its part, and compiles it.

    Args:
      workload: what is run.
      cluster: all chips; the learner's where `actors` is given.
      actors: the actors' machines, where they are others.
      compiles: whether to ask the compilers; without, memory is the planner's.
      max_staleness: versions by which a rollout may be old.
      told: is called with a line as the work proceeds.

    Raises:
      NothingFits: no division fits.
    """
    planner = Planner(workload)
    told("dividing the chips between learner and actors")
    best, _ = divide(workload, cluster, actors, max_staleness=max_staleness, planner=planner)
    half = None
    if actors is None:
        try:
            half, _ = planner.divide([half_and_half(cluster)], max_staleness=max_staleness)
        except NothingFits as error:
            _log.info("half and half: %s", error)
    name = cluster.name if actors is None else f"{cluster.name} + {actors.name}"
    rows = []
    for row in _rows(best):
        if compiles:
            told(f"compiling {row.part.program.name} for {row.machine.name}")
            row = compiled(row)
        rows.append(row)
    return DryRun(workload=workload, cluster=name, best=best, half=half, rows=tuple(rows))


def _rows(division: Division) -> Iterator[Row]:
    """Every program with all its layers, and what else lies beside it."""
    resident: dict[str, float] = {}
    for part in division.parts[1:]:
        key = part.program.parameters
        resident[key] = max(resident.get(key, 0.0), part.resident_bytes)
    for part in division.parts:
        learner = part.program.side == "learner"
        others = 0.0
        if not learner:
            others = sum(b for key, b in resident.items() if key != part.program.parameters)
        machine = division.learner if learner else division.actor
        if part.program.name == "decode":
            # The search had planned it with a few layers only.
            axes = ("tensor", "expert")
            pins = {axis: part.plan.mesh.get(axis, 1) for axis in axes}
            part = planned(part.program, machine, pinned=pins)
        yield Row(part=part, machine=machine, others_bytes=others)
    yield Row(part=delta_part(division), machine=division.learner)


def compiled(row: Row, *, timeout_s: float = 1800.0) -> Row:
    """The row with what the compiler says, or with why it says nothing."""
    try:
        report = row.part.plan.check(donate=row.part.program.donate, timeout_s=timeout_s)
    except (RuntimeError, OSError, TimeoutError) as error:
        return dataclasses.replace(row, error=str(error))
    return dataclasses.replace(row, report=report)


def delta_part(division: Division) -> Part:
    """The device half of encoding an update, on the shards of the learner's parameters."""
    update = division.parts[0]
    mesh = AbstractMesh(tuple(update.plan.mesh.values()), tuple(update.plan.mesh))
    params = update.program.args[0].params["policy"]
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    paths = jax.tree_util.tree_leaves_with_path(weights)
    specs = {leaf_path(path): update.plan.inputs[f"0/params/policy/{leaf_path(path)}"]
             for path, _ in paths}  # fmt: skip
    lies = jax.tree.unflatten(
        jax.tree.structure(weights), [NamedSharding(mesh, specs[leaf_path(p)]) for p, _ in paths]
    )
    backend = "tpu" if division.learner.is_torus else "gpu"

    def delta(old, new):
        return sparse_delta.diff(old, new, shardings=lies, backend=backend).records

    shard = sum(
        2.0 * math.prod(sharding.shard_shape(x.shape))
        for sharding, x in zip(jax.tree.leaves(lies), jax.tree.leaves(weights), strict=True)
    )
    program = Program(
        name="delta encode", side="learner", step=delta, args=(weights, weights), parameters="bf16"
    )
    plan = Plan(
        mesh=update.plan.mesh,
        inputs={f"{i}/{path}": spec for i in (0, 1) for path, spec in specs.items()},
        placement=update.plan.placement,
        program="delta encode", cluster=division.learner.name,
        step=delta, args=program.args, where=division.learner,
    )  # fmt: skip
    seconds = DEVICE_TRAFFIC * shard / division.learner.chip.hbm_bytes_per_s
    return Part(
        program=program,
        plan=plan,
        step_s=seconds,
        memory_bytes=DEVICE_TRAFFIC * shard,
        resident_bytes=0.0,
    )
