"""Dry runs as tables and sentences."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from jaxrl.deployment import DryRun
from sharding.compiled.compile_check import moved_bytes
from sharding.compiled.hlo import Traffic


def programs(run: DryRun) -> Table:
    """The programs of a run, one line each."""
    found = Table(title=f"programs on {run.cluster}", title_justify="left")
    for name in ("program", "machine", "mesh"):
        found.add_column(name)
    for name in ("time", "memory GB", "compiled GB", "beside GB", "moved GB", "compiled GB"):
        found.add_column(name, justify="right")
    for row in run.rows:
        program, report, prediction = row.part.program, row.report, row.part.plan.prediction
        calls = f" × {program.calls}" if program.calls > 1 else ""
        found.add_row(
            program.name,
            row.machine.name,
            " × ".join(f"{axis} {n}" for axis, n in row.part.plan.mesh.items()) or "one device",
            f"{row.part.step_s:.4g} s{calls}",
            _gb(row.part.memory_bytes),
            "" if report is None else _gb(report.peak_bytes),
            _gb(row.others_bytes),
            "" if prediction is None else _moved(prediction.collectives),
            "" if report is None else _moved(report.collectives),
        )
    return found


def _moved(collectives: Mapping[str, Traffic]) -> str:
    return _gb(moved_bytes(collectives))


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def verdict(run: DryRun) -> list[str]:
    """What it comes to, in lines."""
    lines = [f"best: {run.best}"]
    if run.half is not None:
        gain = run.best.tokens_per_s / run.half.tokens_per_s
        lines.append(f"best half and half: {run.half}")
        lines.append(f"the joint choice trains {gain:.2f} times as many tokens a second")
    paces = ", ".join(f"{bound}: {pace:,.0f}" for bound, pace in run.by_staleness.items())
    lines += [f"trained tokens/s by versions of staleness: {paces}", *run.notes]
    lines += [
        f"{row.part.program.name} was not compiled: {row.error}" for row in run.rows if row.error
    ]
    tightest = max(run.rows, key=lambda row: row.shortfall_bytes)
    room = -tightest.shortfall_bytes / 1e9
    said = "compiled" if tightest.report is not None else "predicted"
    if run.fits:
        lines.append(f"fits: {tightest.part.program.name} leaves {room:.2f} GB a device ({said})")
    else:
        lines.append(
            f"does not fit: {tightest.part.program.name} lacks {-room:.2f} GB a device ({said}); "
            "take more chips, shorter completions, fewer prompts or smaller models"
        )
    return lines


def overview(runs: Mapping[str, DryRun]) -> Table:
    """Dry runs by name, one line each."""
    found = Table(title="dry runs", title_justify="left")
    for name in ("run", "machines", "learner", "actors"):
        found.add_column(name)
    for name in ("step s", "stale", "trained tokens/s", "× half and half", "least room GB"):
        found.add_column(name, justify="right")
    found.add_column("limit")
    found.add_column("compiled", justify="right")
    for name, run in runs.items():
        best, half = run.best, run.half
        gain = "" if half is None else f"{best.tokens_per_s / half.tokens_per_s:.2f}"
        compiled = sum(row.report is not None for row in run.rows)
        found.add_row(
            name, run.cluster, f"{best.learner.name}, {best.prompts_per_step} prompts",
            f"{best.actors} × {best.actor.name}, {best.prompts} prompts, {best.codec}",
            f"{best.step_s:.2f}", str(best.staleness), f"{best.tokens_per_s:,.0f}", gain,
            _gb(-run.shortfall_bytes), best.limit, f"{compiled} of {len(run.rows)}",
        )  # fmt: skip
    return found


def said(runs: Sequence[DryRun]) -> list[str]:
    """How far the compilers and the planner are apart, in lines."""
    errors = [
        (row.part.memory_bytes / row.report.peak_bytes - 1, row.part.program.name, run.cluster)
        for run in runs
        for row in run.rows
        if row.report is not None
    ]
    if not errors:
        return []
    within = sum(abs(error) <= 0.1 for error, *_ in errors)
    worst = max(errors, key=lambda entry: abs(entry[0]))
    others = [error for error, name, _ in errors if not name.startswith("delta ")]
    near = sum(abs(error) <= 0.1 for error in others)
    return [
        f"predicted memory is within 10 % of the compiled for {within} of {len(errors)} programs; "
        f"the worst is {worst[1]} on {worst[2]}: {worst[0]:+.0%}",
        f"of those that are no deltas for {near} of {len(others)}: {min(others):+.1%} to "
        f"{max(others):+.1%}",
    ]
