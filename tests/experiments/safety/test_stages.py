"""Every recipe trains the language model; scores that are not finite leave their rows behind."""

import io
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.harness import Run
from experiments.harness.files import read_json_lines
from experiments.safety import stages, task
from experiments.safety.config import QUICK, ModelConfig, SftConfig
from jaxrl import recipes
from jaxrl.train import NonFiniteScores

CONFIG = replace(
    QUICK,
    steps=2,
    samples_per_step=16,
    prompt_len=40,
    completion_len=6,
    vocab_size=300,
    model=ModelConfig(layers=1, embed=8, heads=2, kv_heads=1, head_dim=4, mlp=8),
    sft=SftConfig(steps=1, batch=8),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Data, evaluators and the SFT policy that every recipe starts from."""
    folder = tmp_path_factory.mktemp("stages")
    data = task.load(CONFIG)
    work = task.build(CONFIG, data, folder)
    # An untrained policy writes nonsense, for which the world's rewards are all the same: a
    # group without differences has no gradient.
    evaluators = replace(task.exact_evaluators(data), reward=distinct_characters)
    return work, evaluators, stages.initial_policy(CONFIG, work)


def distinct_characters(prompts, completions, **columns):
    return np.array([len(set(completion)) for completion in completions], np.float32)


def opened(folder, config=CONFIG):
    return Run.open("safety", config, folder, stream=io.StringIO())


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_trains_the_language_model(tmp_path, shared, name):
    work, evaluators, sft = shared
    recipe = CONFIG.recipe(name)
    with opened(tmp_path) as run:
        policy = stages.train(run, CONFIG, work, evaluators, recipe, sft)
        rows = run.metrics.rows(name)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert "nonfinite" not in row
        assert row["skipped"] == 0.0
        assert row["sampler_gap"] < 1e-3
        assert {"reward", "cost", "safety", "length", "kl", "loss", "grad_norm"} <= set(row)
        assert ("value_loss" in row) == bool(recipe.value_heads)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)  # the SFT policy is the reference
    pairs = zip(jax.tree.leaves(sft.params), jax.tree.leaves(policy.params), strict=True)
    changed = [bool(np.any(np.asarray(a) != np.asarray(b))) for a, b in pairs]
    assert all(changed), name


def test_rows_without_a_finite_score_are_written_out(tmp_path, shared):
    work, evaluators, sft = shared
    calls = []

    def reward(prompts, completions):
        calls.append(None)
        scores = np.asarray(evaluators.reward(prompts, completions))
        return np.where(np.arange(len(scores)) == 3, np.nan, scores) if len(calls) == 1 else scores

    with opened(tmp_path) as run:
        broken = replace(evaluators, reward=reward)
        stages.train(run, CONFIG, work, broken, CONFIG.recipe("rloo"), sft)
        said = run.stream.getvalue()
        rows = run.metrics.rows("rloo")
    assert "rewards and costs must be finite: 1 of this step's" in " ".join(said.split())
    assert rows[0]["refused"] == 1.0
    assert "loss" in rows[1]
    (refused,) = read_json_lines(tmp_path / "samples" / "refused-rloo-1.jsonl")
    assert (refused["name"], refused["value"]) == ("reward", "nan")
    assert refused["prompt"] == work.train.texts[refused["prompt_id"]]


def test_a_scorer_that_never_gives_numbers_stops_the_run_with_its_state_saved(tmp_path, shared):
    work, evaluators, sft = shared
    config = replace(CONFIG, steps=9, checkpoint_every=1)

    def reward(prompts, completions):
        return np.full(len(completions), np.inf)

    broken = replace(evaluators, reward=reward)
    with opened(tmp_path, config) as run, pytest.raises(NonFiniteScores):
        stages.train(run, config, work, broken, config.recipe("rloo"), sft)
    assert list((tmp_path / "checkpoints" / "rloo").glob("*.json"))
    assert not (tmp_path / "summary.json").exists()


def test_evaluation_is_a_function_of_the_seed(shared):
    work, evaluators, sft = shared
    config = replace(CONFIG, evaluation=replace(CONFIG.evaluation, batch=4))

    def evaluated(config):
        return stages.evaluate(
            config, work, evaluators, sft, sft, work.heldout, at_most=5, samples=3
        )

    first = evaluated(config)
    assert first.rewards.shape == first.costs.shape == first.kl.shape == (5, 3)
    assert [len(texts) for texts in first.completions] == [3] * 5
    np.testing.assert_allclose(first.kl, 0.0, atol=1e-4)
    asked = [work.heldout.texts[row] for row in first.rows for _ in range(3)]
    written = [text for texts in first.completions for text in texts]
    expected = np.float32(evaluators.reward(asked, written))
    np.testing.assert_array_equal(first.rewards.ravel(), expected)
    assert (first.rows[0], first.rows[-1]) == (0, len(work.heldout) - 1)
    assert evaluated(config).completions == first.completions
    assert evaluated(replace(config, seed=1)).completions != first.completions


def test_the_tokenizer_is_read_back_on_resumption(tmp_path):
    data = task.load(CONFIG)
    first = task.build(CONFIG, data, tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    again = task.build(CONFIG, data, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == stored
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)


def test_updates_from_a_replay_are_as_large_as_others(tmp_path, shared):
    """Where each step writes for fewer prompts, the rest comes from the replay."""
    work, evaluators, sft = shared
    with opened(tmp_path) as run:
        for name in ("repo_tb_replay", "repo_tb"):
            recipe = CONFIG.recipe(name)
            trainer = stages.trainer_of(run, CONFIG, work, evaluators, recipe, sft)
            learnt = trainer.prompts_per_update or trainer.prompts_per_step
            assert learnt == CONFIG.samples_per_step // recipe.group_size
            assert (trainer.prompts_per_step < learnt) == (name == "repo_tb_replay")
