"""Runs the experiment: data → SFT → scorers → algorithms → evaluation → report."""

import dataclasses

from experiments import harness
from experiments.harness import Run
from experiments.safety import __doc__ as description
from experiments.safety import stages, task
from experiments.safety.config import PRESETS, SafetyConfig
from jaxrl import recipes


def experiment(run: Run) -> None:
    config: SafetyConfig = run.config
    data = task.load(config)
    for note in data.notes:
        run.note(note)
    work = task.build(config, data, run.folder)
    sft = stages.fine_tune(run, config, work)
    evaluators = task.exact_evaluators(data)
    policies = {"sft": sft}
    for name in config.algorithms:
        recipe = recipes.get(name)
        recipe = dataclasses.replace(
            recipe, kl=dataclasses.replace(recipe.kl, coef=config.kl_coef)
        )
        policies[name] = stages.train(run, config, work, evaluators, recipe, sft)
    for name, policy in policies.items():
        e = stages.evaluate(config, work, evaluators, policy, sft, work.heldout)
        unsafe = (e.costs > 0).mean(1)
        import numpy as np
        k=len(unsafe)//10
        print(name, "R", e.rewards.mean(), "C", e.costs.mean(), "safe", (e.costs <= 0).mean(), "allsafe", (unsafe==0).mean(), "worst", np.sort(unsafe)[-k:].mean(), "kl", e.kl.mean(), "refusal", e.refusals.mean(), "J", e.rewards.mean()-config.kl_coef*e.kl.mean())


def main(argv: list[str] | None = None) -> None:
    config = harness.cli(
        SafetyConfig,
        presets=PRESETS,
        argv=argv,
        prog="python -m experiments.safety",
        description=description,
    )
    harness.main(experiment, "safety", config)


if __name__ == "__main__":
    main()
