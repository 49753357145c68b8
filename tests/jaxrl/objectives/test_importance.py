"""Importance correction: by hand, and against gradients summed over every completion."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.objectives import ClippedSurrogate, Reinforce, held_to_cap, importance_ratio


def logs(*probabilities):
    return jnp.log(jnp.asarray(probabilities, jnp.float32)).reshape(1, 1, -1)


ON = jnp.ones((1, 1, 2), bool)


def test_levels_by_hand():
    """Ratios .4/.2 = 2 and .1/.4 = ¼; their product is ½."""
    ratio = partial(importance_ratio, logs(0.4, 0.1), logs(0.2, 0.4))
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    close(ratio(ON, level="token")[0, 0], [2, 0.25])
    close(ratio(ON, level="sequence")[0, 0], [0.5, 0.5])
    close(ratio(jnp.array([[[True, False]]]), level="sequence")[0, 0], [2, 2])


def test_the_cap():
    ratio = jnp.array([0.0, 1.9, 2.0, 2.1, jnp.inf])
    np.testing.assert_allclose(held_to_cap(ratio, cap=2.0, beyond="truncate"), [0, 1.9, 2, 2, 2])
    np.testing.assert_allclose(held_to_cap(ratio, cap=2.0, beyond="mask"), [0, 1.9, 2, 0, 0])
    np.testing.assert_array_equal(held_to_cap(ratio, cap=None, beyond="mask"), ratio)


@pytest.mark.parametrize(("advantage", "expected"), [(1.0, -2 * 1.2), (-1.0, 2 * 2.5)])
def test_the_clip_is_about_the_proximal_policy_and_the_weight_about_the_behaviour(
    advantage, expected
):
    """μ = .1, proximal = .2, π = .5: w = 2, r = 2.5, clipped at 1.2 where A > 0."""
    objective = ClippedSurrogate(correction="token", correction_cap=None)
    arguments = logs(0.5), logs(0.1), jnp.full((1, 1, 1), advantage), ON[..., :1]
    found = objective.per_token(*arguments, logs(0.2))
    assert float(found[0, 0, 0]) == pytest.approx(expected, rel=1e-5)
    capped = ClippedSurrogate(correction="token", correction_cap=1.5)
    assert float(capped.per_token(*arguments, logs(0.2))[0, 0, 0]) == pytest.approx(
        expected * 1.5 / 2, rel=1e-5
    )
    # Without correction the ratio is π/μ = 5, and nothing else is asked.
    plain = ClippedSurrogate().per_token(*arguments)
    assert float(plain[0, 0, 0]) == pytest.approx(-1.2 if advantage > 0 else 5.0, rel=1e-5)


# ----------------- two tokens of three, nine completions: expectations are sums over them all

COMPLETIONS = np.array(list(itertools.product(range(3), repeat=2)))
ROWS = np.stack([np.zeros(9, int), 1 + COMPLETIONS[:, 0]], axis=1)


def token_log_probs(logits):
    return jax.nn.log_softmax(logits)[ROWS, COMPLETIONS]  # [9, 2]


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    policy, behaviour = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    advantage = jnp.asarray(rng.normal(size=9), jnp.float32)
    return policy, behaviour, advantage


@partial(jax.jit, static_argnums=0)
def expected_gradient(objective, policy, behaviour, advantage):
    """−∇ of the loss, in expectation over completions of the behaviour policy."""
    before, written = token_log_probs(policy), token_log_probs(behaviour)

    def loss(logits):
        losses = objective.per_token(
            token_log_probs(logits)[:, None],
            written[:, None],
            jnp.broadcast_to(advantage[:, None, None], (9, 1, 2)),
            jnp.ones((9, 1, 2), bool),
            before[:, None],
        )
        return jnp.exp(written.sum(axis=1)) @ losses.mean(axis=(1, 2))

    return -jax.grad(loss)(policy)


@pytest.mark.parametrize(
    "objective",
    [
        ClippedSurrogate(level="sequence", correction="sequence", correction_cap=None),
        Reinforce(correction="sequence", correction_cap=None),
    ],
)
def test_sequence_weights_without_cap_give_the_exact_gradient_for_any_behaviour(objective, table):
    """E_μ[(π/μ)·A·∇log π] = ∇E_π A: the mean over 2 tokens halves REINFORCE's sum."""
    policy, behaviour, advantage = table
    exact = jax.grad(lambda z: jnp.exp(token_log_probs(z).sum(axis=1)) @ advantage)(policy)
    scale = 0.5 if isinstance(objective, Reinforce) else 1.0
    found = expected_gradient(objective, policy, behaviour, advantage)
    np.testing.assert_allclose(found, scale * exact, atol=1e-6)
    without = expected_gradient(
        type(objective)(**{"level": "sequence"} if scale == 1.0 else {}),
        policy,
        behaviour,
        advantage,
    )
    assert float(jnp.abs(without - scale * exact).max()) > 0.05


@pytest.mark.parametrize("beyond", ["truncate", "mask"])
def test_a_cap_biases_towards_what_the_behaviour_writes_often(beyond, table):
    """E_μ[w·A·∇log π] with w = min(π/μ, c) is Σ min(π, cμ)·A·∇log π; "mask" drops the rest."""
    policy, behaviour, advantage = table
    objective = Reinforce(correction="sequence", correction_cap=1.5, beyond_cap=beyond)
    pi, mu = (np.exp(np.asarray(token_log_probs(z).sum(axis=1))) for z in (policy, behaviour))
    kept = np.minimum(pi, 1.5 * mu) if beyond == "truncate" else np.where(pi > 1.5 * mu, 0, pi)
    assert (kept < pi).any()
    scores = jax.jacobian(lambda z: token_log_probs(z).sum(axis=1))(policy)
    expected = 0.5 * jnp.einsum("k,kij->ij", jnp.asarray(kept) * advantage, scores)
    found = expected_gradient(objective, policy, behaviour, advantage)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_token_weights_correct_the_token_and_not_the_state_it_is_drawn_in(table):
    """E_μ[Σ_t (π/μ)_t·A·∇log π_t]: the second token's states keep μ's frequencies."""
    policy, behaviour, advantage = table
    objective = Reinforce(correction="token", correction_cap=None)
    pi, mu = (np.exp(np.asarray(token_log_probs(z))) for z in (policy, behaviour))
    per_token = jax.jacobian(token_log_probs)(policy)  # [9, 2, 4, 3]
    first = np.einsum("k,kij->ij", pi[:, 0] * mu[:, 1] * np.asarray(advantage), per_token[:, 0])
    second = np.einsum("k,kij->ij", mu[:, 0] * pi[:, 1] * np.asarray(advantage), per_token[:, 1])
    found = expected_gradient(objective, policy, behaviour, advantage)
    np.testing.assert_allclose(found, 0.5 * (first + second), atol=1e-6)


def test_weights_are_not_differentiated_and_padding_has_none():
    objective = Reinforce(correction="sequence")
    mask = jnp.array([[[True, False]]])
    junk = jnp.array([[[0.0, 50.0]]])
    weights = objective.weights(logs(0.4, 0.4) + junk, logs(0.2, 0.2), mask)
    np.testing.assert_allclose(weights[0, 0], [2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("objective", [ClippedSurrogate, Reinforce])
def test_a_cap_that_lets_nothing_through_is_refused(objective):
    with pytest.raises(ValueError, match="correction_cap must be positive or None"):
        objective(correction_cap=0.0)


def test_a_correction_without_the_policy_before_the_update_is_refused():
    with pytest.raises(ValueError, match="give its log-probabilities"):
        Reinforce(correction="token").per_token(logs(0.5), logs(0.5), logs(1.0), ON[..., :1])
