"""Is the planner's choice as good as the configuration that experts published?

    python -m experiments.planner_choice [--json FILE]

Every measured run whose configuration was published is planned anew: same program, cluster and
software. The best plan's predicted time is compared with the prediction for the published
configuration. A ratio above 1.03 would say that the search missed what experts found; one far
below 1 says where the planner believes that it knows better. The long-sequence table of NeMo says
whether context parallelism won: there the planner's choice is compared with it. CPU only, one
core, some minutes; `--every N` takes one run in N.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from experiments.planner_accuracy import published_runs
from sharding.runs import Run
from sharding.solver import evaluate, solve
from sharding.space import Constraints
from sharding.strategies import Strategy
from sharding.table import Table
from sharding.topology import Cluster
from sharding.transformer import named_model, transformer

# Predicted more than this slower than the experts' is a choice that the search should not make.
TOLERANCE = 1.03
# Where NeMo measured with and without context parallelism, sequences of at least this gained.
LONG = 32768


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


def compare(run: Run) -> dict:
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


def long_sequences() -> list[dict]:
    """Whether context parallelism is chosen for the problems of NeMo's table."""
    records = []
    for exponent in range(13, 21):
        seq_len, chips = 2**exponent, max(8, 2 ** (exponent - 10))
        batch = 2**22 // seq_len
        config = named_model("llama3-8b", seq_len=seq_len, global_batch=batch, precision="fp8",
                             weight_dtype="bfloat16", optimizer_bytes=12.0)  # fmt: skip
        cluster = Cluster.from_name(f"b200:{chips // 8}x8")
        found = solve(transformer(config), cluster, stack="megatron", top=1)
        best: Strategy = found.best[0].strategy
        records.append({"seq_len": seq_len, "gpus": chips, "mesh": best.mesh,
                        "context": best.context})  # fmt: skip
    return records


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=4, help="one run in this many")
    parser.add_argument("--json", type=Path, help="write the records there too")
    options = parser.parse_args()
    records = [compare(run) for run in chosen_runs(options.every)]
    ratios = np.asarray([r["ratio"] for r in records])
    print(f"{len(records)} published configurations planned anew")
    print(f"best plan over expert, predicted: median {np.median(ratios):.3f}, "
          f"largest {ratios.max():.3f}; above {TOLERANCE}: {int(np.sum(ratios > TOLERANCE))} "
          "(wanted 0)")  # fmt: skip
    for r in sorted(records, key=lambda r: -r["ratio"])[:5]:
        print(f"  {r['ratio']:.3f} {r['model']} on {r['cluster']}: {r['ours']} beside "
              f"{r['expert']}")  # fmt: skip
    sequences = long_sequences()
    print("\n| tokens of a sequence | GPUs | choice |\n|---|---|---|")
    for r in sequences:
        print(f"| {r['seq_len']} | {r['gpus']} | {_shown(r['mesh'])} |")
    wanted = [r for r in sequences if r["seq_len"] >= LONG]
    print(f"context parallelism chosen in {sum(r['context'] > 1 for r in wanted)} of "
          f"{len(wanted)} with at least {LONG} tokens (wanted all)")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"experts": records, "long": sequences}, indent=1))


def _shown(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items())


if __name__ == "__main__":
    main()
