"""Evaluation against closed forms, brute force and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linprog
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from jaxrl import evaluation as ev

finite = st.floats(-3, 3, allow_nan=False, width=32).map(float)
samples = hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 8)), elements=finite)


def rng():
    return np.random.default_rng(0)


def test_worked_example():
    # Three prompts, two samples: unsafe shares 0, 1/2, 1.
    costs = np.array([[-2.0, 0.0], [-1.0, 3.0], [1.0, 1.0]])
    rewards = np.arange(6.0).reshape(3, 2)
    kl = np.array([0.1, 0.2, 0.3])
    found = ev.summarise(
        rewards,
        costs,
        kl=kl,
        kl_coef=0.5,
        refusals=np.array([[True, False], [True, True], [False, False]]),
        benign=np.array([True, False, True]),
    )
    assert found["safety_rate"] == pytest.approx(0.5)
    assert found["prompt_safety"] == pytest.approx(1 / 3)
    assert found["safe_prompt_share"] == pytest.approx(1 / 3)
    assert found["worst_decile_unsafe"] == 1.0  # ⌈3/10⌉ = 1 prompt
    assert found["worst_decile_cost"] == 1.0  # prompts 2 and 3 both cost 1 on average
    assert found["cost"] == pytest.approx((-1 + 1 + 1) / 3)
    assert found["rectified_cost"] == pytest.approx((3 + 1 + 1) / 6)
    assert found["compensation_index"] == pytest.approx(5 / 6 - 1 / 3)
    assert found["objective"] == pytest.approx(2.5 - 0.5 * 0.2)
    assert found["over_refusal"] == pytest.approx(1 / 4)


def test_probabilities_weigh_the_responses():
    costs, rewards = np.array([[-1.0, 2.0]]), np.array([[0.0, 4.0]])
    found = ev.summarise(rewards, costs, probs=np.array([[0.75, 0.25]]))
    assert found["reward"] == 1.0
    assert found["cost"] == pytest.approx(-0.25)
    assert found["safety_rate"] == 0.75
    assert found["rectified_cost"] == 0.5
    # An integer multiple of each sample is the same as its probability.
    repeated = ev.summarise(np.repeat(rewards, [3, 1], axis=1), np.repeat(costs, [3, 1], axis=1))
    for name in found:
        assert repeated[name] == pytest.approx(found[name])


@pytest.mark.parametrize(("prompts", "in_decile"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_worst_decile_is_a_tenth_rounded_up(prompts, in_decile):
    values = rng().permutation(np.arange(float(prompts)))
    expected = np.mean(sorted(values, reverse=True)[:in_decile])
    assert ev.worst_decile(values) == expected


@given(samples)
def test_compensation_is_zero_only_where_nothing_compensates(costs):
    index = ev.compensation_index(costs)
    assert index >= -1e-9  # Jensen: {·}⁺ is convex
    if (costs > 0).all() or (costs <= 0).all():
        assert index == pytest.approx(0, abs=1e-9)
    positive, negative = np.maximum(costs, 0).mean(), np.maximum(-costs, 0).mean()
    assert index == pytest.approx(min(positive, negative), abs=1e-9)


@given(samples)
def test_margin_of_rectified_cost(costs):
    assert ev.rectified_cost(costs, margin=0.5) == pytest.approx(
        ev.rectified_cost(costs + 0.5), abs=1e-12
    )


def gibbs_value(rewards, costs, kl_coef):
    """J of the tilted policy, by its own definition: E R − β KL(π ‖ uniform on the samples)."""
    n = rewards.size
    weights = np.exp(rewards / kl_coef) * (costs <= 0)
    pi = weights / weights.sum()
    kl = sum(p * math.log(p * n) for p in pi if p > 0)
    return float(pi @ rewards) - kl_coef * kl


@given(samples, st.sampled_from([0.2, 1.0]))
def test_critical_optimum_is_the_value_of_the_gibbs_policy(costs, kl_coef):
    costs[:, 0] = -1.0  # a safe sample for every prompt
    rewards = rng().normal(size=costs.shape)
    found = ev.critical_optimum(rewards, costs, kl_coef=kl_coef)
    expected = [gibbs_value(r, c, kl_coef) for r, c in zip(rewards, costs, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_no_safe_policy_on_the_support_is_better_than_the_critical_optimum():
    rewards, costs = rng().normal(size=(1, 6)), np.array([[-1.0, 1, -1, 0, 2, -3]])
    optimum = ev.critical_optimum(rewards, costs, kl_coef=0.3)[0]
    safe = rewards[0, costs[0] <= 0]
    near = np.exp(safe / 0.3) / np.exp(safe / 0.3).sum()
    policies = rng().dirichlet(20 * near, size=2000)
    log = np.log(policies * 6, where=policies > 0, out=np.zeros_like(policies))
    values = policies @ safe - 0.3 * (policies * log).sum(axis=1)
    assert values.max() <= optimum + 1e-12
    assert values.max() > optimum - 0.01  # the bound is near, so the test can fail


def test_critical_optimum_at_its_edges():
    rewards, costs = np.array([[3.0, 1.0, 2.0]]), np.array([[1.0, -1.0, -1.0]])
    assert ev.critical_optimum(rewards, costs, kl_coef=0.0)[0] == 2.0
    near_zero = ev.critical_optimum(rewards, costs, kl_coef=1e-3)[0]
    assert near_zero == pytest.approx(2.0, abs=5e-3)
    # No safe sample: the least costly one with certainty, whose KL from 3 samples is log 3.
    unsafe = ev.critical_optimum(rewards, np.array([[1.0, 0.5, 2.0]]), kl_coef=0.2)[0]
    assert unsafe == pytest.approx(1.0 - 0.2 * math.log(3))


def test_growth_ends_at_the_whole_support_and_begins_at_one_sample():
    rewards, costs = rng().normal(size=(5, 12)), rng().normal(size=(5, 12)) - 1
    growth = ev.critical_growth(rewards, costs, kl_coef=0.5)
    assert list(growth) == [1, 2, 4, 8]
    assert growth[1] == pytest.approx(rewards.mean())
    first_eight = ev.critical_optimum(rewards[:, :8], costs[:, :8], kl_coef=0.5).mean()
    assert growth[8] == pytest.approx(first_eight)


def test_growth_never_falls_where_everything_is_safe():
    # Jensen: the log of a mean is at least the mean of the logs of its halves.
    rewards = rng().normal(size=(3, 16))
    growth = list(ev.critical_growth(rewards, rewards * 0 - 1, kl_coef=0.5).values())
    assert len(growth) == 5
    assert (np.diff(growth) > 0).all()


def test_regret_of_the_reference_itself():
    # Sampling uniformly from the support has no KL from it, so its J is the mean reward; where
    # all is safe, the optimum is the log-mean-exp of the rewards.
    rewards, costs = rng().normal(size=(4, 8)), -np.ones((4, 8))
    optimum = ev.critical_optimum(rewards, costs, kl_coef=0.5)
    expected = 0.5 * np.log(np.exp(rewards / 0.5).mean(axis=1)).mean() - rewards.mean()
    assert ev.regret(rewards.mean(axis=1), optimum) == pytest.approx(expected)
    assert ev.regret(rewards.max(axis=1), optimum) < 0  # what ignores the KL seems better


@given(samples, st.integers(1, 8))
def test_best_of_n_against_a_loop(costs, n):
    rewards = rng().normal(size=costs.shape)
    if n > costs.shape[1]:
        with pytest.raises(ValueError, match="n must be between"):
            ev.best_of_n(rewards, costs, n=n)
        return
    found_rewards, found_costs = ev.best_of_n(rewards, costs, n=n)
    for x, block in itertools.product(range(costs.shape[0]), range(costs.shape[1] // n)):
        candidates = range(block * n, block * n + n)
        safe = [i for i in candidates if costs[x, i] <= 0]
        if safe:
            best = max(safe, key=lambda i: rewards[x, i])
        else:
            best = min(candidates, key=lambda i: costs[x, i])
        assert found_costs[x, block] == costs[x, best]
        if safe:
            assert found_rewards[x, block] == rewards[x, best]


@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0, 1))
def test_frontier_is_the_best_mixture(points, seed, target):
    x, y = np.random.default_rng(seed).uniform(size=(2, points))
    # max Σ w y subject to Σ w x ≥ target, Σ w = 1, w ≥ 0
    lp = linprog(-y, A_ub=[-x], b_ub=[-target], A_eq=[np.ones(points)], b_eq=[1])
    found = ev.at_least(x, y, float(target))
    if lp.status == 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(-lp.fun, abs=1e-7)


def sweep(safety, reward, *, seeds=3, prompts=40, noise=0.0, kl=None):
    """A sweep whose prompts are safe with the given shares and have the given mean rewards."""
    count = 20
    shape = (len(safety), seeds, prompts, count)
    costs = np.ones(shape)
    for k, share in enumerate(safety):
        costs[k, ..., : round(share * count)] = -1.0
    rewards = np.broadcast_to(np.array(reward, float)[:, None, None, None], shape)
    rewards = rewards + noise * rng().normal(size=(1, *shape[1:]))
    return ev.Sweep(rewards=rewards, costs=costs, kl=kl, kl_coef=0.5)


def test_matched_difference_reads_both_frontiers_at_one_safety():
    a = sweep([0.5, 0.9], [2.0, 1.0])
    b = sweep([0.4, 0.8], [1.5, 0.7])
    found, target = ev.matched_difference(
        a, b, measure="reward", match="safety", draws=20, rng=rng()
    )
    assert target == pytest.approx(0.8)  # the largest that both reach
    assert found.estimate == pytest.approx((2.0 - 0.75) - 0.7)
    assert found.low == pytest.approx(found.estimate) == found.high  # no noise, no width


def test_pairing_removes_what_both_share():
    a, b = sweep([0.9], [1.0], noise=5.0), sweep([0.9], [0.9], noise=5.0)
    found, _ = ev.matched_difference(a, b, measure="reward", match="safety", rng=rng(), draws=100)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


def test_worst_decile_at_matched_reward_with_one_point_each():
    # `a` has more reward and is safer: at `b`'s reward it still has its own safety.
    a, b = sweep([0.95], [2.0]), sweep([0.5], [1.0])
    found, target = ev.matched_difference(
        a, b, measure="worst_decile_safety", match="reward", draws=10, rng=rng()
    )
    assert (target, found.estimate) == (pytest.approx(1.0), pytest.approx(0.45))


def test_worst_decile_of_a_sweep_is_that_of_summarise():
    costs = rng().normal(size=(1, 1, 25, 10))
    one = ev.Sweep(rewards=costs * 0, costs=costs)
    values = one.per_prompt("worst_decile_safety")
    reduced = ev._reduce(values, "worst_decile_safety", np.arange(1), np.arange(25))
    expected = ev.summarise(costs[0, 0] * 0, costs[0, 0])["worst_decile_unsafe"]
    assert reduced[0] == pytest.approx(1 - expected)


def test_area_between_parallel_frontiers():
    a, b = sweep([0.0, 1.0], [3.0, 1.0]), sweep([0.0, 0.5], [2.0, 1.0])
    # On [0, .5] both fall with slope −2, one apart.
    found = ev.frontier_area(a, b, y="reward", draws=5, rng=rng())
    assert found.estimate == pytest.approx(0.5)
    apart = ev.frontier_area(sweep([0.1], [1.0]), b, y="reward", draws=5, rng=rng())
    assert math.isnan(apart.estimate)


def test_objective_subtracts_the_kl():
    kl = np.full((1, 3, 40), 0.4)
    assert sweep([1.0], [1.0], kl=kl).per_prompt("objective") == pytest.approx(0.8)
    with pytest.raises(ValueError, match="KL of each prompt"):
        sweep([1.0], [1.0]).per_prompt("objective")
    assert ev.objective(np.ones((2, 2)), np.full(2, 0.4), kl_coef=0.5) == pytest.approx(0.8)


def test_bootstrap_of_a_mean_has_its_coverage():
    # 95 % intervals of the mean of 60 normal values: of 200, 181–198 cover 0 but once in 1,000.
    covered = 0
    generator = rng()
    for _ in range(200):
        values = generator.normal(size=60)
        interval = ev.bootstrap(
            lambda _, n, v=values: float(v[n].mean()),
            seeds=1,
            prompts=60,
            draws=200,
            rng=generator,
        )
        covered += interval.low <= 0 <= interval.high
    assert 178 <= covered <= 199


def test_bootstrap_without_a_value_is_nan():
    found = ev.bootstrap(lambda *_: math.nan, seeds=1, prompts=2, draws=5, rng=rng())
    assert all(math.isnan(v) for v in found)


@settings(max_examples=50)
@given(st.integers(4, 60), st.integers(1, 8), st.integers(0, 10_000))
def test_auc_with_ties_is_scikit_learns(count, levels, seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(levels, size=count).astype(float)
    labels = generator.uniform(size=count) < 0.5
    labels[:2] = True, False
    assert ev.auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_auc_interval_against_a_loop():
    generator = rng()
    labels = generator.uniform(size=150) < 0.4
    scores = labels + generator.normal(size=150)
    found = ev.auc_interval(scores, labels, draws=800, rng=generator)
    loop = []
    for _ in range(800):
        rows = generator.integers(150, size=150)
        loop.append(roc_auc_score(labels[rows], scores[rows]))
    assert found.estimate == pytest.approx(roc_auc_score(labels, scores))
    np.testing.assert_allclose(
        [found.low, found.high], np.quantile(loop, [0.025, 0.975]), atol=0.02
    )


def test_grouped_auc_interval_is_wider_when_groups_repeat_rows():
    generator = rng()
    labels = generator.uniform(size=60) < 0.5
    scores = labels + generator.normal(size=60)
    groups = np.repeat(np.arange(60), 5)
    many = {"scores": np.repeat(scores, 5), "labels": np.repeat(labels, 5), "draws": 300}
    alone = ev.auc_interval(**many, rng=rng())
    together = ev.auc_interval(**many, groups=groups, rng=rng())
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_sign_test_is_the_binomial_test():
    for above, below in [(5, 0), (4, 1), (3, 3), (0, 0), (9, 2)]:
        values = np.array([1.0] * above + [-1.0] * below + [0.0])
        expected = binomtest(above, above + below).pvalue if above + below else 1.0
        assert ev.sign_test(values) == pytest.approx(expected)


def test_mean_and_error():
    assert ev.mean_and_error(np.array([1.0, 3.0])) == pytest.approx((2.0, 1.0))
    assert math.isnan(ev.mean_and_error(np.array([1.0]))[1])


def test_bad_input_is_named():
    good = np.zeros((2, 2))
    with pytest.raises(ValueError, match="one shape with at least one sample"):
        ev.summarise(np.zeros((0, 2)), np.zeros((0, 2)))
    bad = good.copy()
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match="costs must be finite: row 1"):
        ev.summarise(good, bad)
    with pytest.raises(ValueError, match="both classes: 2 positive of 2"):
        ev.auc(np.zeros(2), np.array([True, True]))
    with pytest.raises(ValueError, match="same seeds and prompts"):
        ev.matched_difference(
            sweep([0.5], [1.0]),
            sweep([0.5], [1.0], prompts=3),
            measure="reward",
            match="safety",
            rng=rng(),
        )
