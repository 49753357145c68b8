"""Penalties, multipliers and mixing rules, by hand and by brute force."""

import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl import constraints
from jaxrl.constraints import Bounded, FixedPenalty, Lagrangian, Rectified, Unconstrained
from jaxrl.types import REFERENCE_VERSION, Prompts, Rollouts


def rollouts(reward, cost, *, by_reference=None, ids=None):
    """One-token rollouts with the given [B, G] scores."""
    reward, cost = jnp.asarray(reward, jnp.float32), jnp.asarray(cost, jnp.float32)
    shape = (*reward.shape, 1)
    ids = jnp.arange(shape[0]) if ids is None else jnp.asarray(ids)
    version = jnp.zeros(shape, jnp.int32)
    if by_reference is not None:
        version = jnp.where(jnp.asarray(by_reference)[..., None], REFERENCE_VERSION, version)
    return Rollouts(
        prompts=Prompts(
            tokens=jnp.zeros((shape[0], 1), jnp.int32), mask=jnp.ones((shape[0], 1), bool), ids=ids
        ),
        tokens=jnp.zeros(shape, jnp.int32),
        mask=jnp.ones(shape, bool),
        behaviour_log_probs=jnp.zeros(shape),
        reference_log_probs=jnp.zeros(shape),
        policy_version=version,
        rewards={"reward": reward},
        costs={"cost": cost},
    )


# Two prompts, costs {−3, −1} and {0, 2}: the mean constraint reads −.5, both rectified ones .5.
TWO_PROMPTS = jnp.array([[-3.0, -1.0], [0.0, 2.0]])


def test_two_prompts_are_feasible_on_average_and_violated_when_rectified():
    assert TWO_PROMPTS.mean() == -0.5
    for rectify in ("sample", "prompt"):
        found = constraints.rectified(TWO_PROMPTS, margin=0.0, rectify=rectify)
        assert found.mean() == 0.5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), margin=st.floats(0, 2), single=st.booleans())
def test_rectifying_means_is_never_stricter_than_samples(seed, margin, single):
    """Jensen: {E C}⁺ ≤ E {C}⁺, with equality for one completion a prompt."""
    cost = jnp.asarray(np.random.default_rng(seed).normal(size=(5, 1 if single else 4)))
    sample = constraints.rectified(cost, margin=margin, rectify="sample")
    prompt = constraints.rectified(cost, margin=margin, rectify="prompt")
    assert float(prompt.mean()) <= float(sample.mean()) + 1e-6
    if single:
        np.testing.assert_array_equal(prompt, sample)


def test_lagrangian_mixing_by_hand():
    """(A_r − λA_c)/(1 + λ) with A_r = 1, A_c = .4, λ = 1 is .3."""
    one = jnp.ones((1, 1, 1))
    found = Lagrangian().mix(jnp.ones((1, 1)), one, 0.4 * one, jnp.zeros((1, 1)))
    np.testing.assert_allclose(found, 0.3, rtol=1e-6)


A_R = jnp.array([[[1.0], [2.0]]])
A_C = jnp.array([[[0.5], [-1.0]]])
SAFE_UNSAFE = jnp.array([[-1.0, 3.0]])
LAMBDA = jnp.full((1, 1), 4.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The switch: safe 1; unsafe (2 + 4)/5.
        ({}, [1.0, 1.2]),
        # The exact gradient: 1 − 2 on the safe sample too.
        ({"cost_on": "all", "normalise": "none"}, [-1.0, 6.0]),
        ({"cost_on": "all", "normalise": "all"}, [-0.2, 1.2]),
        ({"cost_on": "all", "normalise": "unsafe"}, [-1.0, 1.2]),
        # Without its reward the unsafe sample keeps 4/5.
        ({"unsafe_reward": False}, [1.0, 0.8]),
        ({"normalise": "none"}, [1.0, 6.0]),
        # One of each: the sum of two means weighs each sample twice.
        ({"batch_mean": "by_subset"}, [2.0, 2.4]),
        # Mean cost 1 > 0: the whole batch is unsafe.
        ({"switch": "batch"}, [-0.2, 1.2]),
        # {E_y C}⁺ > 0: the whole prompt is unsafe.
        ({"rectify": "prompt"}, [-0.2, 1.2]),
        # C + δ > 0 for both.
        ({"margin": 2.0}, [-0.2, 1.2]),
    ],
)
def test_each_reading_of_repo_by_hand(options, expected):
    found = Rectified(**options).mix(LAMBDA, A_R, A_C, SAFE_UNSAFE)
    np.testing.assert_allclose(found[0, :, 0], expected, rtol=1e-6)


def test_without_multiplier_or_violation_repo_is_ppo():
    for constraint in (Rectified(), Rectified(cost_on="all", normalise="none")):
        found = constraint.mix(jnp.zeros((1, 1)), A_R, A_C, SAFE_UNSAFE)
        np.testing.assert_array_equal(found, A_R)
    np.testing.assert_array_equal(Rectified().mix(LAMBDA, A_R, A_C, -jnp.ones((1, 2))), A_R)


def test_an_unsafe_batch_with_raw_critic_is_ppo_lagrangian():
    unsafe = jnp.ones((1, 2))
    np.testing.assert_array_equal(
        Rectified().mix(LAMBDA, A_R, A_C, unsafe), Lagrangian().mix(LAMBDA, A_R, A_C, unsafe)
    )


@pytest.mark.parametrize(
    ("critic", "signal"), [("raw", [[-2.5, -0.5], [0.5, 2.5]]), ("rectified", [[0, 0], [0.5, 2.5]])]
)
def test_what_the_cost_critic_learns(critic, signal):
    found = Rectified(cost_critic_target=critic, margin=0.5).signal(TWO_PROMPTS)
    np.testing.assert_allclose(found, signal)


# ------------------------------------------------------------------------ the multiplier


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rule=st.sampled_from(["additive", "log_sgd"]),
    per_prompt=st.booleans(),
    rectify=st.sampled_from(["sample", "prompt"]),
)
def test_a_rectified_multiplier_never_falls(seed, rule, per_prompt, rectify):
    constraint = Rectified(rule=rule, per_prompt=per_prompt, rectify=rectify, window=4)
    state, rng = constraint.init(3), np.random.default_rng(seed)
    for _ in range(5):
        new, _ = constraint.update(state, rollouts(np.zeros((3, 2)), rng.normal(size=(3, 2))))
        assert bool(jnp.all(new.value >= state.value))
        assert float(new.value.max()) <= 5.0
        state = new


def test_additive_ascent_by_hand():
    """λ = 1 + .1·mean{−1, 3}⁺ = 1.15."""
    constraint = Rectified()
    state, metrics = constraint.update(constraint.init(1), rollouts([[0, 0]], SAFE_UNSAFE))
    assert float(state.value) == pytest.approx(1.15)
    assert float(metrics["violation"]) == pytest.approx(1.5)


def test_log_sgd_follows_a_window_of_raw_costs():
    """log λ += .1·λ·(mean of the last 3 costs): as safe-rlhf, by a plain deque."""
    constraint = Lagrangian(window=3)
    state, seen, value = constraint.init(1), [], 1.0
    for costs in ([2.0, -4.0], [1.0, 5.0], [-3.0, 0.5]):
        state, _ = constraint.update(state, rollouts([[0, 0]], [costs]))
        seen = (seen + costs)[-3:]
        value = min(value * np.exp(0.1 * value * np.mean(seen)), 5.0)
        assert float(state.value) == pytest.approx(value, rel=1e-5)


def test_threshold_and_delay():
    constraint = Lagrangian(margin=1.0, rule="additive", delay=1)
    state, _ = constraint.update(constraint.init(1), rollouts([[0.0]], [[-0.5]]))
    assert float(state.value) == 1.0  # delayed
    state, _ = constraint.update(state, rollouts([[0.0]], [[-0.5]]))
    assert float(state.value) == pytest.approx(1.05)  # E C + 1 = .5 > 0


def test_the_reference_policys_completions_do_not_move_the_multiplier():
    constraint = Rectified()
    batch = rollouts([[0, 0]], [[-1.0, 9.0]], by_reference=[[False, True]])
    state, _ = constraint.update(constraint.init(1), batch)
    assert float(state.value) == 1.0


def test_a_multiplier_for_each_prompt_moves_only_where_seen():
    constraint = Rectified(per_prompt=True)
    batch = rollouts([[0, 0]], [[1.0, 3.0]], ids=[2])
    state, _ = constraint.update(constraint.init(4), batch)
    np.testing.assert_allclose(state.value, [1.0, 1.0, 1.2, 1.0], rtol=1e-6)
    np.testing.assert_allclose(
        constraint.multiplier(state, jnp.array([2, 0])), [[1.2], [1.0]], rtol=1e-6
    )


# ----------------------------------------------------------------------- bounded penalty


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), multiplier=st.floats(0, 1e4), scale=st.floats(0.1, 100))
def test_the_bounded_penalty_is_needed_and_no_more(seed, multiplier, scale):
    rng = np.random.default_rng(seed)
    reward = jnp.asarray(scale * rng.normal(size=6), jnp.float32)
    violation = jnp.asarray(np.maximum(rng.normal(size=6), 0.0), jnp.float32)
    penalty = constraints.bounded_penalty(
        reward, violation, jnp.float32(multiplier), kl_coef=0.1, bound=10.0
    )
    safe = np.asarray(violation) == 0.0
    assert not np.asarray(penalty)[safe].any()
    assert (np.asarray(penalty) >= 0).all()
    assert (penalty <= multiplier * violation * (1 + 1e-5) + 1e-5).all()
    base = reward[safe].max() if safe.any() else reward.min()
    floor = jnp.minimum(reward, base) - 1.0  # κβ = 1
    assert (reward - penalty >= floor - 1e-3 * scale).all()


def test_a_large_multiplier_leaves_unsafe_samples_exactly_the_bound_below_the_best_safe():
    reward, violation = jnp.array([9.0, 1.0, -2.0]), jnp.array([2.0, 0.0, 0.5])
    found = reward - constraints.bounded_penalty(
        reward, violation, jnp.array(1e6), kl_coef=0.2, bound=10.0
    )
    np.testing.assert_allclose(found, [-1.0, 1.0, -4.0])


def test_a_known_safe_answer_makes_the_penalty_the_same_in_every_group():
    """b = 1 from outside: an unsafe R = 9 ends at b − κβ = −1 with whomever it is drawn."""
    penalty = partial(
        constraints.bounded_penalty, multiplier=jnp.array(1e6), kl_coef=0.2, bound=10.0
    )
    for others, costs in (
        [[1.0, 0.0], [0.0, 0.0]],
        [[-2.0, -3.0], [0.0, 1.0]],
        [[4.0, 5.0], [1.0, 1.0]],
    ):
        reward = jnp.array([9.0, *others])
        found = penalty(reward, jnp.array([1.0, *costs]), best_safe=jnp.array(1.0))
        assert float(reward[0] - found[0]) == pytest.approx(-1.0)
    # A better one in the group itself counts too; none known is as if nothing were said.
    reward, violation = jnp.array([9.0, 3.0]), jnp.array([1.0, 0.0])
    for known in (1.0, -jnp.inf):
        found = penalty(reward, violation, best_safe=jnp.array(known))
        np.testing.assert_allclose(found, penalty(reward, violation))


def test_the_bound_may_be_measured_from_the_group_alone():
    """R = (9, 0), the first unsafe, b = 0 in the group and 1 known: R' = b − κβ = −2 or −1."""
    scores = jnp.array([[9.0, 0.0]]), jnp.array([[3.0, -1.0]])
    for best_of, expected in (("group", -2.0), ("prompt", -1.0)):
        rule = Rectified(bound=10.0, normalise="none", best_of=best_of)
        found = rule.penalised(
            jnp.full((1, 1), 1e6), *scores, kl_coef=0.2, best_safe=jnp.array([1.0])
        )
        np.testing.assert_allclose(found, [[expected, 0.0]], atol=1e-5)


def test_replayed_completions_do_not_move_the_multiplier():
    """Versions 5, 4 and the reference's: at max_lag 0 only the first counts, C⁺ = 2."""
    batch = rollouts([[0.0, 0.0, 0.0]], [[2.0, 7.0, 9.0]])
    batch = batch.replace(policy_version=jnp.array([5, 4, REFERENCE_VERSION]).reshape(1, 3, 1))
    for max_lag, mean in ((0, 2.0), (1, 4.5), (None, 4.5)):
        rule = Rectified(init_value=1.0, rate=0.5, max_value=None, max_lag=max_lag)
        state, _ = rule.update(rule.init(1), batch)
        assert float(state.value) == pytest.approx(1.0 + 0.5 * mean)
    only_reference = batch.replace(policy_version=jnp.full((1, 3, 1), REFERENCE_VERSION))
    rule = Rectified(max_lag=0)
    assert float(rule.update(rule.init(1), only_reference)[0].value) == 1.0
    with pytest.raises(ValueError, match="max_lag must not be negative"):
        Rectified(max_lag=-1)


def test_the_bound_limits_the_odds_of_unsafe_responses():
    """At the target P(unsafe)/P(best safe) = e^−κ · the reference's odds, at any reward scale."""
    reference, kappa = np.array([0.97, 0.02, 0.01]), 10.0
    for scale, kl_coef in itertools.product((0.1, 1.0, 100.0), (0.01, 0.5)):
        reward = scale * jnp.array([5.0, 1.0, -2.0])
        penalty = constraints.bounded_penalty(
            reward, jnp.array([1.0, 0.0, 0.0]), jnp.array(1e9), kl_coef=kl_coef, bound=kappa
        )
        log_target = np.log(reference) + np.asarray(reward - penalty, np.float64) / kl_coef
        odds = log_target[0] - log_target[1]
        assert odds == pytest.approx(np.log(0.97 / 0.02) - kappa, abs=2e-3)


# ------------------------------------------------------------ squashed multipliers (2.4)


def test_bounded_mix_golden():
    """N = 2, u = (0, 1), A_0 = .2, A = (1, −.5) → .288259."""
    found = constraints.bounded_mix(jnp.array([0.0, 1.0]), jnp.array(0.2), jnp.array([1.0, -0.5]))
    assert float(found) == pytest.approx(0.288259, abs=1e-6)


def _values(weights):
    """E r_1, E r_2 on 4 arms with a uniform reference, tilted by the weights: π ∝ e^{w·r}."""
    rewards = jnp.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    return rewards @ jax.nn.softmax(weights @ rewards)


def test_descent_ascent_finds_the_exact_multipliers():
    """θ = (.7, .6): independent tilts μ* = logit θ = (.84730, .40547)."""
    theta, weights = jnp.array([0.7, 0.6]), jnp.zeros(2)
    for _ in range(600):
        weights = weights - 1.0 * (_values(weights) - theta)
    np.testing.assert_allclose(weights, [0.84730, 0.40547], atol=1e-4)


def test_tanh_weights_solve_the_same_problem():
    """s_i/(2 − Σs) = μ*_i with s = tanh u: s = (.75223, .35997), u = (.97807, .37685)."""
    theta, raw = jnp.array([0.7, 0.6]), jnp.zeros(2)

    @jax.jit
    def step(raw):
        squashed = jnp.tanh(raw)
        values = _values(squashed / (2.0 - squashed.sum()))
        gradient = jax.grad(lambda u: jnp.sum(jnp.tanh(u) * (values - theta)))(raw)
        return raw - 0.3 * gradient

    for _ in range(800):
        raw = step(raw)
    np.testing.assert_allclose(jnp.tanh(raw), [0.75223, 0.35997], atol=1e-4)
    np.testing.assert_allclose(raw, [0.97807, 0.37685], atol=2e-4)


@pytest.mark.parametrize("squash", ["sigmoid", "tanh"])
def test_a_bounded_multiplier_rises_with_cost_and_stays_bounded(squash):
    constraint = Bounded(squash=squash, rate=10.0)
    state = constraint.init(1)
    for _ in range(50):
        state, metrics = constraint.update(state, rollouts([[0.0]], [[3.0]]))
    assert 0.5 < float(metrics["multiplier"]) <= 1.0
    down, _ = constraint.update(state, rollouts([[0.0]], [[-30.0]]))
    assert float(down.value) <= float(state.value)


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rectified(margin=-0.1), "margin must not be negative"),
        (lambda: Rectified(bound=0.0), "positive number of nats"),
        (lambda: Rectified(max_value=0.5), "at least init_value"),
        (lambda: Lagrangian(init_value=0.0), "cannot leave 0"),
        (lambda: Lagrangian(window=0), "window must be at least 1"),
        (lambda: FixedPenalty(coef=-1.0), "coef must not be negative"),
        # A wrong name is a type error in the tests, whose hook checks types; not for users.
        (
            lambda: constraints._require_choice(
                SimpleNamespace(switch="token"), "switch", "sample", "batch"
            ),
            "switch must be one of sample, batch: 'token'",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fixed_penalties_are_raw_or_rectified():
    reward, cost = jnp.ones((1, 2)), SAFE_UNSAFE
    two = jnp.full((1, 1), 2.0)
    shaping = FixedPenalty(coef=2.0).penalised(two, reward, cost, kl_coef=0.1)
    np.testing.assert_allclose(shaping, [[3.0, -5.0]])
    exact = FixedPenalty(coef=2.0, rectify_cost=True).penalised(two, reward, cost, kl_coef=0.1)
    np.testing.assert_allclose(exact, [[1.0, -5.0]])
    free = Unconstrained().penalised(two, reward, cost, kl_coef=0.1)
    np.testing.assert_allclose(free, reward)
