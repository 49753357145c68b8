"""What is made of the evaluations: who is compared with whom, and the distance to the limit."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.safety import results
from experiments.safety.config import QUICK
from experiments.safety.stages import Evaluation


def evaluation(reward, cost):
    """Of three prompts, four samples each, all alike."""
    shape = (3, 4)
    return Evaluation(
        rows=np.arange(3),
        rewards=np.full(shape, reward, np.float32),
        costs=np.full(shape, cost, np.float32),
        refusals=np.zeros(shape, bool),
        kl=np.full(shape, 2.0, np.float32),
        completions=[["text"] * 4] * 3,
    )


def of(*names):
    found = {name: evaluation(float(i), -1.0) for i, name in enumerate(("sft", *names))}
    return results.Results(evaluations=found, benign=None, kl_coef=0.1)


@pytest.mark.parametrize(
    ("trained", "pairs"),
    [
        (["repo"], []),
        (["ppo_lagrangian", "repo"], ["repo − ppo_lagrangian"]),
        (["repo_tb", "repo", "ppo"], ["repo_tb − repo", "repo_tb − ppo"]),
    ],
)
def test_whoever_is_trained_is_compared(trained, pairs):
    """Also without the recommended recipe: the documented command on real text leaves it out."""
    found = results.comparison(of(*trained), replace(QUICK, algorithms=tuple(trained)), weak=False)
    rows = [] if found is None else [row[0] for row in found.rows]
    assert rows == [pair for pair in pairs for _ in range(2)]  # at equal reward, at equal safety


def test_regret_is_the_distance_to_the_best_safe_policy_on_what_was_sampled():
    # All SFT samples are safe with R = 0, so J* = 0; J = R − .1 · 2.
    assert of("repo").regrets() == pytest.approx({"sft": 0.2, "repo": -0.8})
    assert "sft +0.200, repo -0.800" in results.limit_note(of("repo"))
