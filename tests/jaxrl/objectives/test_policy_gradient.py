"""Policy-gradient losses, reductions and KL estimates against closed forms."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import objectives as obj


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.0),  # inside the clip: −r·A
        (1.5, 2.0, -2.4, 0.0),  # above it with A > 0: held at −1.2·A
        (0.5, 2.0, -1.0, -2.0),  # below it with A > 0: free to come back
        (1.5, -2.0, 3.0, 2.0),  # above it with A < 0: free to come back
        (0.5, -2.0, 1.6, 0.0),  # below it with A < 0: held at .8·A
    ],
)
def test_clipped_surrogate_and_its_gradient_by_hand(ratio, advantage, loss, slope):
    def clipped(r):
        return obj.clipped_surrogate(r, jnp.float32(advantage), clip_eps=0.2)

    found, gradient = jax.value_and_grad(clipped)(jnp.float32(ratio))
    assert float(found) == pytest.approx(loss)
    assert float(gradient) == pytest.approx(slope)


def test_upper_clip_may_differ():
    one = jnp.ones(())
    found = obj.clipped_surrogate(2.0 * one, one, clip_eps=0.2, clip_eps_high=0.5)
    assert float(found) == pytest.approx(-1.5)


def test_at_ratio_one_the_surrogate_has_reinforces_gradient():
    advantage = jnp.array([[[0.3, -1.0]]])
    behaviour = jnp.array([[[-1.0, -2.0]]])
    mask = jnp.ones((1, 1, 2), bool)

    def loss(log_probs, objective):
        return obj.token_mean(objective.per_token(log_probs, behaviour, advantage, mask), mask)

    surrogate = jax.grad(loss)(behaviour, obj.ClippedSurrogate())
    plain = jax.grad(loss)(behaviour, obj.Reinforce())
    np.testing.assert_allclose(surrogate, plain, rtol=1e-6)


def test_sequence_ratio_is_the_product_of_the_tokens():
    log_probs = jnp.log(jnp.array([[[1.1, 1.05, 7.0]]]))
    mask = jnp.array([[[True, True, False]]])
    advantage = jnp.ones((1, 1, 3))
    found = obj.ClippedSurrogate(level="sequence").per_token(
        log_probs, jnp.zeros((1, 1, 3)), advantage, mask
    )
    np.testing.assert_allclose(found[0, 0, :2], -1.1 * 1.05, rtol=1e-6)


def test_reductions_differ_by_the_weight_of_long_completions():
    losses = jnp.array([[[1.0, 99.0, 99.0], [4.0, 4.0, 4.0]]])
    mask = jnp.array([[[True, False, False], [True, True, True]]])
    assert float(obj.token_mean(losses, mask)) == pytest.approx(13 / 4)
    assert float(obj.sequence_mean(losses, mask)) == pytest.approx(5 / 2)
    np.testing.assert_allclose(obj.sequence_sum(losses, mask), [[1.0, 12.0]])


def test_an_empty_completion_counts_as_nothing():
    losses, mask = jnp.full((1, 2, 2), 3.0), jnp.zeros((1, 2, 2), bool)
    assert float(obj.token_mean(losses, mask)) == 0.0
    assert float(obj.sequence_mean(losses, mask)) == 0.0


def test_value_loss_takes_the_worse_of_clipped_and_free():
    """V = 8, V_old = 0, G = 10, clip 5: ½·max((8−10)², (5−10)²) = 12.5."""
    found = obj.clipped_value_loss(
        jnp.float32(8.0), jnp.float32(0.0), jnp.float32(10.0), clip_range=5.0
    )
    assert float(found) == 12.5


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_are_unbiased_and_k3_never_negative(estimator):
    logits, reference = jnp.array([0.1, 1.0, -0.5]), jnp.array([0.7, 0.0, 0.2])
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    exact = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
    found = obj.kl_estimate(log_p, log_q, estimator=estimator)
    assert float(jnp.sum(jnp.exp(log_p) * found)) == pytest.approx(float(exact), abs=1e-6)
    if estimator == "k3":
        assert bool((found >= 0).all())


def test_k3_in_the_loss_has_the_gradient_of_the_other_divergence():
    """E_π ∇k3 = ∇KL(π_ref‖π) and E_π ∇k1 = 0: neither is ∇KL(π‖π_ref)."""
    logits, reference = jnp.array([0.1, 1.0, -0.5]), jnp.array([0.7, 0.0, 0.2])
    log_q = jax.nn.log_softmax(reference)
    policy = jax.nn.softmax(logits)

    def in_loss(z, estimator):
        return policy @ obj.kl_estimate(jax.nn.log_softmax(z), log_q, estimator=estimator)

    other = jax.grad(lambda z: jnp.exp(log_q) @ (log_q - jax.nn.log_softmax(z)))(logits)
    np.testing.assert_allclose(jax.grad(in_loss)(logits, "k3"), other, atol=1e-6)
    np.testing.assert_allclose(jax.grad(in_loss)(logits, "k1"), 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (obj.ClippedSurrogate(), "clip_eps", 1.0, "clip_eps must lie in"),
        (obj.ClippedSurrogate(), "clip_eps_high", 0.0, "clip_eps_high must be positive"),
        (obj.ClippedSurrogate(), "level", "word", "level must be 'token' or 'sequence'"),
        (obj.Reinforce(), "reduce", "sum", "reduce must be"),
    ],
)
def test_options_out_of_range_are_refused(config, field, value, message):
    changed = copy.copy(config)
    object.__setattr__(changed, field, value)  # around the tests' own check of types
    with pytest.raises(ValueError, match=message):
        changed.__post_init__()
