"""How well does the planner predict the step time of measured runs that it has not seen?

    python -m experiments.planner_accuracy
    python -m experiments.planner_accuracy --stacks fsdp  # runs of one software

Every run is predicted by constants that were fitted without any run of its model. The same runs
are predicted by the trivial baseline: model FLOPs at the median utilisation of other models on
the chip. CPU only, one core, about half a minute. Expected: the table in the README's section on
the planner.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from experiments import harness
from experiments.harness import Report, RunOptions, Table, plots
from sharding.costs.constants import shipped
from sharding.measured.calibrate import FITTED, held_out
from sharding.measured.evaluation import Errors, constant_mfu, problems, regret, spearman
from sharding.measured.runs import Run, read_runs

TABLES = ("published_runs.csv", "vtrain_single_node_measured.csv")
# Of its runs that are not in a set of `GOALS`.
OTHER = "other runs"


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.planner_accuracy; nothing in it is random."""

    stacks: tuple[str, ...] = ()
    """Software whose runs are predicted, such as fsdp or megatron; all when empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.stacks) - set(FITTED):
            raise ValueError(f"no software {sorted(unknown)}; there are {', '.join(FITTED)}")


PRESETS = {"full": Config(), "quick": Config(stacks=("fsdp",))}


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


def predict(run: harness.Run, runs: Sequence[Run], stacks: Sequence[str]) -> np.ndarray:
    """(runs,) seconds, held out; NaN for runs of software that is not asked for.

    Software by software, which is what constants are fitted to: one fit does not see the others.
    """
    predicted = np.full(len(runs), np.nan)
    chosen = stacks or sorted({r.stack for r in runs})
    with run.progress("software", len(chosen)) as progress:
        for done, stack in enumerate(chosen, 1):
            rows = [i for i, r in enumerate(runs) if r.stack == stack]
            predicted[rows] = held_out([runs[i] for i in rows], shipped(), stacks=(stack,))
            progress.update(done)
    return predicted


def accuracy(runs: Sequence[Run], predicted: np.ndarray) -> list[dict[str, Any]]:
    """One record a goal: wanted, reached, and what the trivial baseline reaches.

    Runs whose prediction is NaN do not count, and goals without any run are left out.
    """
    measured = np.asarray([run.measured_s for run in runs], float)
    trivial = constant_mfu(runs)
    records = []
    for goal in GOALS:
        rows = np.asarray(_rows(goal, runs, predicted), int)
        ours, theirs = (Errors.of(p[rows], measured[rows]) for p in (predicted, trivial))
        if ours is None or theirs is None:
            continue
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


def _rows(goal: Goal, runs: Sequence[Run], predicted: np.ndarray) -> list[int]:
    return [i for i, run in enumerate(runs) if goal.chosen(run) and np.isfinite(predicted[i])]


def choices(runs: Sequence[Run], predicted: np.ndarray) -> list[dict[str, Any]]:
    """Regret and rank correlation where many configurations of one problem were measured."""
    measured = np.asarray([run.measured_s for run in runs], float)
    trivial = constant_mfu(runs)
    records = []
    for goal in GOALS[:2]:
        found = problems(runs, _rows(goal, runs, predicted))
        if not found:
            continue
        ours = [regret(predicted[g], measured[g]) for g in found.values()]
        theirs = [regret(trivial[g], measured[g]) for g in found.values()]
        ranks = [spearman(predicted[g], measured[g]) for g in found.values()]
        records.append(
            {"set": goal.name, "problems": len(found), "regret_mean": float(np.mean(ours)),
             "regret_worst": float(np.max(ours)), "spearman_mean": float(np.mean(ranks)),
             "constant_mfu_regret": float(np.mean(theirs)), "met": float(np.mean(ours)) <= 0.02}
        )  # fmt: skip
    return records


def tables(errors: Sequence[dict[str, Any]], regrets: Sequence[dict[str, Any]]) -> list[Table]:
    """Errors by set of runs, and regrets of choices where there are any."""
    found = [
        Table(
            columns=("runs", "count", "measure", "wanted", "reached", "within 15 %",
                     "constant MFU", "met"),
            rows=tuple(
                (r["set"], r["runs"], r["measure"], f"{r['wanted']:.0%}", f"{r['reached']:.1%}",
                 f"{r['within_15']:.0%}", f"{r['constant_mfu']:.1%}", r["met"])
                for r in errors
            ),
            caption="Error of the predicted step time, the model held out of the fit.",
        ),
        Table(
            columns=("configurations", "problems", "mean regret", "worst", "rank correlation",
                     "constant MFU's regret", "met (2 %)"),
            rows=tuple(
                (r["set"], r["problems"], f"{r['regret_mean']:.1%}", f"{r['regret_worst']:.1%}",
                 r["spearman_mean"], f"{r['constant_mfu_regret']:.1%}", r["met"])
                for r in regrets
            ),
            caption="Choice between measured configurations of one problem.",
        ),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def experiment(run: harness.Run) -> None:
    config: Config = run.config
    runs = published_runs()
    predicted = predict(run, runs, config.stacks)
    errors, regrets = accuracy(runs, predicted), choices(runs, predicted)
    shown = tables(errors, regrets)
    page = Report("Step time of measured runs", "every model predicted without its own runs")
    for table in shown:
        page.table(table)
    page.figure(
        plots.agreement(_series(runs, predicted), quantity="step time (s)"),
        "Each point is a run; on the line the prediction is the measurement.",
    )
    page.record("Config", harness.to_json(config)).write(run.folder / "report.html")
    run.finish({"accuracy": errors, "choice": regrets}, "\n".join(table.text() for table in shown))


def _series(
    runs: Sequence[Run], predicted: np.ndarray
) -> dict[str, tuple[list[float], list[float]]]:
    """Measured and predicted seconds of each set of runs, a run in the first that it belongs to."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for run, ours in zip(runs, predicted.tolist(), strict=True):
        if run.measured_s and np.isfinite(ours):
            name = next((goal.name for goal in GOALS if goal.chosen(run)), OTHER)
            measured, values = found.setdefault(name, ([], []))
            measured.append(run.measured_s)
            values.append(ours)
    return found


def main(argv: list[str] | None = None) -> None:
    config = harness.cli(
        Config,
        presets=PRESETS,
        argv=argv,
        prog="python -m experiments.planner_accuracy",
        description=__doc__,
    )
    harness.main(experiment, "planner_accuracy", config)


if __name__ == "__main__":
    main()
