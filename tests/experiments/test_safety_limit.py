"""The benchmark's command, its table trainer, and what the runs leave behind."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cmdp, safety_limit, tabular
from experiments.safety_limit import Config
from jaxrl import recipes
from jaxrl.types import REFERENCE_VERSION

TINY = ["--prompts", "20", "--responses", "4", "--seeds", "2", "--steps", "2"]


def run(tmp_path, *arguments, algorithms="repo_tb,repo"):
    out = tmp_path / "run"
    safety_limit.main([*TINY, "--algorithms", algorithms, "--out", str(out), *arguments])
    return out, json.loads((out / "summary.json").read_text())


def test_the_summary_has_the_keys_that_readers_expect(tmp_path, capsys):
    out, summary = run(tmp_path, "--p", ".5", "--seed", "7")
    keys = {"safety_rate", "safe_prompt_share", "worst_decile_unsafe", "objective"}
    assert summary["recommended"] == "repo_tb"
    assert list(summary["algorithms"]) == ["repo_tb", "repo"]
    assert "critical" in summary["exact"]
    for rows in (summary["algorithms"], summary["exact"]):
        for record in rows.values():
            assert keys <= set(record)
            assert {f"{key}_se" for key in keys} <= set(record)
    assert summary["exact"]["critical"]["safety_rate"] == 1.0
    for name in ("report.html", "metrics.jsonl", "config.json", "table.txt"):
        assert (out / name).stat().st_size > 0
    assert "repo_tb" in capsys.readouterr().out


def test_a_finished_run_prints_its_table_again_and_a_resumed_one_ends_the_same(tmp_path, capsys):
    out, summary = run(tmp_path)
    table = (out / "table.txt").read_text()
    capsys.readouterr()
    run(tmp_path)
    assert table in capsys.readouterr().out
    # As if killed between the two algorithms: the second starts again, the first is kept.
    (out / "summary.json").unlink()
    (out / "algorithms" / "repo.json").unlink()
    _, again = run(tmp_path)
    assert again == summary
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["stage"], row["step"]) for row in rows]
    assert len(steps) == len(set(steps)) == 4


@pytest.mark.parametrize("name", safety_limit.ALGORITHMS)
def test_every_algorithm_can_step_on_the_table(name):
    """Traced only: compiling two dozen algorithms takes a minute."""
    world = tabular.as_world(cmdp.draw(0, benign_share=0.5, prompts=20, responses=4))
    recipe, schedule = safety_limit.ALGORITHMS[name], tabular.Schedule()
    before = tabular.start(recipe, schedule, world, jax.random.key(0))
    after = jax.eval_shape(lambda state: tabular.step(recipe, schedule, world, state), before)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert [leaf.shape for leaf in jax.tree.leaves(after)] == [
        jnp.shape(leaf) for leaf in jax.tree.leaves(before)
    ]


def test_hypotheses_get_a_line_each(tmp_path, monkeypatch):
    # Untrained: the lines are asked about, not the outcomes, and eight algorithms take long.
    monkeypatch.setattr(tabular, "_advance", lambda *arguments: arguments[-1])
    _, summary = run(tmp_path, algorithms="ppo_lagrangian,repo,repo_exact,repo_tb")
    names = [verdict["name"] for verdict in summary["hypotheses"]]
    assert names == ["H1", "H2 (repo)", "H2 (repo_tb)", "H3 (repo)", "H3 (repo_tb)", "H4", "H5"]
    assert all(verdict["outcome"] == "undecided" for verdict in summary["hypotheses"])  # 2 seeds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithms", "reppo"], "unknown algorithm reppo"),
        (["--p", "1.5"], "p is a share"),
        (["--responses", "1"], "2 responses"),
        (["--steps", "0"], "at least 1"),
        (["--kl-coef", "0"], "kl_coef must be positive"),
    ],
)
def test_wrong_values_are_errors_that_say_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        safety_limit.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------- the table trainer


@pytest.fixture(scope="module")
def small():
    return [cmdp.draw(seed, benign_share=0.25, prompts=16, responses=4) for seed in (5, 6)]


def final(recipe, instances, **schedule):
    *_, (_, learner) = tabular.train(
        recipe, instances, (5, 6), schedule=tabular.Schedule(**schedule), chunks=1
    )
    return learner


def shares(instances, learner):
    rows = [cmdp.measures(c, p) for c, p in zip(instances, tabular.policies(learner), strict=True)]
    limit = np.mean([cmdp.objective(c, cmdp.critical(c)) for c in instances])
    return {key: np.mean([row[key] for row in rows]) for key in rows[0]} | {"limit": limit}


def test_the_recommended_algorithm_reaches_the_limit_where_plain_repo_does_not(small):
    ours = shares(small, final(recipes.get("repo_tb"), small, steps=600))
    plain = shares(small, final(recipes.get("repo"), small, steps=600))
    assert ours["safety_rate"] > 0.995
    assert ours["objective"] > 0.97 * ours["limit"]
    assert ours["worst_decile_unsafe"] < 0.05 < plain["worst_decile_unsafe"]


def test_ppo_reaches_the_unconstrained_optimum(small):
    reached = shares(small, final(recipes.get("ppo"), small, steps=800))["objective"]
    limit = np.mean([cmdp.objective(c, cmdp.unconstrained(c)) for c in small])
    assert 0.97 * limit < reached < limit


def test_a_run_is_the_same_whatever_the_chunks(small):
    schedule = tabular.Schedule(steps=6)
    ends = []
    for chunks in (1, 3):
        *_, (step, learner) = tabular.train(
            recipes.get("rloo"), small, (5, 6), schedule=schedule, chunks=chunks
        )
        assert step == 6
        ends.append(tabular.policies(learner))
    np.testing.assert_allclose(*ends, rtol=1e-6)


def test_rollouts_hold_sampled_rows_and_say_who_wrote_them(small):
    recipe = recipes.get("repo_tb")
    world = tabular.as_world(small[0])
    params = {"logits": world["reference_logits"] + 1.0 * world["reward"]}
    rollouts = tabular.roll_out(
        recipe, tabular.Schedule(samples=64), world, params, jax.random.key(0)
    )
    assert rollouts.tokens.shape == (8, 8, 1)
    ids, tokens = np.asarray(rollouts.prompts.ids), np.asarray(rollouts.tokens[..., 0])
    assert len(set(ids.tolist())) == 8
    np.testing.assert_allclose(rollouts.cost, small[0].cost[ids[:, None], tokens], rtol=1e-6)
    by_reference = np.asarray(rollouts.policy_version[..., 0]) == REFERENCE_VERSION
    assert (by_reference.sum(axis=1) == 4).all()
    policy = np.log(cmdp.softmax(np.asarray(params["logits"], float)))[ids[:, None], tokens]
    reference = np.log(small[0].reference)[ids[:, None], tokens]
    expected = np.where(by_reference, reference, policy)
    np.testing.assert_allclose(rollouts.behaviour_log_probs[..., 0], expected, rtol=1e-4)


def test_responses_are_drawn_with_the_policys_probabilities():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    drawn = tabular._sample(jax.random.key(0), logits, 20_000)
    frequency = np.bincount(np.asarray(drawn[0]), minlength=3) / 20_000
    np.testing.assert_allclose(frequency, [0.7, 0.2, 0.1], atol=0.012)


def test_instances_must_share_the_anchor_and_have_a_seed_each(small):
    schedule = tabular.Schedule(steps=1)
    with pytest.raises(ValueError, match="one seed for each"):
        next(tabular.train(recipes.get("ppo"), small, (1,), schedule=schedule))
    mixed = [small[0], replace(small[1], kl_coef=0.3)]
    with pytest.raises(ValueError, match="must share β"):
        next(tabular.train(recipes.get("ppo"), mixed, (1, 2), schedule=schedule))


def test_negative_controls_are_zero_where_the_families_coincide():
    config = Config(seeds=2, prompts=20, responses=5)
    found = safety_limit.negative_controls(config, safety_limit.instances(config))
    np.testing.assert_allclose(found["binary cost"], 0.0, atol=1e-6)
    np.testing.assert_allclose(found["p=1"], 0.0, atol=1e-12)
