"""Log-probabilities, entropies and divergences against plain NumPy and a naive forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl import policy
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.types import Prompts

CONFIG = DecoderConfig(
    vocab_size=11, layers=2, embed=16, heads=4, kv_heads=2, head_dim=6, mlp=20, max_len=32
)
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
PROMPTS = Prompts(
    tokens=jnp.asarray([[0, 0, 3, 1], [5, 2, 2, 7]], jnp.int32),
    mask=jnp.asarray([[False, False, True, True], [True] * 4]),
    ids=jnp.arange(2),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 3, 4)), jnp.int32)
MASK = jnp.arange(4)[None, None] < jnp.asarray([[1, 4, 2], [0, 3, 4]])[..., None]


def softmax(logits, temperature):
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_of_logits_against_numpy(temperature):
    rng = np.random.default_rng(0)
    logits, other = rng.normal(size=(2, 5, 7)).astype(np.float32) * 3
    tokens = rng.integers(0, 7, 5)
    p, q = softmax(logits, temperature), softmax(other, temperature)
    got = policy.token_log_probs(jnp.asarray(logits), jnp.asarray(tokens), temperature=temperature)
    np.testing.assert_allclose(got, np.log(p[np.arange(5), tokens]), rtol=1e-4)
    got = policy.entropy(jnp.asarray(logits), temperature=temperature)
    np.testing.assert_allclose(got, -(p * np.log(p)).sum(-1), rtol=1e-4)
    got = policy.full_kl(jnp.asarray(logits), jnp.asarray(other), temperature=temperature)
    np.testing.assert_allclose(got, (p * np.log(p / q)).sum(-1), rtol=1e-4)


def test_kl_of_a_policy_to_itself_is_zero():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
    np.testing.assert_allclose(policy.full_kl(logits, logits), 0.0, atol=1e-6)


def test_the_kl_is_the_mean_log_ratio():
    rng = np.random.default_rng(0)
    logits, other = jnp.asarray(rng.normal(size=(2, 1, 6)), jnp.float32)
    tokens, rows = jnp.arange(6), lambda x: jnp.broadcast_to(x, (6, 6))
    log_p = policy.token_log_probs(rows(logits), tokens)
    log_q = policy.token_log_probs(rows(other), tokens)
    np.testing.assert_allclose(
        jnp.sum(jnp.exp(log_p) * (log_p - log_q)), policy.full_kl(logits, other)[0], rtol=1e-5
    )


def test_log_probs_of_impossible_and_certain_tokens():
    logits = jnp.asarray([[-1e4, 0.0], [-1e4, 0.0]])
    got = policy.token_log_probs(logits, jnp.asarray([0, 1]), temperature=0.5)
    np.testing.assert_array_equal(got, [-2e4, 0.0])
    np.testing.assert_array_equal(policy.entropy(logits), [0.0, 0.0])


@nnx.jit(static_argnames=("temperature", "with_entropy"))
def evaluate(model, tokens, mask, *, temperature=1.0, with_entropy=True):
    return policy.evaluate(
        model, PROMPTS, tokens, mask, temperature=temperature, with_entropy=with_entropy
    )


@nnx.jit
def whole_logits(model, tokens, segments):
    return model(tokens, segments)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_evaluate_is_a_forward_of_the_whole_sequences(temperature):
    got = evaluate(MODEL, TOKENS, MASK, temperature=temperature)
    for g in range(3):
        rows = jnp.concatenate([PROMPTS.tokens, TOKENS[:, g]], axis=1)
        segments = jnp.concatenate([PROMPTS.mask, jnp.ones_like(MASK[:, g])], axis=1)
        p = softmax(
            np.asarray(whole_logits(MODEL, rows, segments.astype(jnp.int32)))[:, 3:-1], temperature
        )
        chosen = np.log(np.take_along_axis(p, np.asarray(TOKENS[:, g])[..., None], -1)[..., 0])
        mask = np.asarray(MASK[:, g])
        np.testing.assert_allclose(got.log_probs[:, g], np.where(mask, chosen, 0), atol=1e-4)
        spread = np.where(mask, -(p * np.log(p)).sum(-1), 0)
        np.testing.assert_allclose(got.entropy[:, g], spread, atol=1e-4)


def test_entropy_can_be_left_out():
    whole = evaluate(MODEL, TOKENS, MASK)
    bare = evaluate(MODEL, TOKENS, MASK, with_entropy=False)
    np.testing.assert_allclose(bare.log_probs, whole.log_probs, atol=1e-6)
    np.testing.assert_array_equal(bare.entropy, np.zeros(TOKENS.shape))


def test_masked_tokens_change_nothing_and_carry_no_gradient():
    graphdef, params = nnx.split(MODEL)

    @jax.jit
    def loss_and_grad(params, tokens):
        def loss(params):
            output = policy.evaluate(
                nnx.merge(graphdef, params), PROMPTS, tokens, MASK, temperature=1.0
            )
            return jnp.sum(output.log_probs * output.log_probs)

        return jax.value_and_grad(loss)(params)

    expected, grads = loss_and_grad(params, TOKENS)
    got, changed = loss_and_grad(params, jnp.where(MASK, TOKENS, 9))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
        assert np.any(a != 0)


def test_gradient_against_finite_differences():
    graphdef, params = nnx.split(MODEL)

    @jax.jit
    def loss(params):
        output = policy.evaluate(
            nnx.merge(graphdef, params), PROMPTS, TOKENS, MASK, temperature=0.7
        )
        return jnp.sum(output.log_probs)

    grads = jax.jit(jax.grad(loss))(params)
    direction = jax.tree.map(lambda x: x / norm(grads), grads)

    def moved(step):
        return loss(jax.tree.map(lambda p, d: p + step * d, params, direction))

    # Along its own direction a gradient's slope is its norm.
    slope = (moved(3e-3) - moved(-3e-3)) / 6e-3
    np.testing.assert_allclose(slope, norm(grads), rtol=2e-2)


def norm(tree):
    return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))


# --- logits in chunks ---------------------------------------------------------------------------


def chunked(size):
    config = dataclasses.replace(CONFIG, logit_chunk=size, logit_softcap=2.0)
    return nnx.split(Decoder(config, rngs=nnx.Rngs(0)))


def loss_and_output(size):
    graphdef, params = chunked(size)

    def loss(params):
        model = nnx.merge(graphdef, params)
        output = policy.evaluate(model, PROMPTS, TOKENS, MASK, temperature=0.7)
        weights = jnp.arange(TOKENS.size, dtype=jnp.float32).reshape(TOKENS.shape)
        return jnp.sum(output.log_probs * weights), output

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_change_neither_results_nor_gradients(size):
    (_, output), grads = loss_and_output(size)
    (_, expected), expected_grads = loss_and_output(None)
    np.testing.assert_allclose(output.log_probs, expected.log_probs, atol=1e-6)
    np.testing.assert_allclose(output.entropy, expected.entropy, atol=1e-6)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=1e-4), grads, expected_grads
    )


def test_chunked_logits_never_exist_whole():
    graphdef, params = nnx.split(
        Decoder(dataclasses.replace(CONFIG, logit_chunk=2), rngs=nnx.Rngs(0))
    )

    def loss(params):
        model = nnx.merge(graphdef, params)
        return jnp.sum(policy.evaluate(model, PROMPTS, TOKENS, MASK, temperature=1.0).log_probs)

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "f32[2,3,2,11]" in text
    assert "f32[2,3,4,11]" not in text
    assert "f32[2,2,3,2,11]" not in text  # nor stacked over the chunks
