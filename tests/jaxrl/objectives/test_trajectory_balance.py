"""Trajectory balance: golden numbers, and convergence on a table of 64 sequences."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.objectives import TrajectoryBalance, tb_residual

# The golden group of the specification.
BETA = 0.5
REWARDS = np.array([1.0, 0.0, 0.0, 1.0])
LOG_PROB = np.array([-5.0, -6.0, -7.0, -8.0])
REFERENCE = np.array([-5.5, -5.5, -7.2, -7.0])


def golden(log_prob=LOG_PROB):
    return tb_residual(
        jnp.asarray(log_prob, jnp.float32),
        jnp.asarray(REFERENCE, jnp.float32),
        jnp.asarray(REWARDS, jnp.float32),
        kl_coef=BETA,
    )


def test_golden_group():
    """log Ẑ = 1.2, δ = (−.3, .7, 1.4, −1.8), mean δ² = 1.445."""
    residual = golden()
    np.testing.assert_allclose(residual, [-0.3, 0.7, 1.4, -1.8], atol=1e-6)
    assert float(jnp.mean(residual**2)) == pytest.approx(1.445, abs=1e-6)
    log_z = residual - (LOG_PROB - REFERENCE - REWARDS / BETA)
    np.testing.assert_allclose(log_z, 1.2, atol=1e-6)


def test_golden_gradient_and_the_advantages_it_implies():
    gradient = jax.grad(lambda lp: 0.5 * jnp.mean(golden(lp) ** 2))(jnp.asarray(LOG_PROB))
    np.testing.assert_allclose(gradient, [-0.075, 0.175, 0.35, -0.45], atol=1e-6)
    np.testing.assert_allclose(-BETA * golden(), [0.15, -0.35, -0.7, 0.9], atol=1e-6)


def test_the_loss_is_mean_baseline_reinforce_in_reward_units():
    """∇(½β·mean δ²) = −mean_j A_j·∇log π(y_j), A = centred R − β·log(π/π_ref)."""

    def loss(lp):
        per_sample = TrajectoryBalance().per_group(
            lp, jnp.asarray(REFERENCE), jnp.asarray(REWARDS), kl_coef=BETA
        )
        return jnp.mean(per_sample)

    penalised = REWARDS - BETA * (LOG_PROB - REFERENCE)
    advantage = penalised - penalised.mean()
    found = jax.grad(loss)(jnp.asarray(LOG_PROB))
    np.testing.assert_allclose(found, -advantage / 4, atol=1e-6)


def test_a_constant_added_to_the_rewards_changes_nothing():
    lifted = tb_residual(
        jnp.asarray(LOG_PROB), jnp.asarray(REFERENCE), jnp.asarray(REWARDS + 100.0), kl_coef=BETA
    )
    np.testing.assert_allclose(lifted, golden(), atol=1e-3)


def test_a_group_of_one_or_no_anchor_is_refused():
    with pytest.raises(ValueError, match="at least two completions"):
        tb_residual(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), kl_coef=1.0)
    with pytest.raises(ValueError, match="positive kl_coef"):
        tb_residual(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), kl_coef=0.0)


# ------------------------------------------ a policy over 4 tokens × 3 places (64 sequences)

SEQUENCES = np.array(list(itertools.product(range(4), repeat=3)))
PREFIX = np.stack(
    [np.zeros(64, int), 1 + SEQUENCES[:, 0], 5 + 4 * SEQUENCES[:, 0] + SEQUENCES[:, 1]], axis=1
)  # row of the logits
KL_COEF, GROUP = 0.25, 20


def sequence_log_probs(logits):
    """Of all 64 sequences; one row of logits for each of the 21 prefixes."""
    return jnp.sum(jax.nn.log_softmax(logits)[PREFIX, SEQUENCES], axis=1)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    reference = sequence_log_probs(jnp.asarray(rng.normal(size=(21, 4)), jnp.float32))
    rewards = jnp.asarray(rng.random(64) < 0.25, jnp.float32)
    target = jax.nn.softmax(reference + rewards / KL_COEF)
    return reference, rewards, target


@partial(jax.jit, static_argnames=("steps", "centre_kl"))
def fit(behaviour, reference, rewards, *, steps, centre_kl=True):
    """SGD on groups of 20 from a fixed behaviour policy; returns the final policy."""

    def loss(logits, drawn):
        log_prob = sequence_log_probs(logits)[drawn]
        if centre_kl:
            return jnp.mean(
                TrajectoryBalance().per_group(
                    log_prob, reference[drawn], rewards[drawn], kl_coef=KL_COEF
                )
            )
        # The negative control: only the rewards are centred.
        kl = jax.lax.stop_gradient(log_prob - reference[drawn])
        advantage = rewards[drawn] - rewards[drawn].mean() - KL_COEF * kl
        return -jnp.mean(advantage * log_prob)

    def step(logits, key):
        drawn = jax.random.categorical(key, behaviour, shape=(GROUP,))
        return logits - 6.0 * jax.grad(loss)(logits, drawn), None

    keys = jax.random.split(jax.random.key(1), steps)
    logits, _ = jax.lax.scan(step, jnp.zeros((21, 4)), keys)
    return jnp.exp(sequence_log_probs(logits))


def total_variation(a, b):
    return 0.5 * float(jnp.abs(a - b).sum())


def test_uniform_behaviour_reaches_the_target(world):
    reference, rewards, target = world
    start = total_variation(jnp.full(64, 1 / 64), target)
    found = fit(jnp.zeros(64), reference, rewards, steps=3000)
    assert start > 0.5
    assert total_variation(found, target) < 1e-3


def test_the_reference_as_fixed_behaviour_reaches_the_target_too(world):
    """Maximally stale samples, and no importance ratio: the check that matters."""
    reference, rewards, target = world
    found = fit(reference, reference, rewards, steps=6000)
    assert total_variation(found, target) < 3e-3


def test_with_a_baseline_of_rewards_only_the_off_policy_limit_is_wrong(world):
    reference, rewards, target = world
    found = fit(reference, reference, rewards, steps=3000, centre_kl=False)
    assert total_variation(found, target) > 0.1
