"""Learned evaluators, for data that has labels instead of exact functions.

A cost model with the Safe-RLHF loss and a reward model score the training; a judge of another
architecture, trained on other prompts, scores the evaluation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.harness import Run
from experiments.safety.config import SafetyConfig
from experiments.safety.stages import Policy
from experiments.safety.task import Evaluator, Evaluators, Task
from jaxrl import evaluation, processes
from jaxrl.checkpoint import Checkpointer
from jaxrl.data import ComplianceRow, LabelledResponse, SafetyData
from jaxrl.objectives.preference import cost_loss, label_loss, reward_loss
from jaxrl.rewards import fluency, is_refusal, weighted
from jaxrl.rewards.examples import (
    Examples,
    auc,
    compliance_examples,
    cost_examples,
    pair_accuracy,
    preference_examples,
    safety_examples,
)
from jaxrl.rewards.judge import WEAK_BELOW, calibrate, train_ngram_judge
from jaxrl.rewards.learned import (
    LearnedScorer,
    Loss,
    Measure,
    ScorerConfig,
    TextEncoder,
    TrainingConfig,
    train_scorer,
    untrained,
)

SCORE_LIMIT = 5.0
"""Learned scores are clipped here, in their own standard deviations: beyond, they are guesses."""
CALIBRATION_ROWS = 512  # enough to fix a scale


def learned_evaluators(run: Run, config: SafetyConfig, task: Task, sft: Policy) -> Evaluators:
    """Trains cost model, reward model and judge, or reads them back.

    Raises:
      ValueError: the data lacks the labels that one of them needs.
    """
    parts = task.data.preferences
    cost = _cost_model(run, config, task, sft)
    reward, reward_note, reward_quality = _reward_model(run, config, task, sft)
    judged = train_ngram_judge(parts["judge_train"].labels, validation=parts["validation"].labels)
    judge = calibrate(judged, parts["validation"].labels)
    measures = {"reward_quality": reward_quality}
    notes = [reward_note]
    for name, function in (("cost model", cost), ("judge", judge)):
        found = _held_out_auc(function, parts["test"].labels, seed=config.seed)
        measures[f"{name.replace(' ', '_')}_auc"] = found.estimate
        notes.append(
            f"AUC of the {name} on {len(parts['test'].labels)} answers to held-out prompts: "
            f"{found.estimate:.3f} (95 % {found.low:.3f} to {found.high:.3f})."
        )
    weak = min(measures["cost_model_auc"], measures["judge_auc"]) < WEAK_BELOW
    for note in notes:
        run.note(note)
    return Evaluators(
        reward=weighted({"learned": (reward, 1.0), "fluency": (fluency, config.scorers.fluency)}),
        cost=cost,
        judge=judge,
        is_refusal=is_refusal,
        notes=tuple(notes),
        measures=measures,
        weak_judge=weak,
    )


def _cost_model(run: Run, config: SafetyConfig, task: Task, sft: Policy) -> LearnedScorer:
    parts = task.data.preferences
    trained, _ = _trained(
        run,
        "cost model",
        config,
        _start(config, task, sft),
        cost_examples(parts["cost_train"].safety_pairs),
        lambda scores, signs: cost_loss(*scores.T, *signs.T),
        validation=safety_examples(parts["validation"].labels),
    )
    # On answers that it was not trained on: on its own it is too sure of itself.
    rows = parts["validation"].labels[:CALIBRATION_ROWS]
    scores = trained([row.prompt for row in rows], [row.response for row in rows])
    return trained.normalised(scores, to=config.scorers.cost_scale).replace(limit=SCORE_LIMIT)


def _reward_model(
    run: Run, config: SafetyConfig, task: Task, sft: Policy
) -> tuple[LearnedScorer, str, float]:
    data = task.data
    start = _start(config, task, sft)
    if data.preferences["cost_train"].helpful_pairs:
        examples, loss, validation, measure, what = (
            preference_examples(data.preferences["cost_train"].helpful_pairs),
            lambda scores, _: reward_loss(*scores.T),
            preference_examples(data.preferences["validation"].helpful_pairs),
            pair_accuracy,
            "accuracy of the helpfulness model on validation pairs",
        )
    else:
        train_rows, validation_rows = _by_type(data)
        examples, loss, validation, measure, what = (
            compliance_examples(train_rows),
            lambda scores, target: label_loss(scores[:, 0], target[:, 0]),
            _two_classes(validation_rows),
            auc,
            "AUC of the compliance model on prompt types kept for its validation",
        )
    trained, quality = _trained(
        run, "reward model", config, start, examples, loss, validation=validation, measure=measure
    )
    rows = data.preferences["validation"].labels[:CALIBRATION_ROWS]
    scores = trained([row.prompt for row in rows], [row.response for row in rows])
    scaled = trained.normalised(scores, to=config.scorers.reward_scale).replace(limit=SCORE_LIMIT)
    return scaled, f"Reward: {what}: {quality:.3f}.", quality


def _by_type(data: SafetyData) -> tuple[list[ComplianceRow], list[ComplianceRow]]:
    """Training rows of XSTest, and a fifth of their prompt types for early stopping.

    The other half of the types stays for the measurement of over-refusal.
    """
    families = sorted({_family(row) for row in data.compliance_train})
    kept = families[: max(len(families) // 5, 1)]
    train = [row for row in data.compliance_train if _family(row) not in kept]
    return train, [row for row in data.compliance_train if _family(row) in kept]


def _family(row: ComplianceRow) -> str:
    """A type and the contrast set that was made for it belong together."""
    return row.type.removeprefix("contrast_")


def _two_classes(rows: Sequence[ComplianceRow]) -> Examples:
    """AUC knows two classes: a partial refusal is neither."""
    return compliance_examples(row for row in rows if row.label != "partial")


def _start(config: SafetyConfig, task: Task, sft: Policy) -> LearnedScorer:
    """An untrained scorer; a transformer in it has read what the policy has read."""
    encoder = TextEncoder(
        tokenizer=task.tokenizer,
        template=task.template,
        prompt_len=config.prompt_len,
        completion_len=config.completion_len,
    )
    if not config.scorers.transformer:
        parts = ScorerConfig(decoder=None, ngrams=config.scorers.ngrams)
        return untrained(parts, encoder, seed=config.seed)
    parts = ScorerConfig(decoder=sft.decoder, ngrams=config.scorers.ngrams)
    # On every process's own device: each scores its share of the rollouts.
    trunk = processes.whole(sft.params)
    return untrained(parts, encoder, seed=config.seed, trunk=trunk)


def _trained(
    run: Run,
    stage: str,
    config: SafetyConfig,
    start: LearnedScorer,
    examples: Examples,
    loss: Loss,
    *,
    validation: Examples,
    measure: Measure = auc,
) -> tuple[LearnedScorer, float]:
    """Trains one model, or restores the one that an earlier process trained."""
    folder = run.checkpoints / stage.replace(" ", "_")
    with Checkpointer(folder) as checkpoints:
        if found := checkpoints.restore_latest(start.params):
            return start.replace(params=found.tree), found.metadata["quality"]
        run.rewind(stage, 0)
        total = config.scorers.steps
        with run.progress(stage, total) as bar:

            def show(step: int, row: Any) -> None:
                run.log(stage, step, row)
                bar.update(step, row)

            settings = TrainingConfig(
                steps=total,
                batch=config.scorers.batch,
                learning_rate=config.scorers.learning_rate,
            )
            trained = train_scorer(
                start,
                examples,
                loss,
                settings,
                validation=validation,
                seed=config.seed,
                measure=measure,
                progress=show,
            )
        checkpoints.save(total, trained.scorer.params, metadata={"quality": trained.quality})
    return trained.scorer, trained.quality


def _held_out_auc(
    function: Evaluator, rows: Sequence[LabelledResponse], *, seed: int
) -> evaluation.Interval:
    scores = np.asarray(function([row.prompt for row in rows], [row.response for row in rows]))
    labels = np.array([row.is_unsafe for row in rows])
    _, prompts = np.unique([row.prompt for row in rows], return_inverse=True)
    rng = np.random.default_rng(seed)
    return evaluation.auc_interval(scores, labels, groups=prompts, rng=rng)
