"""Runs the experiment: data → SFT → scorers → algorithms → evaluation → report."""

from experiments import dry_run, harness
from experiments.harness import Run
from experiments.safety import __doc__ as description
from experiments.safety import results, scorers, stages, task
from experiments.safety.config import PRESETS, SafetyConfig


def experiment(run: Run) -> None:
    config: SafetyConfig = run.config
    data = task.load(config)
    for note in data.notes:
        run.note(note)
    work = task.build(config, data, run.folder)
    sft = stages.fine_tune(run, config, work)
    if data.is_exact:
        evaluators = task.exact_evaluators(data)
    else:
        evaluators = scorers.learned_evaluators(run, config, work, sft)
    evaluations = {}
    for name in ("sft", *config.algorithms):
        policy = sft if name == "sft" else _train(run, config, work, evaluators, name, sft)
        evaluations[name] = stages.evaluate_all(config, work, evaluators, policy, sft)
    results.finish(run, config, work, evaluators, evaluations)


def _train(run, config, work, evaluators, name, sft) -> stages.Policy:
    return stages.train(run, config, work, evaluators, config.recipe(name), sft)


def main(argv: list[str] | None = None) -> None:
    if dry_run.hand_over(argv):
        return
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
