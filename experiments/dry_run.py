"""What would a run need on machines that are not here, and how should they be divided?

    python -m experiments.dry_run --cluster v5p:4x4x4 --model llama3-8b

plans every program of asynchronous RL for those chips: the update, log-probabilities of the
reference, reward and cost models, prefill and decoding, and the difference of the weights; says
how the chips are best divided between learner and actors, how fast a step will be and what limits
it; and asks the production compilers how much memory each program takes (`--no-compile` leaves
that out; with it, the extra `aot` is needed, and about a minute a program). `--suite` does so for
the configurations of the README's table. `python -m experiments.safety --dry-run CLUSTER` is the
same command.

Exit status 1 if it does not fit, with the smallest shortfall. No accelerator is needed; without
compilation it takes about a minute.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import harness
from experiments.harness.files import write_json
from jaxrl import recipes
from jaxrl.deployment import DryRun, NothingFits, Workload, dry_run
from jaxrl.models.named import named
from sharding import Cluster


@dataclass(frozen=True, kw_only=True)
class DryRunConfig:
    """What is planned."""

    cluster: str = "v5p:4x4x4"
    """All chips, as `v5e:16x16` or `h100:8x8`, or a JSON file; the learner's where --actors is
    given."""
    actors: str = ""
    """The actors' machines where they are others, unequal chips for instance."""
    model: str = "llama3-8b"
    """The policy, by name."""
    reward_model: str = "llama3-8b"
    """Trunk of the reward model, by name; empty: a function on the host."""
    cost_model: str = "llama3-8b"
    """Trunk of the cost model, by name; empty: a function on the host."""
    critic: str = ""
    """Trunk of the critic, where the recipe has one; empty: like the policy."""
    algorithm: str = recipes.RECOMMENDED
    """The recipe."""
    prompts: int = 64
    """Prompts of one update."""
    prompt_len: int = 512
    """Tokens of a prompt."""
    completion_len: int = 512
    """Tokens of the longest completion."""
    density: float = 0.01
    """Share of the bf16 weights that an update changes."""
    max_staleness: int = 8
    """Versions by which a rollout may be old."""
    suite: bool = False
    """Run the configurations of the README's table instead of one."""
    compile: bool = True
    """Whether to ask the compilers."""
    json: Path | None = None
    """Where to write the result as JSON."""

    def workload(self) -> Workload:
        """The run.

        Raises:
          ValueError: an unknown model or algorithm.
        """

        def model(name: str):
            return named(name) if name else None

        return Workload(
            recipe=recipes.get(self.algorithm), policy=named(self.model),
            prompts_per_step=self.prompts, prompt_len=self.prompt_len,
            completion_len=self.completion_len, reward_model=model(self.reward_model),
            cost_model=model(self.cost_model), critic=model(self.critic), density=self.density,
        )  # fmt: skip


SUITE: tuple[Mapping[str, Any], ...] = (
    {"model": "llama3-8b", "cluster": "v5e:8x16"},
    {"model": "llama3-8b", "cluster": "v5p:4x4x4"},
    {"model": "llama3-8b", "cluster": "h100:8x8"},
    {"model": "llama3-70b", "cluster": "v5p:8x8x8"},
    {"model": "llama3-70b", "cluster": "h100:32x8"},
    {"model": "qwen3-30b-a3b", "cluster": "v6e:16x16"},
    {"model": "llama3-8b", "cluster": "v5e:8x16x2slices"},  # learner and actors on slices
    {"model": "llama3-8b", "cluster": "v5p:4x4x4", "actors": "v6e:8x8"},  # unequal chips
)
"""Configurations that `--suite` plans."""


def table(run: DryRun) -> Table:
    """The programs of a run, one line each."""
    found = Table(title=f"programs on {run.cluster}", title_justify="left")
    for name in ("program", "machine", "mesh", "time", "memory GB", "compiled GB", "beside GB"):
        found.add_column(
            name, justify="left" if name in ("program", "machine", "mesh") else "right"
        )
    found.add_column("collectives GB", justify="right")
    for row in run.rows:
        program, report = row.part.program, row.report
        calls = f" × {program.calls}" if program.calls > 1 else ""
        traffic = "" if report is None else _gb(sum(t.bytes for t in report.collectives.values()))
        found.add_row(
            program.name,
            row.machine.name,
            " × ".join(f"{axis} {n}" for axis, n in row.part.plan.mesh.items()) or "one device",
            f"{row.part.step_s:.4g} s{calls}",
            _gb(row.part.memory_bytes),
            "" if report is None else _gb(report.peak_bytes),
            _gb(row.others_bytes),
            traffic,
        )
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def verdict(run: DryRun) -> list[str]:
    """What it comes to, in lines."""
    lines = [f"best: {run.best}"]
    if run.half is not None:
        gain = run.best.tokens_per_s / run.half.tokens_per_s
        lines.append(f"best half and half: {run.half}")
        lines.append(f"the joint choice trains {gain:.2f} times as many tokens a second")
    errors = [
        f"{row.part.program.name} was not compiled: {row.error}" for row in run.rows if row.error
    ]
    tightest = max(run.rows, key=lambda row: row.shortfall_bytes)
    room = -tightest.shortfall_bytes / 1e9
    said = "compiled" if tightest.report is not None else "predicted"
    lines += errors
    if run.fits:
        lines.append(f"fits: {tightest.part.program.name} leaves {room:.2f} GB a device ({said})")
    else:
        lines.append(
            f"does not fit: {tightest.part.program.name} lacks {-room:.2f} GB a device ({said}); "
            "take more chips, shorter completions, fewer prompts or smaller models"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    config = harness.cli(
        DryRunConfig, argv=argv, prog="python -m experiments.dry_run", description=__doc__
    )
    console = Console(width=150 if not sys.stdout.isatty() else None)
    if config.suite:
        runs = [_planned(dataclasses.replace(config, **changes), console) for changes in SUITE]
        console.print(overview([run for run in runs if run is not None]))
    else:
        runs = [_planned(config, console)]
    if config.json is not None:
        found = [json.loads(run.to_json()) for run in runs if run is not None]
        write_json(config.json, found if config.suite else found[0] if found else None)
    if not all(run is not None and run.fits for run in runs):
        raise SystemExit(1)


def _planned(config: DryRunConfig, console: Console) -> DryRun | None:
    """One dry run, printed; None where nothing fits."""
    try:
        workload = config.workload()
        cluster = Cluster.from_name(config.cluster)
        actors = Cluster.from_name(config.actors) if config.actors else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    console.print(workload.summary(), highlight=False)
    try:
        run = dry_run(
            workload, cluster, actors, compiles=config.compile, max_staleness=config.max_staleness,
            told=lambda line: console.print(f"[dim]{line}[/dim]", highlight=False),
        )  # fmt: skip
    except NothingFits as error:
        console.print(f"does not fit: {error}", highlight=False)
        return None
    console.print(table(run))
    for line in verdict(run):
        console.print(line, highlight=False)
    return run


def overview(runs: Sequence[DryRun]) -> Table:
    """All configurations, one line each."""
    found = Table(title="dry runs", title_justify="left")
    for name in ("policy", "machines", "learner", "actors"):
        found.add_column(name)
    for name in ("step s", "stale", "trained tokens/s", "× half and half", "least room GB"):
        found.add_column(name, justify="right")
    found.add_column("limit")
    for run in runs:
        best, half = run.best, run.half
        gain = "" if half is None else f"{best.tokens_per_s / half.tokens_per_s:.2f}"
        found.add_row(
            f"{run.workload.policy.num_params / 1e9:.1f}B", run.cluster, best.learner.name,
            f"{best.actors} × {best.actor.name}, {best.prompts} prompts, {best.codec}",
            f"{best.step_s:.2f}", str(best.staleness), f"{best.tokens_per_s:,.0f}", gain,
            _gb(-run.shortfall_bytes), best.limit,
        )  # fmt: skip
    return found


def hand_over(argv: Sequence[str] | None, **changes: object) -> bool:
    """Does what `--dry-run CLUSTER` of another experiment asks for.

    Args:
      argv: that experiment's arguments; those of this process where None.
      changes: fields of `DryRunConfig` that the experiment decides.

    Returns:
      Whether there was such a flag.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if "--dry-run" not in given:
        return False
    at = given.index("--dry-run")
    if at + 1 == len(given):
        print("error: --dry-run needs a cluster, such as v5p:4x4x4", file=sys.stderr)
        raise SystemExit(2)
    cluster = given[at + 1]
    rest = [*given[:at], *given[at + 2 :]]
    known = {f.name for f in dataclasses.fields(DryRunConfig)}
    decided = [
        part
        for name, value in changes.items()
        if name in known and f"--{name.replace('_', '-')}" not in rest
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    main(["--cluster", cluster, *decided, *rest])
    return True


if __name__ == "__main__":
    main()
