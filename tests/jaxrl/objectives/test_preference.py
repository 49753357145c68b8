"""Losses of learned rewards and costs against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.objectives.preference import cost_loss, label_loss, reward_loss

scores = st.floats(-20, 20, allow_nan=False, width=32)


def _one(*values):
    return [jnp.array([v], jnp.float32) for v in values]


def test_reward_loss_worked_example():
    # r_b = 2, r_w = 1/2: -log σ(1.5) = log(1 + e^-1.5) = .201413; .001 · (4 + .25)/2 = .002125
    np.testing.assert_allclose(reward_loss(*_one(2.0, 0.5)), [0.203538], atol=1e-6)


def test_cost_loss_worked_example():
    # c_safer = -1 (safe), c_unsafer = 2 (unsafe):
    #   -log σ(3) = .048587; -log σ(1) = .313262; -log σ(2) = .126928; .001 · 5/2 = .0025
    np.testing.assert_allclose(cost_loss(*_one(-1.0, 2.0, -1.0, 1.0)), [0.491277], atol=1e-6)


def test_cost_loss_of_two_unsafe_responses_pushes_both_up():
    # Both unsafe at c = 0: labels contribute -σ(0) = -½ each, the ranking ±½ between them.
    safer, unsafer, one = _one(0.0, 0.0, 1.0)
    gradient = jax.grad(lambda s, u: cost_loss(s, u, one, one).sum(), argnums=(0, 1))
    assert gradient(safer, unsafer) == (pytest.approx(0.0), pytest.approx(-1.0))


def test_unknown_sign_leaves_the_ranking_only():
    safer, unsafer, zero = _one(0.3, 1.1, 0.0)
    gradient = jax.grad(lambda u: cost_loss(safer, u, zero, zero).sum())
    expected = jax.grad(lambda u: reward_loss(u, safer).sum())
    np.testing.assert_allclose(gradient(unsafer), expected(unsafer), rtol=1e-6)


def test_zero_is_the_boundary_of_a_fitted_cost():
    # Identical pairs: by symmetry the optimum is (-c, c), where the gradient
    # -σ(-2c) - σ(-c) + ridge·c vanishes only for a positive c.
    safer, unsafer, minus, plus = _one(3.0, 5.0, -1.0, 1.0)
    gradient = jax.jit(jax.grad(lambda x: cost_loss(x[0], x[1], minus, plus, ridge=0.1).sum()))
    x = jnp.stack([safer, unsafer])
    for _ in range(2000):
        x = x - 0.5 * gradient(x)
    c = float(x[1, 0])
    assert c > 0
    np.testing.assert_allclose(x[0], -x[1], atol=1e-4)
    assert 1 / (1 + np.exp(2 * c)) + 1 / (1 + np.exp(c)) == pytest.approx(0.1 * c, abs=1e-4)


@given(scores, scores, st.floats(-5, 5, width=32))
def test_reward_loss_ignores_a_shift(better, worse, shift):
    plain = reward_loss(*_one(better, worse), ridge=0.0)
    shifted = reward_loss(*_one(better + shift, worse + shift), ridge=0.0)
    np.testing.assert_allclose(plain, shifted, atol=1e-4)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_label_loss_is_least_at_the_logit(target):
    grid = jnp.linspace(-5, 5, 2001)
    losses = label_loss(grid, jnp.full_like(grid, target), ridge=0.0)
    best = float(grid[jnp.argmin(losses)])
    assert best == pytest.approx(np.log(target / (1 - target)), abs=5e-3)


def test_large_scores_stay_finite():
    values = [reward_loss(*_one(-1e4, 1e4)), cost_loss(*_one(1e4, -1e4, -1.0, 1.0))]
    values.append(label_loss(*_one(1e4, 0.0)))
    assert all(np.isfinite(v).all() for v in values)
