"""How well does the planner predict the step time of measured runs that it has not seen?

    python -m experiments.planner_accuracy [--json FILE]

Every run is predicted by constants that were fitted without any run of its model. The same runs
are predicted by the trivial baseline: model FLOPs at the median utilisation of other models on
the chip. CPU only, one core, about half a minute. Expected: the table in the README's section on
the planner.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from sharding.calibrate import held_out
from sharding.constants import shipped
from sharding.evaluation import Errors, constant_mfu, problems, regret, spearman
from sharding.runs import Run, read_runs

TABLES = ("published_runs.csv", "vtrain_single_node_measured.csv")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A set of runs and what is wanted of its errors.

    Attributes:
      name: of the set.
      chosen: whether a run belongs to it.
      measure: "mean" or "median".
      wanted: largest value of the measure.
      within_15: smallest share of runs within 15 %, or None.
    """

    name: str
    chosen: Callable[[Run], bool]
    measure: str
    wanted: float
    within_15: float | None = None


def _has(*words: str) -> Callable[[Run], bool]:
    return lambda run: any(word in run.source for word in words)


GOALS = (
    Goal(name="vTrain, one node", chosen=_has("ground_truth_single"), measure="mean", wanted=0.08),
    Goal(name="vTrain, many nodes", chosen=_has("vTrain ground truth multi"), measure="mean",
         wanted=0.08),
    Goal(name="TPU, configuration known", chosen=lambda r: r.cluster.is_torus and r.is_complete,
         measure="median", wanted=0.08, within_15=0.9),
    Goal(name="PyTorch FSDP on GPUs", chosen=lambda r: r.stack == "fsdp", measure="median",
         wanted=0.07),
    Goal(name="Megatron 2020-21", chosen=_has("Megatron-LM README"), measure="mean", wanted=0.08),
)  # fmt: skip


def published_runs() -> list[Run]:
    """All runs of the shipped tables that were measured, without AMP's, which have their own."""
    runs = []
    for name in TABLES:
        with resources.as_file(resources.files("sharding") / "catalog" / name) as path:
            runs += read_runs(path)[0]
    return [run for run in runs if run.measured_s and not run.source.startswith("AMP ")]


def accuracy(runs: Sequence[Run], predicted: np.ndarray) -> list[dict]:
    """One record a goal: wanted, reached, and what the trivial baseline reaches."""
    measured = np.asarray([run.measured_s for run in runs], float)
    trivial = constant_mfu(runs)
    records = []
    for goal in GOALS:
        rows = np.asarray([i for i, run in enumerate(runs) if goal.chosen(run)])
        ours, theirs = (Errors.of(p[rows], measured[rows]) for p in (predicted, trivial))
        assert ours is not None, f"no runs of {goal.name}"
        assert theirs is not None
        reached = getattr(ours, goal.measure)
        met = reached <= goal.wanted
        if goal.within_15 is not None:
            met = met and ours.within_15 >= goal.within_15
        records.append(
            {"set": goal.name, "runs": ours.count, "measure": goal.measure, "wanted": goal.wanted,
             "reached": reached, "mean": ours.mean, "median": ours.median,
             "within_15": ours.within_15, "wanted_within_15": goal.within_15,
             "constant_mfu": getattr(theirs, goal.measure), "met": met}
        )  # fmt: skip
    return records


def choices(runs: Sequence[Run], predicted: np.ndarray) -> list[dict]:
    """Regret and rank correlation where many configurations of one problem were measured."""
    measured = np.asarray([run.measured_s for run in runs], float)
    trivial = constant_mfu(runs)
    records = []
    for goal in GOALS[:2]:
        rows = [i for i, run in enumerate(runs) if goal.chosen(run)]
        found = problems(runs, rows)
        ours = [regret(predicted[g], measured[g]) for g in found.values()]
        theirs = [regret(trivial[g], measured[g]) for g in found.values()]
        ranks = [spearman(predicted[g], measured[g]) for g in found.values()]
        records.append(
            {"set": goal.name, "problems": len(found), "regret_mean": float(np.mean(ours)),
             "regret_worst": float(np.max(ours)), "spearman_mean": float(np.mean(ranks)),
             "constant_mfu_regret": float(np.mean(theirs)), "met": float(np.mean(ours)) <= 0.02}
        )  # fmt: skip
    return records


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the records there too")
    options = parser.parse_args()
    runs = published_runs()
    predicted = held_out(runs, shipped())
    errors, regrets = accuracy(runs, predicted), choices(runs, predicted)
    print("| runs | count | measure | wanted | reached | within 15 % | constant MFU | met |")
    print("|---|---|---|---|---|---|---|---|")
    for r in errors:
        print(f"| {r['set']} | {r['runs']} | {r['measure']} | {r['wanted']:.0%} | "
              f"{r['reached']:.1%} | {r['within_15']:.0%} | {r['constant_mfu']:.1%} | "
              f"{'yes' if r['met'] else 'no'} |")  # fmt: skip
    print("\n| choice between measured configurations | problems | mean regret | worst | "
          "rank correlation | constant MFU's regret | met (2 %) |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for r in regrets:
        print(f"| {r['set']} | {r['problems']} | {r['regret_mean']:.1%} | {r['regret_worst']:.1%} "
              f"| {r['spearman_mean']:.3f} | {r['constant_mfu_regret']:.1%} | "
              f"{'yes' if r['met'] else 'no'} |")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"accuracy": errors, "choice": regrets}, indent=1))


if __name__ == "__main__":
    main()
