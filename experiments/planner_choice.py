"""Is the planner's choice as good as the configuration that experts published?

    python -m experiments.planner_choice
    python -m experiments.planner_choice --every 4  # a quarter of them

Every measured run whose configuration was published is planned anew: same program, cluster and
software. The best plan's predicted time is compared with the prediction for the published
configuration. A ratio above 1.03 would say that the search missed what experts found; one far
below 1 says where the planner believes that it knows better. What ran has fitted, so that the
memory predicted for the published configuration is allowed; where that is more than there is, the
plan within the planner's usual share is compared, too. NeMo measured Llama 3 8B on long sequences
with and without context parallelism: the choice, and what context parallelism is predicted to
gain, stand beside what it gained. CPU only, one core, about three minutes. Expected: the figures in
results/planner_choice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments import harness
from experiments.harness import Report, RunOptions, tables
from experiments.planner_accuracy import published_runs
from sharding.measured.runs import Run
from sharding.measured.table import Table
from sharding.programs.transformer import transformer
from sharding.search.candidate import TIE_TOLERANCE, Candidate
from sharding.search.solver import evaluate, solve
from sharding.search.space import Constraints, DoesNotFit

# Predicted more than this slower than the experts' is a choice that the search should not make.
TOLERANCE = 1.03
# Where NeMo measured with and without context parallelism, sequences of at least this gained.
LONG = 32768
WITH_CONTEXT = "NeMo long-sequence table (with CP)"
WITHOUT_CONTEXT = "NeMo long-sequence table (without CP)"


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.planner_choice; nothing in it is random."""

    every: int = 1
    """Plan one published configuration in this many."""
    longest: int = 2**20
    """Of NeMo's table, the sequences of at most so many tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or self.longest < 1:
            raise ValueError(
                "one run in at least one, and sequences of at least one token, are needed: "
                f"{self.every=}, {self.longest=}"
            )


PRESETS = {"full": Config(), "quick": Config(every=90, longest=2 * LONG)}


def chosen_runs(every: int) -> list[Run]:
    """Runs with a published configuration on equal chips, one of each problem and configuration."""
    runs = [
        run
        for run in published_runs()
        if run.is_complete
        and not run.cluster.nodes
        and run.strategy.devices == run.cluster.device_count
        and "ground_truth_single" not in run.source
        and not run.source.startswith("NeMo long-sequence")
    ]
    distinct = {(run.problem, run.strategy): run for run in Table.of(runs).runs}
    return list(distinct.values())[::every]


def compare(run: Run) -> dict[str, Any]:
    """The best plan for a run's problem beside the published configuration."""
    program = transformer(run.config)
    (expert,) = evaluate(program, [run.strategy], run.cluster, stack=run.stack)
    usual = Constraints(
        remat=("none", "attention", "dots", "projections", "full"),
        zero=(0, 1, 3),
        tensor_across_nodes=run.strategy.tensor > run.cluster.node_size,
    )
    share = expert.memory_bytes / run.cluster.memory_bytes
    # A little more than the share, which a product of floating-point numbers may miss.
    allowed = replace(usual, memory_fraction=max(usual.memory_fraction, share * (1 + 1e-9)))
    host = run.cluster.chip.host_memory_bytes / run.cluster.chip.devices_per_chip
    best = solve(program, run.cluster, constraints=allowed, stack=run.stack, top=1).best[0]
    within: float | None = best.step_s
    if share > usual.memory_fraction:
        try:
            found = solve(program, run.cluster, constraints=usual, stack=run.stack, top=1)
            within = found.best[0].step_s
        except DoesNotFit:
            within = None
    return {
        "source": run.source,
        "model": run.config.name,
        "cluster": run.cluster.name,
        "expert": run.strategy.mesh,
        "ours": best.strategy.mesh,
        "expert_s": expert.step_s,
        "ours_s": best.step_s,
        "ratio": best.step_s / expert.step_s,
        "expert_memory_share": share,
        "expert_host_share": expert.memory_terms["host"] / host,
        "ratio_within_memory": None if within is None else within / expert.step_s,
    }


def long_sequences(longest: int) -> list[dict[str, Any]]:
    """NeMo's table, row by row: the choice, and what context parallelism gains.

    The degrees that the table gives make fewer GPUs than it says; `sharding.measured.runs` raises
    data parallelism, up to the batch, so that they make all of them.
    """
    runs = [run for run in published_runs() if run.config.seq_len <= longest]
    without = {r.config.seq_len: r.measured_s for r in runs if r.source == WITHOUT_CONTEXT}
    ran = Table.of([r for r in runs if r.source == WITH_CONTEXT]).runs
    return [_long_sequence(run, without.get(run.config.seq_len)) for run in ran]


def _long_sequence(run: Run, without_s: float | None) -> dict[str, Any]:
    program = transformer(run.config)

    def best(tie_tolerance: float = TIE_TOLERANCE, **pinned: int) -> Candidate:
        constraints = Constraints(pinned=pinned)
        found = solve(program, run.cluster, constraints=constraints, stack=run.stack, top=1,
                      tie_tolerance=tie_tolerance)  # fmt: skip
        return found.best[0]

    def fastest(degrees: Sequence[int]) -> float | None:
        times = []
        for degree in degrees:
            try:
                times.append(best(0.0, context=degree).step_s)
            except ValueError:  # nothing fits, or nothing divides: no plan of that degree
                continue
        return min(times, default=None)

    chosen = best()
    (expert,) = evaluate(program, [run.strategy], run.cluster, stack=run.stack)
    alone = fastest([1])
    degrees = [2**i for i in range(1, run.cluster.device_count.bit_length())]
    divided = fastest(degrees)
    assert run.measured_s is not None  # `published_runs` keeps no others
    return {
        "seq_len": run.config.seq_len,
        "gpus": run.cluster.device_count,
        "ours": chosen.strategy.mesh,
        "context": chosen.strategy.context,
        "ours_s": chosen.step_s,
        "expert": run.strategy.mesh,
        "expert_s": expert.step_s,
        "ratio": chosen.step_s / expert.step_s,
        "measured_gain": None if without_s is None else without_s / run.measured_s,
        "predicted_gain": None if alone is None or divided is None else alone / divided,
    }


def experiment(run: harness.Run) -> None:
    config: Config = run.config
    records = _compared(run, chosen_runs(config.every))
    sequences = long_sequences(config.longest)
    said = verdicts(records, sequences)
    shown = _tables(records, sequences)
    page = Report("The planner's choice beside the experts'", "predicted by the same cost model")
    page.text("\n".join(f"- {line}" for line in said))
    for table in shown:
        page.table(table)
    page.record("Config", harness.to_json(config)).write(run.folder / "report.html")
    run.finish(
        {"experts": records, "long": sequences},
        "\n".join([*(table.text() for table in shown), *said]),
    )


def _compared(run: harness.Run, published: Sequence[Run]) -> list[dict[str, Any]]:
    """Records of all runs; those that an interrupted run has written are not made again."""
    path = run.folder / "experts.jsonl"
    written = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # The last line may have been cut off.
    records = [json.loads(line) for line in written if line.endswith("\n")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    total = len(published)
    with (
        path.open("a", encoding="utf-8") as file,
        run.progress("published configurations", total, start=len(records)) as progress,
    ):
        for one in published[len(records) :]:
            records.append(compare(one))
            file.write(json.dumps(records[-1]) + "\n")
            file.flush()
            progress.update(len(records))
    return records


def verdicts(
    records: Sequence[Mapping[str, Any]], sequences: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What was found, in lines: counts, and each choice that is worse than the experts'."""
    ratios = np.asarray([r["ratio"] for r in records])
    crowded = [r for r in records if r["expert_memory_share"] > Constraints().memory_fraction]
    within = [r["ratio_within_memory"] for r in crowded if r["ratio_within_memory"] is not None]
    slower = sum(ratio > TOLERANCE for ratio in within)
    wanted = [r for r in sequences if r["seq_len"] >= LONG]
    lines = [
        f"{len(records)} published configurations planned anew",
        f"best plan over expert, predicted: median {np.median(ratios):.3f}, largest "
        f"{ratios.max():.3f}; above {TOLERANCE}: {int(np.sum(ratios > TOLERANCE))} (wanted 0)",
        f"{len(crowded)} are predicted to take more memory than the planner's usual share; within "
        f"it {slower} plans are above {TOLERANCE} and {len(crowded) - len(within)} problems have "
        "none that fits",
        f"context parallelism chosen in {sum(r['context'] > 1 for r in wanted)} of "
        f"{len(wanted)} with at least {LONG} tokens (wanted all)",
    ]
    for r in records:
        if r["ratio"] > TOLERANCE:
            host = f", {r['expert_host_share']:.2f} of the host's" if r["expert_host_share"] else ""
            lines.append(
                f"above: {r['model']} on {r['cluster']}, {r['ratio']:.3f}: the expert's is "
                f"predicted to take {r['expert_memory_share']:.2f} of a device's memory{host}"
            )
    return lines


def _tables(
    records: Sequence[Mapping[str, Any]], sequences: Sequence[Mapping[str, Any]]
) -> list[tables.Table]:
    """By source, where the expert is nearest to the best plan or ahead of it, and the sequences."""
    nearest = sorted(records, key=lambda r: -r["ratio"])[:5]
    ratios: dict[str, list[float]] = {}
    for r in records:
        ratios.setdefault(r["source"], []).append(r["ratio"])
    found = [
        tables.Table(
            columns=("source", "configurations", "median ratio", "smallest", "largest"),
            rows=tuple(
                (source, len(some), float(np.median(some)), min(some), max(some))
                for source, some in sorted(ratios.items())
            ),
            caption="Predicted step time of the best plan over that of the published one.",
        ),
        tables.Table(
            columns=("model", "cluster", "best plan", "expert", "ratio of step times"),
            rows=tuple(
                (r["model"], r["cluster"], _shown(r["ours"]), _shown(r["expert"]), r["ratio"])
                for r in nearest
            ),
            caption="Where the experts' configuration is predicted best.",
        ),
        tables.Table(
            columns=("tokens of a sequence", "GPUs", "choice", "published", "ratio",
                     "measured gain", "predicted gain"),
            rows=tuple(
                (r["seq_len"], r["gpus"], _shown(r["ours"]), _shown(r["expert"]), r["ratio"],
                 r["measured_gain"], r["predicted_gain"])
                for r in sequences
            ),
            caption="Llama 3 8B on B200s, 4M tokens a step; gains of context parallelism: the best "
            "without it over the best with it.",
        ),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def _shown(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items())


def main(argv: list[str] | None = None) -> None:
    config = harness.cli(
        Config,
        presets=PRESETS,
        argv=argv,
        prog="python -m experiments.planner_choice",
        description=__doc__,
    )
    harness.main(experiment, "planner_choice", config)


if __name__ == "__main__":
    main()
