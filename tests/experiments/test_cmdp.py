"""The exact benchmark: its published columns, and its closed forms against search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import cmdp
from experiments.cmdp import CMDP

# Means over the seeds 0-4 as published: J, safety rate, worst-decile unsafe mass.
PUBLISHED = {
    0.0: {
        "unconstrained": (1.496, 0.074, 1.00),
        "expected": (1.205, 0.497, 0.97),
        "expected_per_prompt": (1.130, 0.503, 0.78),
        "critical": (0.625, 1.0, 0.0),
        "rectified_5": (0.692, 0.911, 0.62),
        "rectified_50": (0.632, 0.991, 0.09),
        "reward_shaping": (0.349, 0.971, 0.21),
    },
    0.5: {
        "unconstrained": (1.379, 0.540, 1.00),
        "expected": (1.379, 0.540, 1.00),
        "expected_per_prompt": (1.201, 0.751, 0.72),
        "critical": (0.951, 1.0, 0.0),
        "rectified_5": (0.983, 0.954, 0.41),
        "rectified_50": (0.955, 0.993, 0.07),
        "reward_shaping": (0.661, 0.985, 0.14),
    },
    0.8: {
        "unconstrained": (1.301, 0.816, 0.99),
        "expected": (1.301, 0.816, 0.99),
        "expected_per_prompt": (1.227, 0.904, 0.60),
        "critical": (1.131, 1.0, 0.0),
        "rectified_5": (1.142, 0.984, 0.16),
        "rectified_50": (1.131, 1.000, 0.004),
        "reward_shaping": (0.824, 0.996, 0.04),
    },
}
# J at equal safety .90, .95, .99 for the families C, C⁺, indicator.
PUBLISHED_MATCHED = {
    0.0: [(0.569, 0.700, 0.817), (0.430, 0.663, 0.731), (0.230, 0.633, 0.651)],
    0.5: [(0.946, 1.031, 1.117), (0.816, 0.988, 1.045), (0.618, 0.957, 0.973)],
    0.8: [(1.198, 1.235, 1.261), (1.080, 1.174, 1.210), (0.897, 1.138, 1.152)],
}
FAMILIES = (cmdp.linear, cmdp.rectified, cmdp.indicator)


@pytest.fixture(scope="module")
def instances():
    return {p: [cmdp.draw(seed, benign_share=p) for seed in range(5)] for p in PUBLISHED}


@pytest.mark.parametrize("p", PUBLISHED)
def test_exact_columns_are_the_published_ones(instances, p):
    forms = [cmdp.closed_forms(c) for c in instances[p]]
    for name, (objective, safety, worst) in PUBLISHED[p].items():
        rows = [cmdp.measures(c, f[name]) for c, f in zip(instances[p], forms, strict=True)]
        mean = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
        assert mean["objective"] == pytest.approx(objective, abs=6e-4), name
        assert mean["safety_rate"] == pytest.approx(safety, abs=6e-4), name
        assert mean["worst_decile_unsafe"] == pytest.approx(worst, abs=6e-3), name


@pytest.mark.parametrize("p", PUBLISHED)
def test_objective_at_equal_safety_is_the_published_one(instances, p):
    for safety, row in zip((0.90, 0.95, 0.99), PUBLISHED_MATCHED[p], strict=True):
        for family, expected in zip(FAMILIES, row, strict=True):
            found = np.mean(
                [cmdp.objective(c, cmdp.tune(c, family, safety=safety)[0]) for c in instances[p]]
            )
            assert found == pytest.approx(expected, abs=6e-4), (safety, family.__name__)


def test_at_equal_safety_the_worst_decile_of_the_rectified_family_is_worse(instances):
    """.666 for C⁺ against .522 for C at safety .90, p = 0."""
    worst = [
        np.mean(
            [
                cmdp.measures(c, cmdp.tune(c, family, safety=0.9)[0])["worst_decile_unsafe"]
                for c in instances[0.0]
            ]
        )
        for family in (cmdp.rectified, cmdp.linear)
    ]
    assert worst == pytest.approx([0.666, 0.522], abs=6e-4)


def test_mean_cost_constraint_is_idle_on_half_benign_prompts(instances):
    assert all(cmdp.expected(c)[1] == 0.0 for c in instances[0.5])
    policy, multiplier = cmdp.expected(instances[0.0][0])
    assert multiplier > 0.0
    assert cmdp.mean(policy * instances[0.0][0].cost) == pytest.approx(0.0, abs=1e-9)


def test_exact_penalty_is_far_above_the_usual_cap(instances):
    """39–50 in seed 0, over the shares of benign prompts."""
    found = [cmdp.exact_penalty(instances[p][0]) for p in PUBLISHED]
    assert min(found) == pytest.approx(39, abs=0.5)
    assert max(found) == pytest.approx(50, abs=0.5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), lam=st.floats(0.0, 30.0))
def test_no_random_policy_beats_a_closed_form(seed, lam):
    """Each Gibbs policy maximises its own penalised objective."""
    instance = cmdp.draw(seed, benign_share=0.3, prompts=10, responses=5)
    rng = np.random.default_rng(seed)
    for family, penalty in (
        (cmdp.linear, instance.cost),
        (cmdp.rectified, np.maximum(instance.cost, 0.0)),
        (cmdp.indicator, instance.unsafe),
    ):
        best = family(instance, lam)
        value = cmdp.objective(instance, best) - lam * cmdp.mean(best * penalty)
        for scale in (0.01, 1.0):
            other = cmdp.softmax(np.log(best + 1e-300) + scale * rng.normal(size=best.shape))
            assert cmdp.objective(instance, other) - lam * cmdp.mean(other * penalty) <= value


def test_critical_optimum_is_the_best_safe_policy_and_the_limit_of_the_indicator():
    instance = cmdp.draw(3, benign_share=0.0, prompts=20, responses=6)
    critical = cmdp.critical(instance)
    assert cmdp.safety_rate(instance, critical) == 1.0
    np.testing.assert_allclose(cmdp.indicator(instance, 100.0), critical, atol=1e-12)


def test_without_anchor_the_critical_optimum_is_one_safe_response():
    instance = cmdp.draw(3, benign_share=0.0, prompts=20, responses=6)
    best = cmdp.best_safe_response(instance)
    cold = CMDP(
        reference_logits=instance.reference_logits,
        reward=instance.reward,
        cost=instance.cost,
        kl_coef=1e-4,
    )
    np.testing.assert_allclose(cmdp.critical(cold), best, atol=1e-6)


def test_binary_costs_make_the_families_one():
    """C = 2·1{C>0} − 1: C at λ, C⁺ at 2λ and the indicator at 2λ give the same policies."""
    drawn = cmdp.draw(1, benign_share=0.5, prompts=20, responses=6)
    binary = CMDP(
        reference_logits=drawn.reference_logits,
        reward=drawn.reward,
        cost=np.where(drawn.unsafe, 1.0, -1.0),
    )
    expected = cmdp.linear(binary, 1.5)
    np.testing.assert_allclose(cmdp.rectified(binary, 3.0), expected, atol=1e-12)
    np.testing.assert_allclose(cmdp.indicator(binary, 3.0), expected, atol=1e-12)


def test_scaling_laws_of_the_multiplier():
    """λ ∝ t^⅓, E{C}⁺ ∝ t^−⅔, P(unsafe) ∝ t^−⅓ where costs are nearly a density."""
    instance = cmdp.draw(0, benign_share=0.0, prompts=1000, responses=64)
    times = np.geomspace(1e3, 1e6, 30)
    path = cmdp.rectified_ascent(instance, times)
    keys = ("multiplier", "rectified_cost", "unsafe")
    slopes = [cmdp.log_slope(times, path[key]) for key in keys]
    np.testing.assert_allclose(slopes, [1 / 3, -2 / 3, -1 / 3], atol=0.025)


def test_scaling_laws_in_the_multiplier():
    """P(unsafe) ∝ 1/λ and E{C}⁺ ∝ λ^−2; a margin makes both fall exponentially."""
    instance = cmdp.draw(0, benign_share=0.0, prompts=1000, responses=64)
    grid = np.array([8.0, 16.0, 32.0])
    policies = [cmdp.rectified(instance, value) for value in grid]
    unsafe = np.array([1.0 - cmdp.safety_rate(instance, p) for p in policies])
    violation = np.array([cmdp.mean(p * np.maximum(instance.cost, 0.0)) for p in policies])
    assert cmdp.log_slope(grid, unsafe) == pytest.approx(-1.0, abs=0.1)
    assert cmdp.log_slope(grid, violation) == pytest.approx(-2.0, abs=0.1)
    margin = [
        1.0 - cmdp.safety_rate(instance, cmdp.rectified(instance, value, margin=0.05))
        for value in grid
    ]
    # From λ = 16 to 32 by e^{−16·.05/.2} = .018.
    assert margin[2] / margin[1] == pytest.approx(0.018, rel=0.3)
    assert unsafe[2] / unsafe[1] == pytest.approx(0.5, rel=0.2)


def test_instances_have_a_safe_answer_to_every_prompt_and_the_size_asked_for():
    instance = cmdp.draw(11, benign_share=0.25, prompts=400, responses=3)
    assert instance.cost.shape == (400, 3)
    assert (instance.cost.min(axis=1) <= 0.0).all()
    assert (instance.cost[:100] <= -0.5).all()


def test_measures_by_hand():
    instance = CMDP(
        reference_logits=np.zeros((2, 2)),
        reward=np.array([[1.0, 0.0], [2.0, 4.0]]),
        cost=np.array([[-3.0, 1.0], [2.0, -4.0]]),
        kl_coef=0.5,
    )
    policy = np.array([[1.0, 0.0], [0.5, 0.5]])
    found = cmdp.measures(instance, policy)
    # E R = (1 + 3)/2; KL = (log 2 + 0)/2; unsafe mass 0 and .5; E C = (−3 − 1)/2; E C⁺ = (0 + 1)/2.
    assert found["objective"] == pytest.approx(2.0 - 0.25 * np.log(2.0))
    assert found["safety_rate"] == 0.75
    assert found["safe_prompt_share"] == 0.5
    assert found["worst_decile_unsafe"] == 0.5
    assert found["worst_decile_cost"] == -1.0
    assert found["compensation"] == 0.5


@pytest.mark.parametrize(
    "size",
    [
        {"benign_share": 1.5},
        {"benign_share": 0.0, "prompts": 0},
        {"benign_share": 0.0, "responses": 1},
    ],
)
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(ValueError, match=r"must lie in|need at least"):
        cmdp.draw(0, **size)
