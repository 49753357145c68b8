"""Plans every program of a run for machines that are not there, and asks their compilers.

Each program is compiled in a process of its own by `Plan.check`; that needs the extra `aot`.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl.deployment import deltas
from jaxrl.deployment.decoding import full_decode
from jaxrl.deployment.division import Division
from jaxrl.deployment.machines import half_and_half
from jaxrl.deployment.parts import Part
from jaxrl.deployment.search import NothingFits, Planner, divide, resident_bytes
from jaxrl.deployment.workload import Workload
from jaxrl.models.compiling import training_options
from jaxrl.sync import Link
from sharding import Cluster
from sharding.compiled.compile_check import Report

_log = logging.getLogger(__name__)
_ATTEMPTS = 3  # divisions that are compiled, should the first not fit
_WORTH_SAYING = 0.05  # share of the weights


@dataclass(frozen=True, kw_only=True)
class Compiling:
    """How compilers are asked.

    Attributes:
      answers: folder that keeps what they said, so that no program is compiled twice, or again
        when an interrupted dry run is started once more; None keeps nothing.
      timeout_s: of one compilation.
    """

    answers: Path | None = None
    timeout_s: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One program of the run.

    Attributes:
      part: the program with its plan.
      machine: where it runs.
      others_bytes: of what else lies on the same devices meanwhile.
      report: what the compiler said; None where it was not asked.
      error: why it said nothing; None where all went well.
    """

    part: Part
    machine: Cluster
    others_bytes: float = 0.0
    report: Report | None = None
    error: str | None = None

    @property
    def needed_bytes(self) -> float:
        """A device's memory, by the compiler where it was asked, with what else lies there."""
        own = self.part.memory_bytes if self.report is None else float(self.report.peak_bytes)
        return own + self.others_bytes

    @property
    def shortfall_bytes(self) -> float:
        """What the fullest device lacks; negative where there is room."""
        return self.needed_bytes - self.machine.memory_bytes

    @property
    def options(self) -> Mapping[str, str] | None:
        """Of the compiler, as the learner has them; None: its own defaults."""
        trains = self.part.program.name == "update"
        return training_options(self.machine.platform) if trains else None

    def to_json(self) -> dict[str, Any]:
        prediction = self.part.plan.prediction
        report = None
        if self.report is not None:
            report = {
                "peak_bytes": self.report.peak_bytes,
                "argument_bytes": self.report.argument_bytes,
                "compile_s": round(self.report.compile_s, 1),
                "options": self.options,
                "collectives": _traffic(self.report.collectives),
            }
        return {
            "program": self.part.program.name,
            "side": self.part.program.side,
            "machine": self.machine.name,
            "mesh": dict(self.part.plan.mesh),
            "calls": self.part.program.calls,
            "predicted_s": self.part.step_s,
            "predicted_bytes": round(self.part.memory_bytes),
            "predicted_collectives": _traffic(prediction.collectives if prediction else {}),
            "others_bytes": round(self.others_bytes),
            "compiled": report,
            "error": self.error,
        }


def _traffic(collectives: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: dataclasses.asdict(traffic) for kind, traffic in collectives.items()}


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would need and do.

    Attributes:
      workload: what is run.
      cluster: name of the machines.
      best: how they are divided.
      half: the best division of the cut through the middle; None where the parts were given,
        or where nothing fits it.
      by_staleness: trained tokens a second of the best division that is no staler, by staleness.
      rows: the programs.
      notes: what else is to be said, in sentences.
    """

    workload: Workload
    cluster: str
    best: Division
    half: Division | None
    by_staleness: Mapping[int, float]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

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
        return json.dumps({
            "cluster": self.cluster,
            "workload": self.workload.summary().splitlines(),
            "division": _described(self.best),
            "half_and_half": None if self.half is None else _described(self.half),
            "tokens_per_s_by_staleness": {str(k): v for k, v in self.by_staleness.items()},
            "fits": self.fits,
            "shortfall_bytes": round(self.shortfall_bytes),
            "notes": list(self.notes),
            "programs": [row.to_json() for row in self.rows],
        }, indent=1)  # fmt: skip


def _described(division: Division) -> dict[str, Any]:
    names = (
        "actors", "prompts", "prompts_per_step", "codec", "update_s", "publish_s",
        "generation_s", "fetch_s", "pause_s", "step_s", "staleness", "tokens_per_s", "limit",
    )  # fmt: skip
    found = {name: getattr(division, name) for name in names}
    return found | {"learner": division.learner.name, "actor": division.actor.name}


def dry_run(
    workload: Workload,
    cluster: Cluster,
    actors: Cluster | None = None,
    *,
    link: Link | None = None,
    batches: Sequence[int] = (),
    compiling: Compiling | None = None,
    max_staleness: int = 8,
    told: Callable[[str], None] = lambda line: None,
) -> DryRun:
    """Divides the chips, plans every program on its part, and compiles it.

    Where the compilers find that the best division does not fit, the next one is tried, twice.

    Args:
      workload: what is run.
      cluster: all chips; the learner's where `actors` is given.
      actors: the actors' machines, where they are others.
      link: between learner and actors; None: the hosts' own networks.
      batches: prompts of an update to choose among; the workload's where empty.
      compiling: how the compilers are asked; None asks none, and memory is the planner's.
      max_staleness: versions by which a rollout may be old.
      told: is called with a line as the work proceeds.

    Raises:
      NothingFits: no division fits.
    """
    planner = Planner(workload, link=link, batches=batches)
    told("dividing the chips between learner and actors")
    best, others = divide(
        workload, cluster, actors, max_staleness=max_staleness, planner=planner, told=told
    )
    half = None
    if actors is None:
        try:
            half, _ = planner.divide([half_and_half(cluster)], max_staleness=max_staleness)
        except NothingFits as error:
            _log.info("half and half: %s", error)
    tried: list[DryRun] = []
    for division in _different([best, *others])[: _ATTEMPTS if compiling else 1]:
        rows, said = _rows(workload, division)
        if compiling is not None:
            rows = [compiled(row, compiling, told) for row in rows]
        tried.append(
            DryRun(
                workload=dataclasses.replace(workload, prompts_per_step=division.prompts_per_step),
                cluster=cluster.name if actors is None else f"{cluster.name} + {actors.name}",
                best=division,
                half=half,
                by_staleness=_by_staleness([best, *others]),
                rows=tuple(rows),
                notes=tuple(said),
            )
        )
        if tried[-1].fits:
            return tried[-1]
        told(f"{division.learner.name} with {division.prompts} prompts an actor does not fit")
    return min(tried, key=lambda run: run.shortfall_bytes)


def _different(divisions: Iterable[Division]) -> list[Division]:
    """The first of those that take the same memory."""
    found: dict[Any, Division] = {}
    for one in divisions:
        found.setdefault((one.learner.name, one.actor.name, one.prompts), one)
    return list(found.values())


def _by_staleness(divisions: Iterable[Division]) -> dict[int, float]:
    found: dict[int, float] = {}
    best = 0.0
    for one in sorted(divisions, key=lambda division: division.staleness):
        best = max(best, one.tokens_per_s)
        found[one.staleness] = best
    return found


def _rows(workload: Workload, division: Division) -> tuple[list[Row], list[str]]:
    """Every program with all its layers, and what else lies beside it; what is to be said."""
    update, *generation = division.parts
    learner, actor = division.learner, division.actor
    encode = deltas.encoding(update, learner)
    # Versions are coded and sent beside the updates.
    rows = [Row(part=update, machine=learner, others_bytes=encode.resident_bytes)]
    generation = [
        full_decode(part, actor) if part.program.name == "decode" else part for part in generation
    ]
    held = resident_bytes(generation)
    for part in generation:
        beside = sum(n for key, n in held.items() if key != part.program.parameters)
        rows.append(Row(part=part, machine=actor, others_bytes=beside))
    rows.append(Row(part=encode, machine=learner, others_bytes=update.resident_bytes))
    prefill, decode = (
        next(p for p in generation if p.program.name == name) for name in ("prefill", "decode")
    )
    applied = deltas.applying(prefill, actor, density=workload.density)
    # New weights are built while a batch is written; those of one leaf are the program's own.
    beside = decode.memory_bytes + sum(held.values())
    rows += [
        Row(part=part, machine=actor, others_bytes=beside - part.resident_bytes) for part in applied
    ]
    hosted, policy = deltas.by_host(prefill, actor, applied), held["policy"]
    said = []
    if hosted > _WORTH_SAYING * policy:
        said.append(
            f"of a delta {hosted / 1e9:.1f} of {policy / 1e9:.1f} GB a device are rebuilt by the "
            "hosts: no kernel takes shards of 2^31 elements and more"
        )
    return rows, said


def compiled(row: Row, compiling: Compiling, told: Callable[[str], None]) -> Row:
    """The row with what the compiler says, or with why it says nothing."""
    told(f"compiling {row.part.program.name} for {row.machine.name}")
    try:
        report = row.part.plan.check(
            donate=row.part.program.donate, timeout_s=compiling.timeout_s,
            answers=compiling.answers, options=row.options,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        return dataclasses.replace(row, error=str(error))
    return dataclasses.replace(row, report=report)
