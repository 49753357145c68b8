"""Is the planner's choice as good as the configuration that experts published?

    python -m experiments.planner_choice
    python -m experiments.planner_choice --every 1  # all of them

Every measured run whose configuration was published is planned anew: same program, cluster and
software. The best plan's predicted time is compared with the prediction for the published
configuration. A ratio above 1.03 would say that the search missed what experts found; one far
below 1 says where the planner believes that it knows better. The long-sequence table of NeMo says
whether context parallelism won: there the planner's choice is compared with it. CPU only, one
core, some minutes; `--every N` takes one run in N, and by default one in four.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import harness
from experiments.harness import Report, RunOptions, tables
from experiments.planner_accuracy import published_runs
from sharding.costs.strategies import Strategy
from sharding.machines.topology import Cluster
from sharding.measured.runs import Run
from sharding.measured.table import Table
from sharding.programs.transformer import named_model, transformer
from sharding.search.solver import evaluate, solve
from sharding.search.space import Constraints

# Predicted more than this slower than the experts' is a choice that the search should not make.
TOLERANCE = 1.03
# Where NeMo measured with and without context parallelism, sequences of at least this gained.
LONG = 32768


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.planner_choice; nothing in it is random."""

    every: int = 4
    """Plan one published configuration in this many."""
    sequences: tuple[int, ...] = tuple(2**exponent for exponent in range(13, 21))
    """Tokens of a sequence in the problems of NeMo's table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or any(n < 1 or 2**22 % n for n in self.sequences):
            raise ValueError(
                "one run in at least one, and lengths that divide a batch of 4,194,304 tokens, "
                f"are needed: {self.every=}, {self.sequences=}"
            )


PRESETS = {"full": Config(), "quick": Config(every=1000, sequences=(8192,))}


def chosen_runs(every: int) -> list[Run]:
    """Runs with a published configuration on equal chips, one of each problem and configuration."""
    runs = [
        run
        for run in published_runs()
        if run.is_complete
        and not run.cluster.nodes
        and run.strategy.devices == run.cluster.device_count
        and "ground_truth_single" not in run.source
    ]
    distinct = {(run.problem, run.strategy): run for run in Table.of(runs).runs}
    return list(distinct.values())[::every]


def compare(run: Run) -> dict[str, Any]:
    """The best plan for a run's problem beside the published configuration."""
    program = transformer(run.config)
    constraints = Constraints(
        remat=("none", "attention", "dots", "projections", "full"),
        zero=(0, 1, 3),
        tensor_across_nodes=run.strategy.tensor > run.cluster.node_size,
        # What runs is known to fit: the prediction of memory must not exclude it.
        memory_fraction=max(0.94, _memory_share(run)),
    )
    (expert,) = evaluate(program, [run.strategy], run.cluster, stack=run.stack)
    found = solve(program, run.cluster, constraints=constraints, stack=run.stack, top=1)
    best = found.best[0]
    return {
        "source": run.source,
        "model": run.config.name,
        "cluster": run.cluster.name,
        "expert": run.strategy.mesh,
        "ours": best.strategy.mesh,
        "expert_s": expert.step_s,
        "ours_s": best.step_s,
        "ratio": best.step_s / expert.step_s,
    }


def _memory_share(run: Run) -> float:
    (expert,) = evaluate(transformer(run.config), [run.strategy], run.cluster, stack=run.stack)
    return expert.memory_bytes / run.cluster.memory_bytes


def long_sequence(seq_len: int) -> dict[str, Any]:
    """What is chosen for the problem of NeMo's table with sequences of that many tokens."""
    chips = max(8, seq_len // 1024)
    config = named_model("llama3-8b", seq_len=seq_len, global_batch=2**22 // seq_len,
                         precision="fp8", weight_dtype="bfloat16",
                         optimizer_bytes=12.0)  # fmt: skip
    cluster = Cluster.from_name(f"b200:{chips // 8}x8")
    found = solve(transformer(config), cluster, stack="megatron", top=1)
    best: Strategy = found.best[0].strategy
    return {"seq_len": seq_len, "gpus": chips, "mesh": best.mesh, "context": best.context}


def experiment(run: harness.Run) -> None:
    config: Config = run.config
    published = chosen_runs(config.every)
    records, sequences = [], []
    with run.progress("published configurations", len(published)) as progress:
        for done, one in enumerate(published, 1):
            records.append(compare(one))
            progress.update(done)
    with run.progress("long sequences", len(config.sequences)) as progress:
        for done, seq_len in enumerate(config.sequences, 1):
            sequences.append(long_sequence(seq_len))
            progress.update(done)
    said = _verdicts(records, sequences)
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


def _verdicts(
    records: Sequence[Mapping[str, Any]], sequences: Sequence[Mapping[str, Any]]
) -> list[str]:
    ratios = np.asarray([r["ratio"] for r in records])
    wanted = [r for r in sequences if r["seq_len"] >= LONG]
    return [
        f"{len(records)} published configurations planned anew",
        f"best plan over expert, predicted: median {np.median(ratios):.3f}, largest "
        f"{ratios.max():.3f}; above {TOLERANCE}: {int(np.sum(ratios > TOLERANCE))} (wanted 0)",
        f"context parallelism chosen in {sum(r['context'] > 1 for r in wanted)} of "
        f"{len(wanted)} with at least {LONG} tokens (wanted all)",
    ]


def _tables(
    records: Sequence[Mapping[str, Any]], sequences: Sequence[Mapping[str, Any]]
) -> list[tables.Table]:
    """The runs where the expert is nearest to the best plan or ahead of it, and the sequences."""
    nearest = sorted(records, key=lambda r: -r["ratio"])[:5]
    found = [
        tables.Table(
            columns=("model", "cluster", "best plan", "expert", "ratio of step times"),
            rows=tuple(
                (r["model"], r["cluster"], _shown(r["ours"]), _shown(r["expert"]), r["ratio"])
                for r in nearest
            ),
            caption="Where the experts' configuration is predicted best.",
        ),
        tables.Table(
            columns=("tokens of a sequence", "GPUs", "choice"),
            rows=tuple((r["seq_len"], r["gpus"], _shown(r["mesh"])) for r in sequences),
            caption="Llama 3 8B on B200s, 4M tokens a step.",
        ),
    ]
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
