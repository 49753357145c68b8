"""On real text, where it is at hand: learned models find what people labelled.

The bounds are far below what the models reach (0.60 to 0.67 for safety, 0.93 to 0.96 for
compliance, on four splits) and far above chance (0.50 ± 0.03).
"""

from pathlib import Path

import numpy as np
import pytest

from jaxrl.data import load
from jaxrl.objectives.preference import cost_loss, label_loss
from jaxrl.rewards import examples as ex
from jaxrl.rewards.judge import train_ngram_judge
from jaxrl.rewards.learned import (
    ScorerConfig,
    TextEncoder,
    TrainingConfig,
    train_scorer,
    untrained,
)
from jaxrl.tokenizers import SAFE_RLHF, train_bpe

SOURCE = (
    Path(__file__).parents[4] / "shared/data/pku_saferlhf_mixed_5k/pku_seferlhf_realign_dpo_5k.json"
)
pytestmark = pytest.mark.skipif(
    not SOURCE.exists(), reason=f"the labelled pairs are not at hand: no {SOURCE.name}"
)


@pytest.fixture(scope="module")
def data():
    return load(SOURCE, seed=0)


@pytest.fixture(scope="module")
def start(data):
    tokenizer = train_bpe([completion for _, completion in data.sft], 1024)
    encoder = TextEncoder(tokenizer=tokenizer, template=SAFE_RLHF, prompt_len=32, completion_len=96)
    return untrained(ScorerConfig(), encoder, seed=0)


def _auc(scorer, rows: ex.Examples) -> float:
    scores = np.asarray(scorer(rows.prompts, rows.completions))
    return ex.auc(scores[rows.groups], rows.targets)


def test_cost_model_and_judge_rank_held_out_answers(data, start):
    parts = data.preferences
    cost = train_scorer(
        start,
        ex.cost_examples(parts["cost_train"].safety_pairs),
        lambda s, t: cost_loss(*s.T, *t.T),
        TrainingConfig(steps=50),
        validation=ex.safety_examples(parts["validation"].labels),
        seed=0,
    )
    judge = train_ngram_judge(parts["judge_train"].labels, validation=parts["validation"].labels)
    tested = ex.safety_examples(parts["test"].labels)
    assert _auc(cost.scorer, tested) > 0.58
    assert _auc(judge, tested) > 0.58


def test_compliance_is_found_on_other_types_of_prompts(data, start):
    compliance = train_scorer(
        start,
        ex.compliance_examples(data.compliance_train[::2]),
        lambda s, t: label_loss(s[:, 0], t[:, 0]),
        TrainingConfig(steps=50),
        validation=ex.compliance_examples(data.compliance_train[1::2]),
        seed=0,
    )
    assert _auc(compliance.scorer, ex.compliance_examples(data.compliance_test)) > 0.9
