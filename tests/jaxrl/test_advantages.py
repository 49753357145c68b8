"""Advantages against plain loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl import advantages as adv


def plain_gae(rewards, values, length, gamma, lam):
    """The recursion of arXiv:1506.02438, eq. 16, one token after the other."""
    advantages = np.zeros(len(rewards))
    running = 0.0
    for t in reversed(range(length)):
        following = values[t + 1] if t + 1 < length else 0.0
        running = rewards[t] + gamma * following - values[t] + gamma * lam * running
        advantages[t] = running
    return advantages


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 6),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_is_the_plain_recursion_and_ignores_padding(seed, length, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=6), rng.normal(size=6)
    found = adv.gae(
        jnp.asarray(rewards, jnp.float32),
        jnp.asarray(values, jnp.float32),
        jnp.arange(6) < length,
        gamma=gamma,
        gae_lambda=lam,
    )
    np.testing.assert_allclose(
        found, plain_gae(rewards, values, length, gamma, lam), rtol=1e-4, atol=1e-5
    )


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards = np.array([3.0, -1.0, 0.5, 2.0])
    others = np.array([np.delete(rewards, i).mean() for i in range(4)])
    np.testing.assert_allclose(adv.leave_one_out(jnp.asarray(rewards)), rewards - others, rtol=1e-6)


def test_leave_one_out_needs_a_group():
    with pytest.raises(ValueError, match="at least two completions"):
        adv.leave_one_out(jnp.ones(1))


def test_group_normalised_is_the_z_score_of_the_group():
    rewards = np.array([1.0, 2.0, 4.0, 9.0])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    found = adv.group_normalised(jnp.asarray(rewards, jnp.float32), std_eps=1e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_equal_rewards_carry_no_signal():
    assert not adv.group_normalised(jnp.full(4, 0.3), std_eps=1e-4).any()


def test_discount_counts_the_tokens_that_follow():
    mask = jnp.array([True, True, True, False])
    found = adv.discount_to_end(jnp.array(2.0), mask, gamma=0.5)
    np.testing.assert_allclose(found, [0.5, 1.0, 2.0, 0.0])


def test_reward_to_go_sums_what_is_left():
    mask = jnp.array([True, True, True, False])
    found = adv.reward_to_go(jnp.array([1.0, 2.0, 3.0, 100.0]), mask)
    np.testing.assert_allclose(found, [6.0, 5.0, 3.0, 0.0])


def test_remax_is_the_exact_gradient_in_expectation():
    """Σ_y π(y)·∇log π(y)·(r(y) − r(greedy)) = ∇ E r, enumerated."""
    logits = jnp.array([0.3, -0.2, 1.1, 0.0])
    rewards = jnp.array([1.0, 2.0, -0.5, 0.7])
    policy = jax.nn.softmax(logits)
    advantage = adv.greedy_baseline(rewards, rewards[jnp.argmax(logits)], clip=None)
    scores = jax.jacobian(jax.nn.log_softmax)(logits)  # [response, logit]
    estimate = (policy * advantage) @ scores
    exact = jax.grad(lambda z: jax.nn.softmax(z) @ rewards)(logits)
    np.testing.assert_allclose(estimate, exact, atol=1e-7)


def test_remax_baseline_cuts_the_variance():
    """Six arms with rewards 5 + N(0, 1): variance ≈ .006 of none, the mean baseline ≈ .0045."""
    rng = np.random.default_rng(0)
    ratios = {"greedy": [], "mean": []}
    for _ in range(200):
        rewards, logits = 5 + rng.normal(size=6), 0.5 * rng.normal(size=6)
        policy = np.exp(logits) / np.exp(logits).sum()
        scores = np.eye(6) - policy

        def variance(baseline, policy=policy, rewards=rewards, scores=scores):
            samples = (rewards - baseline)[:, None] * scores
            mean = policy @ samples
            return policy @ ((samples - mean) ** 2).sum(axis=1)

        none = variance(0.0)
        ratios["greedy"].append(variance(rewards[logits.argmax()]) / none)
        ratios["mean"].append(variance(policy @ rewards) / none)
    assert np.median(ratios["greedy"]) < 0.08
    assert np.median(ratios["mean"]) < np.median(ratios["greedy"])


def test_sampling_the_greedy_completion_gives_exactly_zero():
    found = adv.greedy_baseline(jnp.array([1.7, 0.1]), jnp.array(1.7), clip=5.0)
    assert found[0] == 0.0


def test_greedy_advantage_is_clipped():
    found = adv.greedy_baseline(jnp.array([100.0, -100.0]), jnp.array(0.0), clip=5.0)
    np.testing.assert_allclose(found, [5.0, -5.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adv.GAE(gae_lambda=1.5), "gae_lambda must lie in"),
        (lambda: adv.GAE(clip_range_value=0.0), "clip_range_value must be positive"),
        (lambda: adv.GroupNormalised(std_eps=0.0), "std_eps must be positive"),
        (lambda: adv.GreedyBaseline(gamma=0.0), "gamma must lie in"),
        (lambda: adv.GreedyBaseline(clip=-1.0), "clip must be positive or None"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_standardise_uses_unmasked_entries_only():
    values = jnp.array([1.0, 3.0, 1000.0])
    found = adv.standardise(values, jnp.array([True, True, False]))
    np.testing.assert_allclose(found, [-1.0, 1.0, 0.0], atol=1e-6)
