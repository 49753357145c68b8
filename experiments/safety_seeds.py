"""Does the recommended RePO beat its peers on generated text, seed after seed?

Question: on the embedded world, is the worst decile of prompts safer under the recommended
recipe than under plain RePO and PPO-Lagrangian *at the same reward*, over at least five seeds?
And which of the hypotheses H1-H3 hold there? (H4 and H5: experiments.safety_controls.)

    python -m experiments.safety_seeds                       # 5 seeds
    python -m experiments.safety_seeds --seeds 1 --steps 50  # a look

Each family is retuned: PPO-Lagrangian over thresholds d, RePO over margins δ (where asked), the
recommended one over bounds κ. A frontier is the upper hull of what a family reaches, the SFT
policy included; the recommended recipe as it stands is compared at its own reward, and the
frontiers at equal safety.

Hardware: two CPU cores, about half an hour. Started again with the same folder, it resumes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments import dry_run, harness, hypotheses
from experiments.harness import Run, RunOptions, plots, report, tables
from experiments.safety import stages, task
from experiments.safety.config import QUICK, SafetyConfig
from experiments.safety.results import COLUMNS
from experiments.safety.sizes import sizes
from experiments.safety.stages import Evaluation
from jaxrl import evaluation, recipes
from jaxrl.constraints import Rectified
from jaxrl.recipes import Recipe

LAGRANGIAN, REPO, BEST = "ppo_lagrangian", "repo", recipes.RECOMMENDED


def _own_bound() -> float:
    constraint = recipes.get(BEST).constraint
    assert isinstance(constraint, Rectified)
    assert constraint.bound is not None
    return constraint.bound


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.safety_seeds; the rest is as in the quick preset of experiments.safety."""

    seeds: int = 5
    """Training seeds, from --seed on."""
    data: str = QUICK.data
    """The embedded world, or one of its controls."""
    data_seed: int = QUICK.data_seed
    """Of the world itself; another one has other prompts, answers and stakes."""
    steps: int = QUICK.steps
    """Policy updates of each policy."""
    sft_steps: int = QUICK.sft.steps
    """Steps of supervised fine-tuning."""
    thresholds: tuple[float, ...] = (0.0, -1.0)
    """d of PPO-Lagrangian's E[C] ≤ d; 0 is the published one."""
    margins: tuple[float, ...] = (0.0,)
    """δ of plain RePO's {C + δ}⁺; 0 is the published one."""
    bounds: tuple[float, ...] = (_own_bound(), 6.0)
    """κ of the recommended recipe's bounded penalty, in nats; the first is the recipe's own."""
    samples: int = QUICK.evaluation.samples
    """Completions of each held-out prompt in the evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1 or 0.0 not in self.thresholds or 0.0 not in self.margins:
            raise ValueError(
                "at least one seed, and 0 among thresholds and margins, are needed: "
                f"{self.seeds=}, {self.thresholds=}, {self.margins=}"
            )

    def of_seed(self, seed: int) -> SafetyConfig:
        """The safety experiment of one seed."""
        return replace(
            QUICK,
            seed=seed,
            data=self.data,
            data_seed=self.data_seed,
            steps=self.steps,
            sft=replace(QUICK.sft, steps=self.sft_steps),
            evaluation=replace(QUICK.evaluation, samples=self.samples),
        )


def variants(config: Config) -> dict[str, list[Recipe]]:
    """Recipes by family; the first of each family is the one that carries its name."""
    repo, best = map(recipes.get, (REPO, BEST))
    return {
        LAGRANGIAN: [retuned(d) for d in sorted(config.thresholds, key=abs)],
        REPO: [
            replace(repo, name=_named(REPO, "margin", m),
                    constraint=replace(repo.constraint, margin=m))
            for m in sorted(config.margins)
        ],
        BEST: [
            replace(best, name=BEST if k == _own_bound() else f"{BEST} bound={k:g}",
                    constraint=replace(best.constraint, bound=k))
            for k in config.bounds
        ],
    }  # fmt: skip


def retuned(threshold: float) -> Recipe:
    """PPO-Lagrangian with E[C] ≤ d for another d than 0."""
    recipe = recipes.get(LAGRANGIAN)
    return replace(
        recipe,
        name=_named(LAGRANGIAN, "d", threshold),
        constraint=replace(recipe.constraint, margin=-threshold),
    )


def _named(family: str, knob: str, value: float) -> str:
    return f"{family} {knob}={value:g}" if value else family


def run_seed(
    run: Run, one: SafetyConfig, folder: Path, policies: Iterable[Recipe]
) -> dict[str, Evaluation]:
    """Every policy of one seed on its held-out prompts, the SFT policy first.

    In a folder of its own that resumes by itself.
    """
    with Run.open("safety_seed", one, folder, stream=run.stream) as part:
        data = task.load(one)
        work = task.build(one, data, part.folder)
        evaluators = task.exact_evaluators(data)
        sft = stages.fine_tune(part, one, work)
        found = {"sft": stages.evaluate_all(one, work, evaluators, sft, sft)[stages.HELDOUT]}
        for recipe in policies:
            anchored = replace(recipe, kl=recipe.kl.constant(one.kl_coef))
            policy = stages.train(part, one, work, evaluators, anchored, sft)
            found[recipe.name] = stages.evaluate_all(one, work, evaluators, policy, sft)[
                stages.HELDOUT
            ]
    return found


@dataclass(frozen=True, kw_only=True)
class Study:
    """Evaluations of every policy for every seed."""

    config: Config
    kl_coef: float
    seeds: list[dict[str, Evaluation]]

    def summaries(self) -> dict[str, dict[str, np.ndarray]]:
        """Every number by policy, one value for each seed."""
        found = {}
        for name in self.seeds[0]:
            each = [
                evaluation.summarise(
                    s[name].rewards, s[name].costs, kl=s[name].kl.mean(1), kl_coef=self.kl_coef
                )
                for s in self.seeds
            ]
            found[name] = {key: np.array([one[key] for one in each]) for key in each[0]}
        return found

    def sweep(self, family: str, *, only_first: bool = False) -> evaluation.Sweep:
        """What a family reaches over its knob, from the SFT policy on; or its first alone."""
        recipes_of = [recipe.name for recipe in variants(self.config)[family]]
        names = recipes_of[:1] if only_first else ["sft", *recipes_of]

        def stack(field: str) -> np.ndarray:
            return np.stack(
                [np.stack([getattr(s[name], field) for s in self.seeds]) for name in names]
            )

        return evaluation.Sweep(
            rewards=stack("rewards"),
            costs=stack("costs"),
            kl=stack("kl").mean(-1),
            kl_coef=self.kl_coef,
        )

    def matched(self) -> dict[str, dict[str, float]]:
        """The recommended recipe minus each family.

        Its worst decile as it stands, where the peer's frontier has its reward; and the rewards
        of the two frontiers at the largest safety that both reach.
        """
        found = {}
        as_it_stands = self.sweep(BEST, only_first=True)
        comparisons: tuple[tuple[evaluation.Sweep, evaluation.Measure, evaluation.Measure], ...] = (
            (as_it_stands, "worst_decile_safety", "reward"),
            (self.sweep(BEST), "reward", "safety"),
        )
        for ours, measure, match in comparisons:
            for family in (LAGRANGIAN, REPO):
                rng = np.random.default_rng(self.config.seed)
                difference, target = evaluation.matched_difference(
                    ours, self.sweep(family), measure=measure, match=match, rng=rng
                )
                row = f"{measure.replace('_', ' ')} at equal {match}: {BEST} − {family}"
                found[row] = {"at": target, **difference._asdict()}
        return found

    def verdicts(self) -> list[hypotheses.Verdict]:
        """H1-H3 on generated text; H4 and H5 are those of experiments.safety_controls."""
        s = self.summaries()
        rng = np.random.default_rng(self.config.seed)

        def frontier(family: str) -> hypotheses.Frontier:
            sweep = self.sweep(family)
            return hypotheses.Frontier(
                safety=sweep.per_prompt("safety"), objective=sweep.per_prompt("objective")
            )

        lagrangian = s[LAGRANGIAN]
        return [
            hypotheses.h1(
                lagrangian["cost"], lagrangian["worst_decile_cost"], lagrangian["safety_rate"]
            ),
            hypotheses.h2(frontier(REPO), frontier(LAGRANGIAN), name=f"H2 ({REPO})", rng=rng),
            hypotheses.h2(frontier(BEST), frontier(LAGRANGIAN), name=f"H2 ({BEST})", rng=rng),
            hypotheses.h3(s[REPO]["prompt_safety"], name=f"H3 ({REPO})"),
            hypotheses.h3(s[BEST]["prompt_safety"], name=f"H3 ({BEST})"),
        ]


def experiment(run: Run) -> None:
    config: Config = run.config
    seeds = range(config.seed, config.seed + config.seeds)
    policies = [recipe for family in variants(config).values() for recipe in family]
    found = [
        run_seed(run, config.of_seed(seed), run.folder / f"seed-{seed}", policies) for seed in seeds
    ]
    study = Study(config=config, kl_coef=QUICK.kl_coef, seeds=found)
    summaries, matched, verdicts = study.summaries(), study.matched(), study.verdicts()
    main = _main_table(summaries)
    differences = tables.Table.of(
        matched,
        {"at": "at", "estimate": "difference", "low": "95 % from", "high": "to"},
        caption="Paired bootstrap over prompts × seeds.",
    )
    _report(run, study, main, differences, verdicts).write(run.folder / "report.html")
    lines = "\n".join(str(verdict) for verdict in verdicts)
    run.finish(
        {
            "recommended": BEST,
            "seeds": list(seeds),
            "algorithms": {
                name: {
                    **{key: float(values.mean()) for key, values in s.items()},
                    **{f"{k}_se": hypotheses.standard_error(values) for k, values in s.items()},
                }
                for name, s in summaries.items()
            },
            "matched": matched,
            "hypotheses": [vars(verdict) for verdict in verdicts],
        },
        f"{main.text()}\n{differences.text()}\n{lines}\n",
    )


def _main_table(summaries: Mapping[str, Mapping[str, np.ndarray]]) -> tables.Table:
    def text(values: np.ndarray) -> str:
        return f"{values.mean():.3f} ± {hypotheses.standard_error(values):.3f}"

    rows = {name: {key: text(values) for key, values in s.items()} for name, s in summaries.items()}
    columns = {key: title for key, title in COLUMNS.items() if key in rows["sft"]}
    return tables.Table.of(
        rows, columns, caption="Held-out prompts; means over seeds ± their standard errors."
    )


def _report(
    run: Run,
    study: Study,
    main: tables.Table,
    differences: tables.Table,
    verdicts: list[hypotheses.Verdict],
) -> report.Report:
    s, order = study.summaries(), tuple(study.seeds[0])
    page = report.Report(
        "The recommended RePO against its peers", f"{len(study.seeds)} seeds, embedded world"
    )
    page.table(main).table(differences)
    page.text("\n".join(f"- {verdict}" for verdict in verdicts))
    page.figure(
        plots.tradeoff(
            {n: (1 - v["worst_decile_unsafe"].mean(), v["reward"].mean()) for n, v in s.items()},
            errors={
                n: (
                    hypotheses.standard_error(v["worst_decile_unsafe"]),
                    hypotheses.standard_error(v["reward"]),
                )
                for n, v in s.items()
            },
            x_label="safety of the worst decile of prompts",
            order=order,
        ),
        "Reward against the safety of the worst decile; standard errors over seeds.",
    )
    page.figure(
        plots.sorted_prompts(
            {
                name: np.mean(
                    [np.sort((seed[name].costs > 0).mean(1)) for seed in study.seeds], axis=0
                )
                for name in ("sft", LAGRANGIAN, REPO, BEST)
            },
            y_label="share of unsafe samples",
            threshold=None,
            order=order,
        ),
        "Share of unsafe samples of each prompt, the worst first, averaged over seeds by rank.",
    )
    page.record("Config", harness.to_json(run.config))
    return page


def main(argv: list[str] | None = None) -> None:
    if dry_run.hand_over(Config, lambda config: sizes(config.of_seed(config.seed)), argv=argv):
        return
    config = harness.cli(
        Config,
        presets={"quick": Config()},
        argv=argv,
        prog="python -m experiments.safety_seeds",
        description=__doc__,
    )
    harness.main(experiment, "safety_seeds", config)


if __name__ == "__main__":
    main()
