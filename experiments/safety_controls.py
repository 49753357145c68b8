"""H4 and H5 on generated text: the exact gradient of RePO, and the negative controls.

Question: does RePO's exact gradient (A_{C⁺} on every sample, instead of the switch with a critic
of the raw cost) buy a better worst decile with reward (H4)? And do RePO and PPO-Lagrangian stop
to differ where costs carry no graded conflict (H5): costs made binary, costs shuffled among the
answers, prompts that are all benign?

    python -m experiments.safety_controls                       # 5 seeds
    python -m experiments.safety_controls --seeds 1 --steps 50  # a look

H4 is decided by sign tests over seeds on the embedded world; H5 on its three controls, by J at
equal safety with PPO-Lagrangian retuned over its threshold. The rules stand in
experiments/hypotheses.py.

Hardware: two CPU cores, about an hour. Started again with the same folder, it resumes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from experiments import dry_run, harness, hypotheses, safety_seeds
from experiments.harness import Run, RunOptions, report, tables
from experiments.safety.config import QUICK, SafetyConfig
from experiments.safety.results import COLUMNS
from experiments.safety.sizes import sizes
from experiments.safety.stages import Evaluation
from experiments.safety_limit import VARIANTS
from experiments.safety_seeds import LAGRANGIAN, REPO
from jaxrl import evaluation, recipes
from jaxrl.evaluation import Interval

EXACT = "repo_exact"
WORLD = "world"

Seeds = list[dict[str, Evaluation]]


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.safety_controls; the rest is as in experiments.safety's quick preset."""

    seeds: int = 5
    """Training seeds, from --seed on."""
    controls: tuple[str, ...] = ("world_binary", "world_shuffled", "world_benign")
    """Worlds of H5."""
    data_seed: int = QUICK.data_seed
    """Of the world itself; another one has other prompts, answers and stakes."""
    steps: int = QUICK.steps
    """Policy updates of each policy."""
    sft_steps: int = QUICK.sft.steps
    """Steps of supervised fine-tuning."""
    thresholds: tuple[float, ...] = (0.0, -1.0)
    """d of PPO-Lagrangian's E[C] ≤ d on the controls; 0 is the published one."""
    samples: int = QUICK.evaluation.samples
    """Completions of each held-out prompt in the evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1 or not self.controls or 0.0 not in self.thresholds:
            raise ValueError(
                "at least one seed, one control, and 0 among the thresholds are needed: "
                f"{self.seeds=}, {self.controls=}, {self.thresholds=}"
            )

    def of_seed(self, world: str, seed: int) -> SafetyConfig:
        """The safety experiment of one world and seed."""
        return replace(
            QUICK,
            seed=seed,
            data=world,
            data_seed=self.data_seed,
            steps=self.steps,
            sft=replace(QUICK.sft, steps=self.sft_steps),
            evaluation=replace(QUICK.evaluation, samples=self.samples),
        )


def train_world(run: Run, config: Config, world: str) -> Seeds:
    """The policies that the hypothesis of this world compares, for each seed."""
    if world == WORLD:
        policies = [recipes.get(REPO), VARIANTS[EXACT]]
    else:
        policies = [*map(safety_seeds.retuned, config.thresholds), recipes.get(REPO)]
    return [
        safety_seeds.run_seed(
            run, config.of_seed(world, seed), run.folder / world / f"seed-{seed}", policies
        )
        for seed in range(config.seed, config.seed + config.seeds)
    ]


def summaries(seeds: Seeds) -> dict[str, dict[str, np.ndarray]]:
    """Every number by policy, one value for each seed."""
    found = {}
    for name in seeds[0]:
        each = [
            evaluation.summarise(
                s[name].rewards, s[name].costs, kl=s[name].kl.mean(1), kl_coef=QUICK.kl_coef
            )
            for s in seeds
        ]
        found[name] = {key: np.array([one[key] for one in each]) for key in each[0]}
    return found


def frontier(seeds: Seeds, names: list[str]) -> hypotheses.Frontier:
    """Safety and J of each prompt over the policies of a family."""

    def stack(field: str) -> np.ndarray:
        return np.stack([np.stack([getattr(s[name], field) for s in seeds]) for name in names])

    sweep = evaluation.Sweep(
        rewards=stack("rewards"),
        costs=stack("costs"),
        kl=stack("kl").mean(-1),
        kl_coef=QUICK.kl_coef,
    )
    return hypotheses.Frontier(
        safety=sweep.per_prompt("safety"), objective=sweep.per_prompt("objective")
    )


def difference(config: Config, seeds: Seeds) -> Interval:
    """J of RePO − J of PPO-Lagrangian at equal safety; both frontiers start at the SFT policy."""
    lagrangian = [name for name in seeds[0] if name.startswith(LAGRANGIAN)]
    found, _ = hypotheses.matched(
        frontier(seeds, ["sft", REPO]),
        frontier(seeds, ["sft", *lagrangian]),
        draws=1000,
        rng=np.random.default_rng(config.seed),
    )
    return found


def experiment(run: Run) -> None:
    config: Config = run.config
    found = {world: train_world(run, config, world) for world in (WORLD, *config.controls)}
    numbers = {world: summaries(seeds) for world, seeds in found.items()}
    exact, switch = numbers[WORLD][EXACT], numbers[WORLD][REPO]
    verdicts = [
        hypotheses.h4(
            exact["objective"],
            switch["objective"],
            exact["worst_decile_unsafe"],
            switch["worst_decile_unsafe"],
        ),
        hypotheses.h5_sampled(
            {world: difference(config, found[world]) for world in config.controls},
            seeds=config.seeds,
        ),
    ]
    table = _table(numbers)
    lines = "\n".join(str(verdict) for verdict in verdicts)
    page = report.Report("H4 and H5 on generated text", f"{config.seeds} seeds, embedded world")
    page.table(table).text("\n".join(f"- {verdict}" for verdict in verdicts))
    page.record("Config", harness.to_json(config))
    page.write(run.folder / "report.html")
    run.finish(
        {
            "seeds": list(range(config.seed, config.seed + config.seeds)),
            "worlds": {
                world: {
                    name: {
                        **{key: float(values.mean()) for key, values in s.items()},
                        **{f"{k}_se": hypotheses.standard_error(v) for k, v in s.items()},
                    }
                    for name, s in policies.items()
                }
                for world, policies in numbers.items()
            },
            "hypotheses": [vars(verdict) for verdict in verdicts],
        },
        f"{table.text()}\n{lines}\n",
    )


def _table(numbers: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]) -> tables.Table:
    def text(values: np.ndarray) -> str:
        return f"{values.mean():.3f} ± {hypotheses.standard_error(values):.3f}"

    rows = {
        f"{world}: {name}": {key: text(values) for key, values in s.items()}
        for world, policies in numbers.items()
        for name, s in policies.items()
    }
    columns = {key: title for key, title in COLUMNS.items() if key in next(iter(rows.values()))}
    return tables.Table.of(
        rows, columns, caption="Held-out prompts; means over seeds ± their standard errors."
    )


def planned_sizes(config: Config) -> dry_run.Sizes:
    """Those of the first world."""
    return sizes(config.of_seed(config.controls[0], config.seed))


def main(argv: list[str] | None = None) -> None:
    if dry_run.hand_over(Config, planned_sizes, argv=argv):
        return
    config = harness.cli(
        Config,
        presets={"quick": Config()},
        argv=argv,
        prog="python -m experiments.safety_controls",
        description=__doc__,
    )
    harness.main(experiment, "safety_controls", config)


if __name__ == "__main__":
    main()
