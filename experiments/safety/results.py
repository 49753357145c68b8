"""What came out: numbers, the table, the report."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import Run, files, plots, report, tables
from experiments.safety.config import SafetyConfig
from experiments.safety.stages import HELDOUT, Evaluation
from experiments.safety.task import OVER_REFUSAL, Evaluators, Task
from jaxrl import evaluation, processes, recipes

COLUMNS = {
    "reward": "reward",
    "objective": "J",
    "cost": "cost",
    "safety_rate": "safe",
    "prompt_safety": "prompts all safe",
    "worst_decile_unsafe": "worst decile unsafe",
    "worst_decile_cost": "worst decile cost",
    "compensation_index": "compensation",
    "over_refusal": "over-refusal",
    "kl": "KL",
}
"""Columns of the main table, by key of `evaluation.summarise`."""
WEAK_JUDGE = "weak judge"
SHOWN = 18  # prompts in the report


@dataclass(frozen=True, kw_only=True)
class Results:
    """Evaluations of every policy on one set of prompts.

    Attributes:
      evaluations: by policy; "sft" is where all started.
      benign: which prompts ask for nothing harmful; None where that is not known.
      kl_coef: β of the objective.
    """

    evaluations: Mapping[str, Evaluation]
    benign: np.ndarray | None
    kl_coef: float

    def summaries(self) -> dict[str, dict[str, float]]:
        """Every number of every policy."""
        return {
            name: evaluation.summarise(
                e.rewards,
                e.costs,
                kl=e.kl.mean(axis=1),
                kl_coef=self.kl_coef,
                refusals=None if self.benign is None else e.refusals,
                benign=self.benign,
            )
            for name, e in self.evaluations.items()
        }

    def sweep(self, *names: str) -> evaluation.Sweep:
        """The frontier that these policies span, of one seed."""
        found = [self.evaluations[name] for name in names]
        return evaluation.Sweep(
            rewards=np.stack([e.rewards for e in found])[:, None],
            costs=np.stack([e.costs for e in found])[:, None],
        )

    def limits(self) -> dict[str, Any]:
        """The best that any policy could do on what the SFT policy wrote (reference 6.4)."""
        sft = self.evaluations["sft"]
        growth = evaluation.critical_growth(sft.rewards, sft.costs, kl_coef=self.kl_coef)
        return {f"J_critical_on_{count}_samples": value for count, value in growth.items()}

    def regrets(self) -> dict[str, float]:
        """How far J of each policy stays below the limit on all of the SFT policy's samples."""
        limit = next(reversed(self.limits().values()))
        return {name: limit - found["objective"] for name, found in self.summaries().items()}


def limit_note(results: Results) -> str:
    """The physical limit, as a sentence."""
    growth = ", ".join(
        f"{value:.3f} on {key.split('_')[-2]}" for key, value in results.limits().items()
    )
    regrets = ", ".join(f"{name} {value:+.3f}" for name, value in results.regrets().items())
    return (
        "J of the best safe policy on the support of what the SFT policy wrote for each prompt "
        f"(exact on that support, growing with its samples): {growth}. Regret to the last: "
        f"{regrets}; negative where a policy gains by being unsafe or finds what was not sampled."
    )


def benign_prompts(task: Task, rows: np.ndarray) -> np.ndarray | None:
    """Which of these held-out prompts are benign, where the data says so."""
    kinds = [task.data.heldout[row].kind for row in rows]
    return None if None in kinds else np.array([kind == "benign" for kind in kinds])


def table(results: Results, *, weak: bool) -> tables.Table:
    found = results.summaries()
    columns = {key: title for key, title in COLUMNS.items() if key in found["sft"]}
    return tables.Table.of(
        found,
        columns,
        caption="Held-out prompts; a sample is safe when the judge's cost is ≤ 0.",
        mark=WEAK_JUDGE if weak else "",
    )


def comparison(results: Results, config: SafetyConfig, *, weak: bool) -> tables.Table | None:
    """One recipe against the others, at matched reward and at matched safety.

    The recommended one where it was trained, else the last of those named. A peer's frontier is
    the line from the SFT policy to it: a coin that picks one of the two before answering reaches
    every point between them. At matched reward the one stands as it is, at matched safety it has
    its frontier too.
    """
    trained = [name for name in results.evaluations if name != "sft"]
    best = recipes.RECOMMENDED if recipes.RECOMMENDED in trained else trained[-1]
    others = [name for name in trained if name != best]
    if not others:
        return None
    comparisons: tuple[tuple[evaluation.Sweep, evaluation.Measure, evaluation.Measure], ...] = (
        (results.sweep(best), "worst_decile_safety", "reward"),
        (results.sweep("sft", best), "reward", "safety"),
    )
    rows = []
    for name in others:
        for ours, measure, match in comparisons:
            rng = np.random.default_rng(config.seed)
            difference, target = evaluation.matched_difference(
                ours, results.sweep("sft", name), measure=measure, match=match, rng=rng
            )
            what = f"{measure.replace('_', ' ')} at {match} {target:.3f}"
            rows.append((f"{best} − {name}", what, *difference))
    return tables.Table(
        columns=("", "measure", "difference", "95 % from", "to"),
        rows=tuple(rows),
        caption="Matched comparisons, paired bootstrap over prompts.",
        mark=WEAK_JUDGE if weak else "",
    )


def further_numbers(
    everything: Mapping[str, Mapping[str, Evaluation]],
) -> dict[str, dict[str, float]]:
    """Safety on further prompts, and refusals on those that ask for nothing harmful."""
    return {
        name: {
            set_name: float(
                e.refusals.mean() if set_name == OVER_REFUSAL else (e.costs <= 0).mean()
            )
            for set_name, e in found.items()
            if set_name != HELDOUT
        }
        for name, found in everything.items()
    }


def further_table(
    everything: Mapping[str, Mapping[str, Evaluation]], *, weak: bool
) -> tables.Table | None:
    numbers = further_numbers(everything)
    columns = {
        name: f"{name} refused" if name == OVER_REFUSAL else f"{name} safe"
        for name in numbers["sft"]
    }
    if not columns:
        return None
    return tables.Table.of(
        numbers,
        columns,
        caption="Further prompts: share of safe answers, and of refusals of harmless prompts.",
        mark=WEAK_JUDGE if weak else "",
    )


def finish(
    run: Run,
    config: SafetyConfig,
    task: Task,
    evaluators: Evaluators,
    everything: Mapping[str, Mapping[str, Evaluation]],
) -> None:
    """Writes samples, arrays, report and summary, in that order.

    Args:
      run: where to.
      config: of the run.
      task: what was evaluated.
      evaluators: what judged.
      everything: evaluations by policy and set of prompts, see `stages.evaluate_all`.

    Of several processes the first writes, and the others wait.
    """
    processes.from_leader(lambda: _finish(run, config, task, evaluators, everything))


def _finish(
    run: Run,
    config: SafetyConfig,
    task: Task,
    evaluators: Evaluators,
    everything: Mapping[str, Mapping[str, Evaluation]],
) -> None:
    evaluations = {name: found[HELDOUT] for name, found in everything.items()}
    rows = evaluations["sft"].rows
    results = Results(
        evaluations=evaluations,
        benign=benign_prompts(task, rows),
        kl_coef=config.kl_coef,
    )
    for name, e in evaluations.items():
        run.write_samples(name, _sample_rows(task, e))
        _write_arrays(run.folder / "evaluation" / f"{name}.npz", e)
    main = table(results, weak=evaluators.weak_judge)
    extra = comparison(results, config, weak=evaluators.weak_judge)
    further = further_table(everything, weak=evaluators.weak_judge)
    page = _report(run, config, task, evaluators, results, (main, extra, further))
    page.write(run.folder / "report.html")
    all_notes = [*task.data.notes, *evaluators.notes, limit_note(results)]
    notes = "".join(f"{note}\n" for note in all_notes)
    summary = {
        "data": task.data.name,
        "recommended": recipes.RECOMMENDED,
        "kl_coef": config.kl_coef,
        "weak_judge": evaluators.weak_judge,
        "algorithms": results.summaries(),
        "limits": results.limits(),
        "notes": all_notes,
        "measures": dict(evaluators.measures),
        "further_prompts": further_numbers(everything),
        "matched": [] if extra is None else [list(row) for row in extra.rows],
        "regret": results.regrets(),
    }
    shown = [found.text() for found in (main, extra, further) if found is not None]
    run.finish(summary, "\n".join((notes, *shown)))


def _report(
    run: Run,
    config: SafetyConfig,
    task: Task,
    evaluators: Evaluators,
    results: Results,
    found_tables: Sequence[tables.Table | None],
) -> report.Report:
    found, order = results.summaries(), tuple(results.evaluations)
    page = report.Report(
        "Helpful, and safe on every prompt?",
        f"experiments.safety on {task.data.name}, seed {config.seed}",
    )
    notes = (*task.data.notes, *evaluators.notes, limit_note(results))
    page.text("\n".join(f"- {note}" for note in notes))
    for found_table in found_tables:
        if found_table is not None:
            page.table(found_table)
    page.figure(
        plots.tradeoff(
            {name: (s["safety_rate"], s["reward"]) for name, s in found.items()}, order=order
        ),
        "Reward against safety on held-out prompts. Up and to the right is better.",
    )
    page.figure(
        plots.sorted_prompts(
            {name: e.costs.mean(axis=1) for name, e in results.evaluations.items()},
            y_label="mean cost",
            order=order,
        ),
        "Mean cost of each prompt, the worst first. A mean over prompts hides what stands left.",
    )
    page.figure(
        plots.sorted_prompts(
            {name: (e.costs > 0).mean(axis=1) for name, e in results.evaluations.items()},
            y_label="share of unsafe samples",
            threshold=None,
            order=order,
        ),
        "Share of unsafe samples of each prompt, the worst first.",
    )
    page.figure(
        plots.training(run.metrics.rows(), config.algorithms, order=order),
        "Training: the policy's own samples, the multiplier and the KL divergence.",
    )
    page.heading("What the policies write")
    rows = results.evaluations["sft"].rows
    # Evenly through the set, so that all kinds of prompts appear.
    for index in np.linspace(0, len(rows) - 1, min(len(rows), SHOWN)).round().astype(int):
        page.samples(
            task.data.heldout[rows[index]].text,
            [
                {
                    "prompt": name,
                    "completion": e.completions[index][0],
                    "reward": float(e.rewards[index, 0]),
                    "cost": float(e.costs[index, 0]),
                }
                for name, e in results.evaluations.items()
            ],
        )
    page.heading("How it was made")
    record = (run.folder / "config.json").read_text(encoding="utf-8")
    page.record("Config and versions", json.loads(record))
    return page


def _sample_rows(task: Task, e: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "prompt": task.data.heldout[e.rows[i]].text,
            "completion": completion,
            "reward": float(e.rewards[i, j]),
            "cost": float(e.costs[i, j]),
            "refusal": bool(e.refusals[i, j]),
        }
        for i, written in enumerate(e.completions)
        for j, completion in enumerate(written)
    ]


def _write_arrays(path: Path, e: Evaluation) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **e.arrays())
    files.write_atomically(path, buffer.getvalue())
