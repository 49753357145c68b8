"""Samples against safety: the table trained from a replay, and the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cmdp, safety_samples, tabular, tabular_replay
from experiments.tabular import Schedule
from jaxrl import recipes

TINY = [
    "--prompts", "12", "--seeds", "2", "--budgets", "64,128",
    "--algorithms", "repo_tb_replay,repo_tb_replay_off,repo",
]  # fmt: skip


def test_with_a_replay_few_samples_reach_what_the_seen_answers_allow():
    """3,200 samples for 40 prompts: 60 of the reference for each."""
    instance = cmdp.draw(4, benign_share=0.0, prompts=40)
    allowed = safety_samples.seen_answers(instance, 60, np.random.default_rng(0))
    recipe = recipes.get("repo_tb_replay")
    found = {}
    for name, train, steps, rate in (
        ("replay", tabular_replay.train, 200, tabular_replay.rate(0.2)),
        ("none", tabular.train, 50, 1.0),
    ):
        schedule = Schedule(steps=steps, samples=64, rate=rate)
        *_, (_, learner) = train(recipe, [instance], [0], schedule=schedule)
        found[name] = cmdp.measures(instance, tabular.policies(learner)[0])
    assert found["replay"]["objective"] > 0.95 * allowed
    assert found["replay"]["safety_rate"] > 0.99
    assert found["none"]["objective"] < 0.7 * allowed


def test_seen_answers_by_brute_force():
    """Two answers, one draw: E J = Σ_y π_ref(y)·J(y alone); after many, J of the optimum."""
    instance = cmdp.CMDP(
        reference_logits=np.log([[0.25, 0.75], [0.5, 0.5]]),
        reward=np.array([[1.0, 2.0], [0.0, 1.0]]),
        cost=np.array([[-1.0, -1.0], [-1.0, 1.0]]),
        kl_coef=0.5,
    )
    alone = np.log([[0.25, 0.75], [0.5, 0.5]]) * 0.5 + instance.reward
    # On the second prompt the other answer is unsafe: seeing only that leaves the reference's J.
    expected = np.mean([0.25 * alone[0, 0] + 0.75 * alone[0, 1], 0.5 * alone[1, 0] + 0.5 * 0.5])
    rng = np.random.default_rng(0)
    found = safety_samples.seen_answers(instance, 1, rng, draws=4000)
    assert found == pytest.approx(expected, abs=0.03)
    many = safety_samples.seen_answers(instance, 60, rng)
    assert many == pytest.approx(cmdp.objective(instance, cmdp.critical(instance)), abs=1e-6)


def test_ranking_noise_is_the_second_order_loss():
    """J(π*) − J(π) = β·KL(π‖π*): for a small perturbation of the optimum β/2 times the variance."""
    instance = cmdp.draw(0, benign_share=0.5, prompts=20)
    optimum = cmdp.critical(instance)
    assert safety_samples.ranking_noise(instance, optimum) == pytest.approx(0.0, abs=1e-12)
    noise = 0.05 * np.random.default_rng(0).normal(size=optimum.shape)
    policy = optimum * np.exp(noise)
    policy /= policy.sum(axis=1, keepdims=True)
    lost = cmdp.objective(instance, optimum) - cmdp.objective(instance, policy)
    predicted = 0.5 * instance.kl_coef * safety_samples.ranking_noise(instance, policy)
    assert predicted == pytest.approx(lost, rel=0.05)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_group_of_distinct_answers_is_projected_onto_its_target(share):
    """With n = 1 the spread of D = R' − β·log(π/π_ref) in the group shrinks by 1 − αβ."""
    instance = cmdp.draw(0, benign_share=1.0, prompts=1, responses=6)
    recipe = recipes.get("tba", group_size=6, kl=recipes.KL(coef=0.2))
    schedule = Schedule(steps=1, samples=6, rate=share / 0.2)
    recipe, worlds, learners = tabular.prepared(recipe, [instance], [0], schedule=schedule)
    world, learner = jax.tree.map(lambda x: x[0], (worlds, learners))
    batch = tabular.roll_out(recipe, schedule, world, learner.params, jax.random.key(0))
    every = jnp.arange(6)[None, :, None]
    log_reference = jax.nn.log_softmax(world["reference_logits"])[0][every]
    batch = batch.replace(
        tokens=every, reference_log_probs=log_reference, rewards={"reward": world["reward"]}
    )
    after = tabular.update(recipe, schedule, learner, batch).params["logits"][0]

    def spread(logits):
        gap = world["reward"][0] - 0.2 * (logits - world["reference_logits"][0])
        return np.asarray(gap - gap.mean())

    expected = (1 - share) * spread(learner.params["logits"][0])
    np.testing.assert_allclose(spread(after), expected, atol=1e-5)


def test_the_command_writes_curves_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    safety_samples.main([*TINY, "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["curves"]["repo_tb_replay"]) == ["64", "128"]
    assert list(summary["curves"]["repo"]) == ["64", "128"]
    assert set(summary["seen_answers"]) == {"64", "128"}
    assert "seen answers" in capsys.readouterr().out
    (out / "summary.json").unlink()
    (out / "algorithms" / "repo.json").unlink()
    safety_samples.main([*TINY, "--out", str(out)])
    assert json.loads((out / "summary.json").read_text()) == summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithms", "reppo"], "unknown algorithm reppo"),
        (["--budgets", "64,100"], "multiples of the first"),
        (["--budgets", "32"], "at least one update"),
    ],
)
def test_wrong_values_are_errors_that_say_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit):
        safety_samples.main(arguments)
    assert message in capsys.readouterr().err
