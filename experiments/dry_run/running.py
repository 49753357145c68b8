"""The command: one dry run, the suite, or several workloads."""

import contextlib
import dataclasses
import gc
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from experiments import dry_run as package
from experiments import harness
from experiments.dry_run import tables
from experiments.dry_run.config import SUITE, WORKLOADS, DryRunConfig
from experiments.harness.files import write_json
from jaxrl.deployment import Compiling, DryRun, NothingFits, dry_run
from jaxrl.models import DecoderConfig
from sharding import Cluster


def main(argv: Sequence[str] | None = None, *, own: DecoderConfig | None = None) -> None:
    """Plans and compiles what the command line says.

    Args:
      argv: arguments without the program's name; by default those of this process.
      own: the decoder that `--model own` stands for.

    Raises:
      SystemExit: with status 1 where something does not fit, with 2 where a flag is wrong.
    """
    config = harness.cli(
        DryRunConfig, argv=argv, prog="python -m experiments.dry_run", description=package.__doc__
    )
    console = Console(width=170 if not sys.stdout.isatty() else None)
    several = _several(config)
    runs: dict[str, DryRun] = {}
    for name, one in several.items():
        run = _planned(one, console, own)
        if run is not None:
            runs[name] = run
        if config.json is not None:  # after every one: the next may be interrupted
            found = [{"name": n} | json.loads(r.to_json()) for n, r in runs.items()]
            write_json(config.json, found if len(several) > 1 else found[0] if found else None)
    if len(several) > 1:
        console.print(tables.overview(runs))
    for line in tables.said(list(runs.values())):
        console.print(line, highlight=False)
    if len(runs) < len(several) or not all(run.fits for run in runs.values()):
        raise SystemExit(1)


def _several(config: DryRunConfig) -> dict[str, DryRunConfig]:
    """What is planned, by name."""

    def changed(changes: Mapping[str, Any]) -> DryRunConfig:
        return dataclasses.replace(config, **changes)

    if config.suite:
        return {name: changed(changes) for name, changes in SUITE.items()}
    if config.workloads:
        return {name: changed({"compile": False, **c}) for name, c in WORKLOADS.items()}
    return {config.model: config}


def _planned(config: DryRunConfig, console: Console, own: DecoderConfig | None) -> DryRun | None:
    """One dry run, printed; None where nothing fits."""
    try:
        workload = config.workload(own)
        cluster = Cluster.from_name(config.cluster)
        actors = Cluster.from_name(config.actors) if config.actors else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    console.print(workload.summary(), highlight=False)
    compiling = Compiling(answers=config.answers, timeout_s=config.timeout_s)
    try:
        with _few_collections():
            run = dry_run(
                workload, cluster, actors, link=config.link(), batches=config.prompts,
                compiling=compiling if config.compile else None,
                max_staleness=config.max_staleness,
                told=lambda line: console.print(f"[dim]{line}[/dim]", highlight=False),
            )  # fmt: skip
    except NothingFits as error:
        lacks = error.shortfall_bytes
        missing = "" if lacks is None else f"it lacks {lacks / 1e9:.2f} GB a device; "
        console.print(f"does not fit: {missing}{error}", highlight=False)
        return None
    console.print(tables.programs(run))
    for line in tables.verdict(run):
        console.print(line, highlight=False)
    return run


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Looks for garbage in cycles seldom.

    Traces are millions of objects that are kept: by CPython's own thresholds, looking through them
    is a quarter of the planner's time.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
