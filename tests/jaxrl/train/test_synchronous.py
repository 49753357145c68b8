"""The loop: scores, refusals, the alarm, and that resuming is not seen in the numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl import recipes
from jaxrl.checkpoint import Checkpointer
from jaxrl.data.batches import PromptSet
from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer
from jaxrl.models import Decoder, DecoderConfig, ScalarModel
from jaxrl.replay import Replay, ReplayConfig
from jaxrl.rollouts import Collector, Sampling
from jaxrl.tokenizers import PLAIN, train_bpe
from jaxrl.train import NonFiniteScores, NonFiniteUpdates, SamplerDrift, Scorer, Trainer
from jaxrl.types import Completions

TEXTS = ("one", "two words", "three", "four more", "five", "six", "seven")
TOKENIZER = train_bpe(TEXTS * 3, 270)
PROMPTS = PromptSet.encode(TOKENIZER, TEXTS, PLAIN, max_len=10)
CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, embed=8, heads=2, kv_heads=1, head_dim=4, mlp=8,
    max_len=16, remat="none",
)  # fmt: skip
GRAPHDEF, PARAMS = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
SAMPLING = Sampling(max_new_tokens=4, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id)


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def vowels(prompts, completions):
    return np.array([sum(map(text.count, "aeiou")) - 0.5 for text in completions])


def scorer(reward=length, cost=vowels):
    return Scorer(
        tokenizer=TOKENIZER, prompts=PROMPTS, rewards={"reward": reward}, costs={"cost": cost}
    )


RECIPE = recipes.get("repo_tb", group_size=4)
LEARNER = Learner(
    recipe=RECIPE,
    apply=lm_apply(GRAPHDEF, None, temperature=1.0),
    optimizer=lm_optimizer(OptimizerConfig(learning_rate=1e-2)),
)
TRAINER = Trainer(
    learner=LEARNER,
    collector=Collector(
        graphdef=GRAPHDEF, sampling=SAMPLING, group_size=4, reference_completions=2
    ),
    scorer=scorer(),
    prompts=PROMPTS,
    prompts_per_step=2,
    reference=PARAMS,
    seed=3,
)


def started():
    return LEARNER.init({"policy": PARAMS}, num_prompts=len(PROMPTS))


def on_host(state):
    return [np.array(leaf) for leaf in jax.tree.leaves(state)]


def trained(trainer, first, start, steps):
    """The state after `steps`, and the metrics and refusals of each."""
    metrics, refusals = [], []
    for _, state, row, refusal in trainer.run(first, start=start, steps=steps):  # noqa: B007
        metrics.append(row)
        refusals.append(refusal)
    return state, metrics, refusals


def failing(value, *, at):
    """A reward that gives `value` for the second completion of the calls named."""
    calls = iter(range(10_000))

    def reward(prompts, completions):
        scores = length(prompts, completions)
        if next(calls) in at:
            scores[1] = value
        return scores

    return reward


# --- scores -------------------------------------------------------------------------------------


def encoded(texts):
    ids = [[*TOKENIZER.encode(text), TOKENIZER.eos_id][:6] for text in texts]
    return np.array([row + [TOKENIZER.pad_id] * (6 - len(row)) for row in ids], np.int32)


def test_every_completion_is_scored_with_its_own_prompt():
    seen = []

    def spy(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return range(len(completions))

    tokens = encoded(["six", "two", "one", ""]).reshape(2, 2, 6)
    rewards, costs = scorer(reward=spy).score(np.array([4, 1]), tokens)
    assert seen == [("five", "six"), ("five", "two"), ("two words", "one"), ("two words", "")]
    assert rewards["reward"].tolist() == [[0, 1], [2, 3]]
    assert rewards["reward"].dtype == np.float32
    assert costs["cost"].tolist() == [[0.5, 0.5], [1.5, -0.5]]  # vowels − ½


def test_greedy_completions_are_scored_apart():
    rollouts = TRAINER.rollout(started(), 0)
    tokens = encoded(["six", "one"]).reshape(2, 1, 6)
    greedy = Completions(
        tokens=jnp.asarray(tokens),
        mask=jnp.ones(tokens.shape, bool),
        log_probs=jnp.zeros((2, 1, 6)),
    )
    found = scorer()(rollouts, greedy)
    assert {name: x.tolist() for name, x in found.greedy.items()} == {
        "reward": [3.0, 3.0],
        "cost": [0.5, 1.5],
    }
    assert found.rewards["reward"].shape == (2, 4)
    assert TRAINER.scorer(rollouts).greedy is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_named_with_their_rows(value):
    broken = scorer(reward=lambda p, c: [0.0, value, 1.0, 2.0], cost=lambda p, c: [0, 1, 2, value])
    tokens = encoded(["six", "two", "one", "four"]).reshape(2, 2, 6)
    message = r"2 of this step's are not, first reward=.*'two'"
    with pytest.raises(NonFiniteScores, match=message) as refused:
        broken.score(np.array([4, 1]), tokens)
    rows = refused.value.rows
    found = [(r["name"], r["prompt"], r["completion"], r["prompt_id"]) for r in rows]
    assert found == [("reward", "five", "two", 4), ("cost", "two words", "four", 1)]
    assert {row["value"] for row in rows} == {str(np.float32(value))}


def test_a_function_that_drops_rows_is_refused():
    with pytest.raises(ValueError, match=r"reward must give one number for each of 4 completions"):
        scorer(reward=lambda p, c: [1.0]).score(
            np.array([4, 1]), encoded(["a", "b", "c", "d"]).reshape(2, 2, 6)
        )


# --- the loop -----------------------------------------------------------------------------------


def test_a_refused_step_changes_nothing_and_training_goes_on():
    trainer = dataclasses.replace(TRAINER, scorer=scorer(reward=failing(np.nan, at={1, 2})))
    states, refusals = [on_host(started())], []
    for done, state, metrics, refusal in trainer.run(started(), start=0, steps=4):
        states.append(on_host(state))
        refusals.append(refusal)
        assert len(states) == done + 1
        assert (metrics.get("refused") == 1.0) == (refusal is not None)
    assert [refusal is not None for refusal in refusals] == [False, True, True, False]
    assert [len(refusal.rows) for refusal in refusals if refusal] == [1, 1]

    def changed(i):
        return any(not np.array_equal(a, b) for a, b in zip(states[i], states[i + 1], strict=True))

    assert [changed(i) for i in range(4)] == [True, False, False, True]


def test_refusals_without_end_stop_the_run():
    trainer = dataclasses.replace(
        TRAINER, scorer=scorer(reward=failing(np.inf, at=range(100))), max_refused=2
    )
    updates = trainer.run(started(), start=0, steps=10)
    assert [next(updates)[0] for _ in range(2)] == [1, 2]
    with pytest.raises(NonFiniteScores, match="the step is refused"):
        next(updates)
    # Refusals that are not in a row never add up.
    scattered = scorer(reward=failing(np.inf, at={0, 2, 4}))
    trainer = dataclasses.replace(trainer, scorer=scattered, max_refused=1)
    assert sum(r is not None for r in trained(trainer, started(), 0, 6)[2]) == 3


def test_updates_that_are_never_finite_stop_the_run():
    def broken(params, rollouts):
        output = LEARNER.apply(params, rollouts)
        return output.replace(log_probs=output.log_probs * jnp.nan)

    trainer = dataclasses.replace(
        TRAINER, learner=dataclasses.replace(LEARNER, apply=broken), max_refused=1
    )
    updates, before = trainer.run(started(), start=0, steps=9), on_host(started())
    _, state, metrics, _ = next(updates)
    assert metrics["skipped"] == 1.0
    assert all(map(np.array_equal, on_host(state), before))
    with pytest.raises(NonFiniteUpdates, match="those of the 2 steps up to step 1 are not"):
        next(updates)


def test_metrics_are_of_the_policys_own_completions():
    state, metrics, _ = trained(TRAINER, started(), 0, 1)
    rollouts = TRAINER.rollout(started(), 0)
    reward, cost = np.asarray(rollouts.reward)[:, :2], np.asarray(rollouts.cost)[:, :2]
    np.testing.assert_allclose(metrics[0]["reward"], reward.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics[0]["safety"], (cost <= 0).mean(), rtol=1e-6)
    lengths = np.asarray(rollouts.mask)[:, :2].sum(axis=-1)
    np.testing.assert_allclose(metrics[0]["length"], lengths.mean(), rtol=1e-6)
    assert int(state.step) == 1
    assert metrics[0]["sampler_gap"] < 1e-4


def test_a_drifting_sampler_raises_the_alarm():
    """The learner evaluates at another temperature than the sampler draws with."""
    apply = lm_apply(GRAPHDEF, None, temperature=2.0)
    trainer = dataclasses.replace(TRAINER, learner=dataclasses.replace(LEARNER, apply=apply))
    sharp = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, PARAMS)
    state = LEARNER.init({"policy": sharp}, num_prompts=len(PROMPTS))
    with pytest.raises(SamplerDrift, match=r"differ by .* nats at step 7, tolerated are 0.01"):
        next(trainer.run(state, start=7, steps=9))


def test_every_step_has_prompts_and_randomness_of_its_own():
    rollouts = [TRAINER.rollout(started(), step) for step in range(4)]
    ids = np.concatenate([np.asarray(r.prompts.ids) for r in rollouts])
    assert sorted(ids[:7].tolist()) == list(range(7))  # an epoch
    tokens = {np.asarray(r.tokens).tobytes() for r in rollouts}
    assert len(tokens) == 4
    np.testing.assert_array_equal(rollouts[2].tokens, TRAINER.rollout(started(), 2).tokens)
    other = dataclasses.replace(TRAINER, seed=4).rollout(started(), 2)
    assert not np.array_equal(other.tokens, rollouts[2].tokens)


def with_critic():
    """PPO-Lagrangian, whose critic, two optimisers and window of costs must come back too."""
    recipe = recipes.get("ppo_lagrangian")
    critic_def, critic = nnx.split(ScalarModel(CONFIG, recipe.value_heads, rngs=nnx.Rngs(1)))
    learner = Learner(
        recipe=recipe,
        apply=lm_apply(GRAPHDEF, critic_def, temperature=1.0),
        optimizer=lm_optimizer(OptimizerConfig(learning_rate=1e-2)),
    )
    collector = Collector(graphdef=GRAPHDEF, sampling=SAMPLING, group_size=1)
    trainer = dataclasses.replace(TRAINER, learner=learner, collector=collector)
    return trainer, lambda: learner.init(
        {"policy": PARAMS, "critic": critic}, num_prompts=len(PROMPTS)
    )


@pytest.mark.parametrize("parts", [lambda: (TRAINER, started), with_critic])
def test_three_steps_and_three_more_are_six(tmp_path, parts):
    trainer, begin = parts()
    whole, whole_metrics, _ = trained(trainer, begin(), 0, 6)
    with Checkpointer(tmp_path) as checkpoints:
        state, first, _ = trained(trainer, begin(), 0, 3)
        checkpoints.save(3, state)
    with Checkpointer(tmp_path) as checkpoints:
        found = checkpoints.restore_latest(begin())
        state, rest, _ = trained(trainer, found.tree, found.step, 6)
    assert first + rest == whole_metrics
    for a, b in zip(on_host(state), on_host(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole_metrics[5] != whole_metrics[4]


# --- replay -------------------------------------------------------------------------------------


def replaying(**options):
    return dataclasses.replace(
        TRAINER,
        replay=Replay(ReplayConfig(**options), seed=0),
        prompts_per_step=1,
        prompts_per_update=3,
    )


def test_updates_are_drawn_from_the_replay_and_metrics_are_of_what_is_new(monkeypatch):
    trainer = replaying(recent_share=0.0)
    batches = []
    update = Learner.update
    monkeypatch.setattr(
        Learner, "update", lambda self, s, r, d: (batches.append(r), update(self, s, r, d))[1]
    )
    _, metrics, _ = trained(trainer, started(), 0, 3)
    assert [batch.tokens.shape[:2] for batch in batches] == [(3, 4)] * 3
    written = [set(np.asarray(b.policy_version).ravel().tolist()) - {-1} for b in batches]
    assert 0 in written[2]  # what was written at step 0 comes again
    assert len(trainer.replay.prompt_ids) == 3
    assert all(np.isfinite(row["reward"]) for row in metrics)


def test_a_restored_replay_resumes_to_the_same_numbers():
    whole, _, _ = trained(replaying(), started(), 0, 4)
    whole = on_host(whole)
    first = replaying()
    state, _, _ = trained(first, started(), 0, 2)
    second = replaying()
    second.replay.load(first.replay.state_dict())
    again, _, _ = trained(second, state, 2, 4)
    for one, other in zip(whole, on_host(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("drawn", [{"prompts_per_update": 3}, {"replay_group_size": 2}])
def test_what_is_drawn_from_a_replay_needs_one(drawn):
    with pytest.raises(ValueError, match="are of what is drawn from a replay: give one"):
        dataclasses.replace(TRAINER, **drawn)
