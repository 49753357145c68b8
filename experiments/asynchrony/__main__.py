"""Runs the experiment: problems → SFT → methods → simulations → report."""

from experiments import harness
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


def main(argv: list[str] | None = None) -> None:
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
