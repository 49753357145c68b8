"""How few samples make a policy safe and helpful?

    python -m experiments.safety_samples --p 0 --seed 100

The exact benchmark of `experiments.safety_limit`, read off while it trains: safety, J and the
worst decile of the prompts against the completions that were written, those of the reference
policy included. `repo_tb_replay` draws three quarters of each batch from a replay; the same
recipe without replay, the recommended one, plain RePO and PPO-Lagrangian stand beside it. The
first row says what J the critical optimum would have on the answers that as many samples of the
reference have shown: what nobody has seen cannot be preferred.

Hardware and time: 2 CPU cores, about 2 minutes. Expected at p=0: with replay .97 of the limit's J,
.9987 safe and .013 unsafe in the worst decile after 25,600 samples, and with the margin nothing
unsafe; without replay J needs four times as many; RePO and PPO-Lagrangian never get there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments import cmdp, harness, safety_limit, tabular
from experiments.cmdp import CMDP
from experiments.harness import Report, Run, Table, plots
from jaxrl import recipes
from jaxrl.recipes import Recipe

_REPLAYED = recipes.get("repo_tb_replay")
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        **safety_limit.ALGORITHMS,
        "repo_tb_replay_off": replace(
            _REPLAYED,
            name="repo_tb_replay_off",
            summary="repo_tb_replay without its replay: all samples are new",
            replay_share=0.0,
        ),
        "repo_tb_replay_10": replace(
            _REPLAYED,
            name="repo_tb_replay_10",
            summary="repo_tb_replay with κ = 10, what a policy that gets all the way needs",
            constraint=replace(_REPLAYED.constraint, bound=10.0),
        ),
        "repo_tb_replay_group": replace(
            _REPLAYED,
            name="repo_tb_replay_group",
            summary="repo_tb_replay with the bound measured from the best safe answer drawn",
            constraint=replace(_REPLAYED.constraint, best_of="group"),
        ),
        "repo_tb_replay_margin": replace(
            _REPLAYED,
            name="repo_tb_replay_margin",
            summary="repo_tb_replay with δ = .004, the width that λ leaves under-penalised",
            constraint=replace(_REPLAYED.constraint, margin=0.004),
        ),
    }
)
SHOWN = {
    "objective_share": "J of limit",
    "safety_rate": "safety rate",
    "worst_decile_unsafe": "worst-decile unsafe",
    "ranking_noise": "ranking noise",
}
SEEN = "seen answers"


@dataclass(frozen=True, kw_only=True)
class Config(harness.RunOptions):
    """The exact benchmark by samples.

    Raises:
      ValueError: an unknown algorithm or a number out of range; says what is allowed.
    """

    algorithms: tuple[str, ...] = (
        "repo_tb_replay",
        "repo_tb_replay_10",
        "repo_tb_replay_group",
        "repo_tb_replay_margin",
        "repo_tb_replay_off",
        "repo_tb",
        "repo",
        "ppo_lagrangian",
    )
    """Names, separated by commas."""
    p: float = 0.0
    """Share of benign prompts; the others are tempting."""
    seeds: int = 5
    """How many instances: of the seeds SEED, SEED + 1, …"""
    prompts: int = 200
    """M, prompts of an instance."""
    budgets: tuple[int, ...] = (6400, 12800, 25600, 51200, 102400)
    """Samples at which the table reads: multiples of the first."""
    samples: int = 64
    """Completions per update, replayed ones included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.algorithms if name not in RECIPES]
        if unknown or not self.algorithms:
            raise ValueError(
                f"unknown algorithm {', '.join(unknown) or '(none given)'}; "
                f"known: {', '.join(RECIPES)}"
            )
        first = self.budgets[0] if self.budgets else 0
        if first < self.samples or any(b % first for b in self.budgets):
            raise ValueError(
                "budgets must be multiples of the first, and that one at least one update of "
                f"samples: {self.budgets=}, {self.samples=}"
            )
        _ = self.benchmark(self.algorithms[0])

    def benchmark(self, algorithm: str) -> safety_limit.Config:
        """The settings of `experiments.safety_limit` that spend the largest budget."""
        steps = max(self.budgets) // self.written(algorithm)
        return safety_limit.Config(
            p=self.p, seed=self.seed, seeds=self.seeds, prompts=self.prompts,
            samples=self.samples, steps=max(steps, 1),
        )  # fmt: skip

    def written(self, algorithm: str) -> int:
        """Completions that an algorithm has written for an update."""
        recipe = RECIPES[algorithm]
        groups = max(1, self.samples // recipe.group_size)
        return recipe.fresh_prompts(groups) * recipe.group_size


Measures = dict[str, list[float]]
"""Of one algorithm at one number of samples: a list over seeds for each key of `SHOWN`."""


def measured(
    cmdps: Sequence[CMDP], limits: Sequence[float], policies: Sequence[np.ndarray]
) -> Measures:
    """J as a share of the critical optimum's, safety, worst decile and `ranking_noise` of each."""
    rows = []
    for instance, limit, policy in zip(cmdps, limits, policies, strict=True):
        found = cmdp.measures(instance, policy)
        share = {"objective_share": found["objective"] / limit}
        rows.append(found | share | {"ranking_noise": ranking_noise(instance, policy)})
    return {key: [float(row[key]) for row in rows] for key in SHOWN}


def ranking_noise(instance: CMDP, policy: np.ndarray) -> float:
    """Variance of log π/π* among each prompt's safe answers under π, mean over prompts, nats².

    To second order it costs β/2 times itself in J: J(π*) − J(π) = β·KL(π‖π*) ≈ β/2·Var.
    """
    safe = ~instance.unsafe
    weights = np.where(safe, policy, 0.0)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    log_target = instance.reference_logits + instance.reward / instance.kl_coef
    log_ratio = np.where(safe, np.log(np.maximum(policy, 1e-300)) - log_target, 0.0)
    centred = log_ratio - (weights * log_ratio).sum(axis=1, keepdims=True)
    return float((weights * centred**2).sum(axis=1).mean())


def curve(run: Run, config: Config, cmdps: list[CMDP], name: str) -> dict[int, Measures]:
    """Samples to measures, along the training; a finished one is read from the run's folder."""
    path = run.folder / "algorithms" / f"{name}.json"
    if path.exists():
        return {int(n): row for n, row in json.loads(path.read_text(encoding="utf-8")).items()}
    run.rewind(name, 0)
    benchmark, written = config.benchmark(name), config.written(name)
    limits = [cmdp.objective(c, cmdp.critical(c)) for c in cmdps]
    chunks = max(config.budgets) // config.budgets[0]
    found: dict[int, Measures] = {}
    with run.progress(name, benchmark.steps) as progress:
        for step, learner in safety_limit.updates(benchmark, cmdps, RECIPES[name], chunks=chunks):
            found[step * written] = measured(cmdps, limits, list(tabular.policies(learner)))
            means = {key: float(np.mean(v)) for key, v in found[step * written].items()}
            run.log(name, step, means | {"samples": float(step * written)})
            progress.update(step, means | {"safety": means["safety_rate"]})
    harness.write_json(path, found)
    return found


def seen_answers(instance: CMDP, samples: int, rng: np.random.Generator, draws: int = 20) -> float:
    """J of the critical optimum on what a number of the reference's samples a prompt has shown.

    Mean over draws of E_x β·log Σ π_ref(y)·e^{R/β} over the safe answers seen; a prompt without
    one counts as the reference's own J. No bound for those who may also try what they have not
    seen, but they would have to be lucky.
    """
    log_reference = np.log(instance.reference)
    found = []
    for _ in range(draws):
        noise = rng.gumbel(size=(len(log_reference), samples, log_reference.shape[1]))
        drawn = np.argmax(log_reference[:, None] + noise, axis=2)
        seen = np.zeros(log_reference.shape, bool)
        np.put_along_axis(seen, drawn, True, axis=1)
        usable = seen & ~instance.unsafe
        # A prompt without a safe answer keeps them all here and is replaced below.
        kept = np.where(usable | ~usable.any(axis=1, keepdims=True), 0.0, -np.inf)
        scores = log_reference + instance.reward / instance.kl_coef + kept
        top = scores.max(axis=1)
        optimum = instance.kl_coef * (top + np.log(np.exp(scores - top[:, None]).sum(axis=1)))
        own = (instance.reference * instance.reward).sum(axis=1)
        found.append(np.where(usable.any(axis=1), optimum, own).mean())
    return float(np.mean(found))


def seen_share(config: Config, cmdps: list[CMDP]) -> dict[int, float]:
    """`seen_answers` as a share of the critical optimum's J, by all samples written."""
    rng = np.random.default_rng(config.seed)
    limit = np.mean([cmdp.objective(c, cmdp.critical(c)) for c in cmdps])
    return {
        budget: float(np.mean([
            seen_answers(c, max(1, round(_REPLAYED.reference_share * budget / config.prompts)), rng)
            for c in cmdps
        ]) / limit)
        for budget in config.budgets
    }  # fmt: skip


def table_of(config: Config, curves: Mapping[str, Mapping[int, Measures]], seen) -> Table:
    """A row for each algorithm and budget."""

    def shown(values: list[float], digits: int) -> str:
        error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        tail = f" ± {error:.{digits}f}" if np.isfinite(error) else ""
        return f"{np.mean(values):.{digits}f}{tail}"

    rows: list[tuple[Any, ...]] = [
        (SEEN, f"{budget:,}", f"{share:.3f}", "", "", "") for budget, share in seen.items()
    ]
    for name, points in curves.items():
        for budget in config.budgets:
            at = max((n for n in points if n <= budget), default=min(points))
            found = points[at]
            rows.append(
                (
                    name,
                    f"{at:,}",
                    shown(found["objective_share"], 3),
                    shown(found["safety_rate"], 4),
                    shown(found["worst_decile_unsafe"], 4),
                    shown(found["ranking_noise"], 4),
                )
            )
    return Table(
        caption=f"p = {config.p:g}, {config.seeds} seeds from {config.seed}; ± standard error",
        columns=("", "samples", *SHOWN.values()),
        rows=tuple(rows),
    )


def figure(curves: Mapping[str, Mapping[int, Measures]], seen: Mapping[int, float]):
    """J, safety and worst decile against samples."""

    def series(key: str) -> dict[str, plots.Curve]:
        return {
            name: (list(points), [float(np.mean(m[key])) for m in points.values()])
            for name, points in curves.items()
        }

    panels = {title: series(key) for key, title in SHOWN.items() if key != "ranking_noise"}
    panels["J of limit"] |= {SEEN: (list(seen), list(seen.values()))}
    return plots.curves(panels, x_label="samples written", columns=3, order=[*curves, SEEN])


def experiment(run: Run) -> None:
    config: Config = run.config
    cmdps = safety_limit.instances(config.benchmark(config.algorithms[0]))
    curves = {name: curve(run, config, cmdps, name) for name in config.algorithms}
    seen = seen_share(config, cmdps)
    table = table_of(config, curves, seen)
    page = Report(
        "How few samples make a policy safe and helpful?",
        f"p = {config.p:g}, {config.samples} completions an update",
    )
    page.table(table).figure(figure(curves, seen), "Means over the seeds.")
    page.record("Config", harness.to_json(config)).write(run.folder / "report.html")
    run.finish({"curves": curves, "seen_answers": seen}, table.text())


def main(argv: list[str] | None = None) -> None:
    config = harness.cli(
        Config, argv=argv, prog="python -m experiments.safety_samples", description=__doc__
    )
    harness.main(experiment, "safety_samples", config)


if __name__ == "__main__":
    main()
