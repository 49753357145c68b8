"""Runs the experiment: problems → SFT → methods → simulations → report."""

from experiments import dry_run, harness
from experiments.asynchrony import __doc__ as description
from experiments.asynchrony import policies, results, task, training
from experiments.asynchrony.config import METHODS, PRESETS, AsynchronyConfig
from experiments.harness import Run


def experiment(run: Run) -> None:
    config: AsynchronyConfig = run.config
    work, note = task.build(config, task.load(config), run.folder)
    if note:
        run.note(note)
    sft = policies.fine_tune(run, config, work)
    trained = {
        name: training.train(run, config, work, sft, METHODS[name]) for name in config.methods
    }
    results.finish(run, config, trained)


def sizes(config: AsynchronyConfig) -> dry_run.Sizes:
    """The most asynchronous method, over the link of the simulations."""
    method = max((METHODS[name] for name in config.methods), key=lambda m: m.actors)
    return {
        "own": config.model.decoder(config.vocab_size, config.prompt_len + config.completion_len),
        "model": dry_run.OWN,
        "reward_model": "",
        "cost_model": "",
        "algorithm": method.recipe,
        "group_size": config.recipe(method).group_size,
        "prompts": (config.prompts_per_step,),
        "prompt_len": config.prompt_len,
        "completion_len": config.completion_len,
        "between": config.link,
        "max_staleness": max(1, method.max_staleness),
    }


def main(argv: list[str] | None = None) -> None:
    if dry_run.hand_over(AsynchronyConfig, sizes, presets=PRESETS, argv=argv):
        return
    config = harness.cli(
        AsynchronyConfig,
        presets=PRESETS,
        argv=argv,
        prog="python -m experiments.asynchrony",
        description=description,
    )
    harness.main(experiment, "asynchrony", config)


if __name__ == "__main__":
    main()
