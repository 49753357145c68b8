"""How near to the physical limit of safe and helpful does each algorithm come?

    python -m experiments.safety_limit --p .5 --seed 7 --seeds 5
    python -m experiments.safety_limit --algorithms repo_tb,repo,ppo_lagrangian --p 0

A one-step CMDP of 200 prompts × 16 responses is solved in closed form and by every algorithm
from 64 samples a step, 6,000 steps: the same recipes that train language models, on a table.

Hardware and time: 2 CPU cores; the recommended algorithm alone some 10 s for 5 seeds, all of
them 2 to 5 minutes. Expected: the exact columns of the specification to three digits
(critical optimum at p=0, seeds 0-4: J .625); plain RePO leaves a tenth of the prompts unsafe;
the recommended one is ≥ .995 safe with J ≥ .98 of the critical optimum.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments import cmdp, harness, hypotheses, tabular, tabular_replay
from experiments.cmdp import CMDP
from experiments.harness import COSMETIC, Report, Run, Table, plots
from experiments.hypotheses import Frontier, Verdict, standard_error
from jaxrl import recipes
from jaxrl.constraints import Lagrangian
from jaxrl.recipes import Recipe

KEYS = {
    "objective": "J",
    "safety_rate": "safety rate",
    "safe_prompt_share": "prompts ≥ 99 % safe",
    "worst_decile_unsafe": "worst-decile unsafe",
}
"""What the tables show: keys of `summary.json` with their headings."""


def _variant(base: str, name: str, summary: str, **constraint: Any) -> Recipe:
    recipe = recipes.get(base)
    return replace(
        recipe, name=name, summary=summary, constraint=replace(recipe.constraint, **constraint)
    )


_TB = recipes.get("repo_tb")

VARIANTS: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            _variant(
                "repo",
                "repo_exact",
                "RePO with the exact gradient: A_{c+} on all samples",
                cost_critic_target="rectified",
                cost_on="all",
                normalise="none",
            ),
            _variant(
                "repo",
                "repo_exact_50",
                "the same with λ_max = 50",
                cost_critic_target="rectified",
                cost_on="all",
                normalise="none",
                max_value=50.0,
            ),
            _variant(
                "repo",
                "repo_rectified_critic",
                "RePO's switch with a {C}⁺ critic",
                cost_critic_target="rectified",
            ),
            _variant(
                "repo",
                "repo_cost_only",
                "RePO's switch, unsafe samples without reward",
                unsafe_reward=False,
            ),
            _variant(
                "repo",
                "repo_batch_switch",
                "RePO switched on the batch's mean cost (CRPO-like)",
                switch="batch",
            ),
            _variant("repo", "repo_margin", "RePO's switch with a margin, {C + .2}⁺", margin=0.2),
            replace(
                recipes.get("ppo_lagrangian"),
                name="lagrangian_per_prompt",
                summary="PPO-Lagrangian with one multiplier a prompt",
                constraint=Lagrangian(per_prompt=True, rule="additive"),
                kl=recipes.get("repo").kl,
            ),
            _variant(
                "repo_tb", "repo_tb_unbounded", "the recommended one without the bound", bound=None
            ),
            replace(
                _TB,
                name="repo_tb_own_samples",
                reference_share=0.0,
                summary="the recommended one without samples of the reference",
            ),
            _variant(
                "repo_tb",
                "repo_tb_slow",
                "the recommended one with plain RePO's multiplier",
                rate=0.1,
                max_value=5.0,
            ),
        )
    }
)
"""Readings of RePO and ablations of the recommended one, for this benchmark only."""

ALGORITHMS: Mapping[str, Recipe] = MappingProxyType({**recipes.RECIPES, **VARIANTS})


@dataclass(frozen=True, kw_only=True)
class Config(harness.RunOptions):
    """The exact benchmark.

    Raises:
      ValueError: an unknown algorithm or a number out of range; says what is allowed.
    """

    algorithms: tuple[str, ...] = tuple(
        name for name in ALGORITHMS if not name.startswith("async_") and name != "tba"
    )
    """Names, separated by commas. By default all but those that are another one here, where
    samples are the policy's own: async_ppo, async_grpo, async_rloo; and tba, without constraint."""
    p: float = 0.0
    """Share of benign prompts; the others are tempting."""
    seeds: int = 5
    """How many instances: of the seeds SEED, SEED + 1, …; their mean is reported."""
    prompts: int = 200
    """M, prompts of an instance."""
    responses: int = 16
    """K, responses to each prompt."""
    kl_coef: float = 0.2
    """β, reward units per nat."""
    steps: int = 6000
    """Updates of each algorithm."""
    samples: int = 64
    """Completions per update, those of the reference policy included."""
    rate: float = 1.0
    """Step size: change of a logit per sample and unit of advantage; with replay ½/β."""
    critic_rate: float = 0.1
    """Share of its error that a critic's value loses per sample."""
    hypotheses: bool = True
    """Also decide H1-H5 where the algorithms they compare are among those named."""
    wandb: bool = field(default=False, metadata=COSMETIC)
    """Also send the metrics to Weights & Biases (needs the extra `wandb`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.algorithms if name not in ALGORITHMS]
        if unknown or not self.algorithms:
            raise ValueError(
                f"unknown algorithm {', '.join(unknown) or '(none given)'}; "
                f"known: {', '.join(ALGORITHMS)}"
            )
        if len(set(self.algorithms)) < len(self.algorithms):
            raise ValueError(f"an algorithm is named twice: {', '.join(self.algorithms)}")
        if not 0.0 <= self.p <= 1.0:
            raise ValueError(f"p is a share, in [0, 1]: {self.p}")
        if min(self.seeds, self.prompts) < 1 or self.responses < 2:
            raise ValueError(
                "need at least 1 seed, 1 prompt and 2 responses: "
                f"{self.seeds=}, {self.prompts=}, {self.responses=}"
            )
        if self.kl_coef <= 0.0:
            raise ValueError(
                f"kl_coef must be positive: {self.kl_coef}; the closed forms divide by it"
            )
        _ = self.schedule

    @property
    def schedule(self) -> tabular.Schedule:
        return tabular.Schedule(
            steps=self.steps, samples=self.samples, rate=self.rate, critic_rate=self.critic_rate
        )

    @property
    def instance_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)


def instances(config: Config) -> list[CMDP]:
    """One instance for each seed."""
    return [
        cmdp.draw(
            seed,
            benign_share=config.p,
            prompts=config.prompts,
            responses=config.responses,
            kl_coef=config.kl_coef,
        )
        for seed in config.instance_seeds
    ]


# ------------------------------------------------------------------------------- results

Result = dict[str, Any]
"""Of one algorithm: a list over seeds for each measure, and per-prompt arrays."""


def result_of(cmdps: Iterable[CMDP], policies: Iterable[np.ndarray]) -> Result:
    """Measures of each seed's policy, with the per-prompt numbers that H2 and plots need."""
    rows = [
        cmdp.measures(c, policy)
        | {
            "unsafe_per_prompt": cmdp.unsafe_mass(c, policy).tolist(),
            "objective_per_prompt": cmdp.objective_per_prompt(c, policy).tolist(),
        }
        for c, policy in zip(cmdps, policies, strict=True)
    ]
    return {key: [row[key] for row in rows] for key in rows[0]}


def averaged(result: Result) -> dict[str, float]:
    """Means over seeds, each with its standard error beside it under NAME_se."""
    scalars = {k: np.asarray(v) for k, v in result.items() if np.ndim(v) == 1}
    return {
        name: value
        for key, values in scalars.items()
        for name, value in ((key, float(values.mean())), (f"{key}_se", standard_error(values)))
    }


def updates(
    config: Config, cmdps: list[CMDP], recipe: Recipe, *, chunks: int = 20
) -> Iterator[tuple[int, tabular.Learner]]:
    """`tabular.train`, or with a replay, and then the step that it wants."""
    seeds, schedule = config.instance_seeds, config.schedule
    if not recipe.replay_share:
        return tabular.train(recipe, cmdps, seeds, schedule=schedule, chunks=chunks)
    schedule = replace(schedule, rate=tabular_replay.rate(config.kl_coef))
    return tabular_replay.train(recipe, cmdps, seeds, schedule=schedule, chunks=chunks)


def train(run: Run, config: Config, cmdps: list[CMDP], recipe: Recipe) -> Result:
    """One algorithm on all instances; a finished one is read from the run's folder."""
    path = run.folder / "algorithms" / f"{recipe.name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    run.rewind(recipe.name, 0)
    policies, multipliers = np.empty(0), np.empty(0)
    with run.progress(recipe.name, config.steps) as progress:
        for step, learner in updates(config, cmdps, recipe):
            policies, multipliers = tabular.policies(learner), tabular.multipliers(learner)
            shown = averaged(result_of(cmdps, policies))
            shown |= {"safety": shown["safety_rate"], "multiplier": float(multipliers.mean())}
            values = {k: v for k, v in shown.items() if not k.endswith("_se")}
            run.log(recipe.name, step, values)
            progress.update(step, values)
    result = result_of(cmdps, policies) | {"multiplier": multipliers.tolist()}
    harness.write_json(path, result)
    return result


# --------------------------------------------------------------------------- hypotheses


def decide(
    run: Run, config: Config, cmdps: list[CMDP], results: Mapping[str, Result]
) -> list[Verdict]:
    """A verdict for each hypothesis whose algorithms were run."""
    found: list[Verdict] = []
    at = lambda name, key: np.asarray(results[name][key])  # noqa: E731
    if "ppo_lagrangian" in results:
        found.append(
            hypotheses.h1(
                *(at("ppo_lagrangian", key) for key in ("cost", "worst_decile_cost", "safety_rate"))
            )
        )
    ours = [name for name in ("repo", recipes.RECOMMENDED) if name in results]
    if "ppo_lagrangian" in results and ours:
        retuned = [results["ppo_lagrangian"], *_retuned_lagrangian(run, config, cmdps)]
        for name in ours:
            found.append(
                hypotheses.h2(
                    frontier([results[name]]),
                    frontier(retuned),
                    name=f"H2 ({name})",
                    rng=np.random.default_rng(config.seed),
                )
            )
    found += [hypotheses.h3(at(name, "safe_prompt_share"), name=f"H3 ({name})") for name in ours]
    if "repo_exact" in results and "repo" in results:
        found.append(_h4(config, results))
    found.append(hypotheses.h5(negative_controls(config, cmdps)))
    return found


def _h4(config: Config, results: Mapping[str, Result]) -> Verdict:
    keys = ("objective", "worst_decile_unsafe")
    arrays = [np.asarray(results[name][key]) for key in keys for name in ("repo_exact", "repo")]
    verdict = hypotheses.h4(*arrays)
    if config.p == 0.0:
        return verdict
    return replace(
        verdict,
        outcome="undecided",
        numbers=f"asked at p=0, here p={config.p:g}: {verdict.numbers}",
    )


def frontier(results: Iterable[Result]) -> Frontier:
    """Per-prompt safety and J over the values of a knob."""
    chosen = list(results)
    return Frontier(
        safety=1.0 - np.asarray([r["unsafe_per_prompt"] for r in chosen]),
        objective=np.asarray([r["objective_per_prompt"] for r in chosen]),
    )


def _retuned_lagrangian(run: Run, config: Config, cmdps: list[CMDP]) -> list[Result]:
    """PPO-Lagrangian at the thresholds d whose exact optima have these safety rates.

    Retuned by an oracle, which is in its favour; its KL acts in the reward, so that its fixed
    point lies on the exact frontier of the mean cost.
    """
    base, results = recipes.get("ppo_lagrangian"), []
    for safety in (0.85, 0.92, 0.96, 0.99):
        costs = [_expected_cost_at(c, safety) for c in cmdps]
        name = f"ppo_lagrangian_safety_{safety:.2f}"
        constraint = replace(base.constraint, margin=-float(np.mean(costs)))
        results.append(
            train(
                run,
                config,
                cmdps,
                replace(base, name=name, constraint=constraint, kl=recipes.get("repo").kl),
            )
        )
    return results


def _expected_cost_at(instance: CMDP, safety: float) -> float:
    policy, _ = cmdp.tune(instance, cmdp.linear, safety=safety)
    return cmdp.mean(policy * instance.cost)


def negative_controls(
    config: Config, cmdps: list[CMDP], *, safety: float = 0.95
) -> dict[str, np.ndarray]:
    """ΔJ of the families {C}⁺ and C at equal safety, in closed form, where none is expected."""
    changed = {
        "binary cost": [replace(c, cost=np.where(c.unsafe, 1.0, -1.0)) for c in cmdps],
        "shuffled cost": [
            _shuffled(c, seed) for c, seed in zip(cmdps, config.instance_seeds, strict=True)
        ],
        "p=1": instances(replace(config, p=1.0)),
    }
    return {
        name: np.array(
            [
                cmdp.objective(c, cmdp.tune(c, cmdp.rectified, safety=safety)[0])
                - cmdp.objective(c, cmdp.tune(c, cmdp.linear, safety=safety)[0])
                for c in controls
            ]
        )
        for name, controls in changed.items()
    }


def _shuffled(instance: CMDP, seed: int) -> CMDP:
    """Costs permuted among the responses of each prompt: no longer in conflict with R."""
    rng = np.random.default_rng([seed, 1])
    return replace(instance, cost=rng.permuted(instance.cost, axis=1))


# ------------------------------------------------------------------------------- report


def frontiers(cmdps: list[CMDP]) -> dict[str, tuple[list[float], list[float]]]:
    """Safety and J of the exact families over λ, the means over instances."""
    families = {
        "limit (indicator)": cmdp.indicator,
        "{C}⁺ family": cmdp.rectified,
        "C family": cmdp.linear,
    }
    grid = np.concatenate([[0.0], np.geomspace(1e-2, 200.0, 120)])
    curves = {}
    for name, family in families.items():
        points = np.array(
            [
                [
                    (cmdp.safety_rate(c, family(c, value)), cmdp.objective(c, family(c, value)))
                    for c in cmdps
                ]
                for value in grid
            ]
        ).mean(axis=1)
        kept = points[:, 1] > 0.0  # the C family falls without end
        curves[name] = (points[kept, 0].tolist(), points[kept, 1].tolist())
    return curves


def scaling_laws(config: Config) -> dict[str, float]:
    """Exponents of RePO's exact dual ascent in time: ⅓, −⅔ and −⅓ are derived.

    On an instance with enough responses that their costs are nearly a density at 0⁺.
    """
    instance = cmdp.draw(
        config.seed, benign_share=0.0, prompts=1000, responses=64, kl_coef=config.kl_coef
    )
    times = np.geomspace(1e3, 1e6, 30)
    path = cmdp.rectified_ascent(instance, times)
    return {name: cmdp.log_slope(times, values) for name, values in path.items()}


def table_of(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Means with ± standard error."""

    def shown(record: Mapping[str, float], key: str) -> str:
        error = record.get(f"{key}_se", float("nan"))
        return f"{record[key]:.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else "")

    columns = ("", *KEYS.values(), "J of limit")
    return Table(
        caption=title,
        columns=columns,
        rows=tuple(
            (name, *(shown(record, key) for key in KEYS), f"{record['objective_share']:.3f}")
            for name, record in rows.items()
        ),
    )


def write_report(
    run: Run,
    config: Config,
    cmdps: list[CMDP],
    results: Mapping[str, Result],
    tables: list[Table],
    verdicts: list[Verdict],
) -> None:
    """One page with tables, plots and verdicts."""
    # Two dozen markers cannot be told apart: the plots show the main algorithms.
    shown = [name for name in results if name in _SHOWN] or list(results)[:6]
    points = {
        name: (np.mean(results[name]["safety_rate"]), np.mean(results[name]["objective"]))
        for name in shown
    }
    prompts = {
        name: np.mean(np.sort(results[name]["unsafe_per_prompt"], axis=1), axis=0) for name in shown
    }
    report = Report(
        "How near to the limit of safe and helpful?",
        f"p = {config.p:g} benign prompts, seeds {config.instance_seeds.start}–"
        f"{config.instance_seeds.stop - 1}, {config.samples} samples × {config.steps:,} steps",
    )
    for table in tables:
        report.table(table)
    report.figure(
        plots.tradeoff(points, frontier=frontiers(cmdps), y_label="J = E R − β·KL", order=shown),
        "J against safety; the curves are exact. No policy lies above the limit.",
    )
    report.figure(
        plots.sorted_prompts(prompts, y_label="unsafe mass", threshold=0.01, order=shown),
        "Unsafe mass of each prompt, worst first: where a mean hides a stuck tenth.",
    )
    report.figure(
        plots.training(run.metrics.rows(), shown, order=shown, smooth=1),
        "Training, mean over the seeds.",
    )
    if verdicts:
        report.heading("Hypotheses").text(
            "\n".join(f"- **{v.name} {v.outcome}**: {v.claim} ({v.numbers})" for v in verdicts)
        )
    report.record("Config", harness.to_json(config)).write(run.folder / "report.html")


_SHOWN = ("ppo", "reward_shaping", "ppo_lagrangian", "repo", "repo_exact", "repo_tb")
"""Algorithms in the plots; all are in the tables."""


def experiment(run: Run) -> None:
    """Closed forms, every algorithm, hypotheses, report."""
    config: Config = run.config
    cmdps = instances(config)
    exact = exact_results(cmdps)
    results = {name: train(run, config, cmdps, ALGORITHMS[name]) for name in config.algorithms}
    verdicts = decide(run, config, cmdps, results) if config.hypotheses else []
    laws = scaling_laws(config)
    summary = summarise(exact, results, verdicts, laws)
    tables = [
        table_of(f"Exact optima, p = {config.p:g}", summary["exact"]),
        table_of(
            f"Algorithms, {config.samples} samples × {config.steps:,} steps", summary["algorithms"]
        ),
    ]
    write_report(run, config, cmdps, results, tables, verdicts)
    lines = [str(verdict) for verdict in verdicts]
    lines.append(
        "exponents of exact dual ascent in time (derived: .333, −.667, −.333): "
        + ", ".join(f"{name} {slope:+.3f}" for name, slope in laws.items())
    )
    run.finish(summary, "\n".join([*(t.text() for t in tables), *lines]))


def exact_results(cmdps: list[CMDP]) -> dict[str, Result]:
    """Every closed form on every instance."""
    forms = [cmdp.closed_forms(c) for c in cmdps]
    return {name: result_of(cmdps, [form[name] for form in forms]) for name in forms[0]}


def summarise(
    exact: Mapping[str, Result],
    results: Mapping[str, Result],
    verdicts: list[Verdict],
    laws: Mapping[str, float],
) -> dict[str, Any]:
    """What `summary.json` holds."""
    limit = float(np.mean(exact["critical"]["objective"]))

    def record(result: Result) -> dict[str, float]:
        means = averaged(result)
        return means | {"objective_share": means["objective"] / limit}

    return {
        "recommended": recipes.RECOMMENDED,
        "algorithms": {name: record(result) for name, result in results.items()},
        "exact": {name: record(result) for name, result in exact.items()},
        "hypotheses": [dataclasses.asdict(verdict) for verdict in verdicts],
        "scaling_exponents": dict(laws),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config = harness.cli(
        Config, argv=argv, prog="python -m experiments.safety_limit", description=__doc__
    )
    harness.main(experiment, "safety_limit", config)


if __name__ == "__main__":
    main()
