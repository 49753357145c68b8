"""Runs the experiment: data → SFT → scorers → algorithms → evaluation → report."""

import sys
from collections.abc import Sequence

from experiments import dry_run, harness
from experiments.harness import Run
from experiments.safety import __doc__ as description
from experiments.safety import placement, planned_mesh, results, scorers, stages, task
from experiments.safety.config import PRESETS, SafetyConfig
from experiments.safety.sizes import sizes
from jaxrl.processes import Preempted


def experiment(run: Run) -> None:
    config: SafetyConfig = planned_mesh.with_mesh(run.config, run.note)
    placement.check_batches(config, placement.mesh_of(config.mesh))
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
        if run.preempted():  # nothing of an evaluation is worth a checkpoint
            raise Preempted(f"before the evaluation of {name}")
        evaluations[name] = stages.evaluate_all(config, work, evaluators, policy, sft)
    results.finish(run, config, work, evaluators, evaluations)


def _train(run, config, work, evaluators, name, sft) -> stages.Policy:
    return stages.train(run, config, work, evaluators, config.recipe(name), sft)


def main(argv: list[str] | None = None) -> None:
    argv = with_model(sys.argv[1:] if argv is None else argv)
    if dry_run.hand_over(SafetyConfig, sizes, presets=PRESETS, argv=argv):
        return
    config = harness.cli(
        SafetyConfig,
        presets=PRESETS,
        argv=argv,
        prog="python -m experiments.safety",
        description=description,
    )
    harness.main(experiment, "safety", config, preemptible=True)


def with_model(argv: Sequence[str]) -> list[str]:
    """`--model NAME` written out: the pretrained model, and its preset where none is named."""
    words = [word for arg in argv for word in _parts_of_model_flag(arg)]
    if "--model" not in words:
        return words
    words[words.index("--model")] = "--model.pretrained"
    named = any(word.split("=")[0] == "--preset" for word in words)
    return words if named else ["--preset", "pretrained", *words]


def _parts_of_model_flag(arg: str) -> list[str]:
    return ["--model", arg.removeprefix("--model=")] if arg.startswith("--model=") else [arg]


if __name__ == "__main__":
    main()
