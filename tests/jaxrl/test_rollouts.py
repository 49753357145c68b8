"""Generation against fresh forward passes, and sampling against brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxrl import policy
from jaxrl.models import Decoder, DecoderConfig, LoraConfig
from jaxrl.models.config import LORA_TARGETS
from jaxrl.rollouts import Sampling, categorical, draw, generate, generate_from_state, truncate
from jaxrl.types import Prompts

CONFIG = DecoderConfig(
    vocab_size=9, layers=2, embed=16, heads=4, kv_heads=2, head_dim=6, mlp=20, max_len=32,
    qk_norm=True,
)  # fmt: skip
GEMMA = {
    "windows": (3, None), "window_rope_theta": 50.0, "post_norms": True, "norm_plus_one": True,
    "scale_embeddings": True, "attention_softcap": 1.5, "logit_softcap": 3.0, "query_scale": 0.3,
}  # fmt: skip
NEVER, EOS, PAD = 99, 1, 0
PROMPTS = Prompts(
    tokens=jnp.asarray([[0, 0, 3, 2], [5, 2, 2, 7], [0, 0, 0, 8]], jnp.int32),
    mask=jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], bool),
    ids=jnp.arange(3),
)


def peaked(config: DecoderConfig = CONFIG) -> Decoder:
    """A decoder whose distributions are far from uniform and differ between rows."""
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)
    return nnx.merge(graphdef, params)


MODEL = peaked()


@nnx.jit(static_argnames=("temperature",))
def fresh_log_probs(model, tokens, mask, *, temperature):
    return policy.evaluate(model, PROMPTS, tokens, mask, temperature=temperature).log_probs


# --- generation ---------------------------------------------------------------------------------

SETTINGS = {
    "plain": {},
    "cool": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6, "temperature": 1.5},
    "greedy": {"greedy": True, "temperature": 0.7},
    "ends": {"eos_id": EOS},
}


@pytest.mark.parametrize(
    ("name", "group_size"), [("plain", 1), ("top_p", 1), *((name, 4) for name in SETTINGS)]
)
def test_log_probs_are_those_of_a_fresh_forward(name, group_size):
    sampling = Sampling(**{"max_new_tokens": 6, "eos_id": NEVER, "pad_id": PAD, **SETTINGS[name]})
    out = generate(MODEL, PROMPTS, jax.random.key(0), sampling, group_size=group_size)
    assert out.tokens.shape == out.mask.shape == out.log_probs.shape == (3, group_size, 6)
    expected = fresh_log_probs(MODEL, out.tokens, out.mask, temperature=sampling.temperature)
    np.testing.assert_allclose(out.log_probs, expected, atol=1e-4)
    assert np.any(out.log_probs < -0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "qk_norm": False},
        {"kv_heads": 4},
        {"tie_embeddings": False},
        GEMMA,
        {"experts": 4, "experts_per_token": 2},
        {"lora": LoraConfig(rank=2, targets=LORA_TARGETS)},
    ],
    ids=lambda changes: "-".join(changes)[:40],
)
def test_log_probs_are_those_of_a_fresh_forward_in_other_decoders(changes):
    model = Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    noisy = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)
    model = nnx.merge(graphdef, noisy)  # biases are not 0 any more, nor norms 1
    sampling = Sampling(max_new_tokens=5, eos_id=NEVER, pad_id=PAD)
    out = generate(model, PROMPTS, jax.random.key(0), sampling, group_size=2)
    expected = fresh_log_probs(model, out.tokens, out.mask, temperature=1.0)
    np.testing.assert_allclose(out.log_probs, expected, atol=1e-4)
    assert np.any(out.log_probs < -0.1)


def test_log_probs_are_those_of_a_fresh_forward_when_the_cache_grows():
    model = peaked(dataclasses.replace(CONFIG, max_len=48))
    sampling = Sampling(max_new_tokens=41, eos_id=NEVER, pad_id=PAD)
    out = generate(model, PROMPTS, jax.random.key(0), sampling, group_size=2)
    expected = fresh_log_probs(model, out.tokens, out.mask, temperature=1.0)
    np.testing.assert_allclose(out.log_probs, expected, atol=1e-4)


def test_greedy_takes_the_likeliest_token():
    sampling = Sampling(max_new_tokens=5, eos_id=NEVER, pad_id=PAD, greedy=True)
    out = generate(MODEL, PROMPTS, jax.random.key(0), sampling, group_size=2)
    hidden = nnx.jit(Decoder.completion_hidden)(MODEL, PROMPTS, out.tokens)
    np.testing.assert_array_equal(out.tokens, jnp.argmax(MODEL.logits(hidden), axis=-1))
    np.testing.assert_array_equal(out.tokens[:, 0], out.tokens[:, 1])


def test_a_row_ends_with_its_end_of_sequence():
    sampling = Sampling(max_new_tokens=12, eos_id=EOS, pad_id=PAD, temperature=4.0)
    out = generate(MODEL, PROMPTS, jax.random.key(1), sampling, group_size=16)
    tokens, mask = np.asarray(out.tokens).reshape(-1, 12), np.asarray(out.mask).reshape(-1, 12)
    lengths = []
    for row, chosen, log_probs in zip(
        tokens, mask, np.asarray(out.log_probs).reshape(-1, 12), strict=True
    ):
        ends = np.flatnonzero(row == EOS)
        length = ends[0] + 1 if len(ends) else 12  # the end-of-sequence token is the policy's own
        np.testing.assert_array_equal(chosen, np.arange(12) < length)
        assert np.all(row[length:] == PAD)
        assert np.all(log_probs[length:] == 0)
        lengths.append(length)
    assert min(lengths) < 12 <= max(lengths)


def test_generation_stops_when_every_row_has_ended():
    steps = []

    class Counting(Decoder):
        def decode(self, *args):
            jax.debug.callback(lambda: steps.append(1))
            return super().decode(*args)

    graphdef = nnx.graphdef(Counting(CONFIG, rngs=nnx.Rngs(0)))
    model = nnx.merge(graphdef, nnx.state(MODEL))
    sampling = Sampling(max_new_tokens=25, eos_id=EOS, pad_id=PAD, temperature=8.0)
    row = jax.tree.map(lambda x: x[:1], PROMPTS)
    out = generate(model, row, jax.random.key(0), sampling, group_size=2)
    jax.effects_barrier()
    longest = int(out.mask.sum(-1).max())
    assert len(steps) == longest < 25  # near-uniform: a row goes on for 9 steps on average


def test_one_token_completions():
    sampling = Sampling(max_new_tokens=1, eos_id=EOS, pad_id=PAD)
    out = generate(MODEL, PROMPTS, jax.random.key(0), sampling, group_size=4)
    assert np.all(out.mask)
    expected = fresh_log_probs(MODEL, out.tokens, out.mask, temperature=1.0)
    np.testing.assert_allclose(out.log_probs, expected, atol=1e-4)


def test_keys():
    sampling = Sampling(max_new_tokens=6, eos_id=NEVER, pad_id=PAD, temperature=2.0)

    def tokens(key):
        return np.asarray(generate(MODEL, PROMPTS, key, sampling, group_size=4).tokens)

    first = tokens(jax.random.key(0))
    np.testing.assert_array_equal(first, tokens(jax.random.key(0)))
    assert not np.array_equal(first, tokens(jax.random.key(1)))
    assert len(np.unique(first[0], axis=0)) == 4  # completions of one group differ


def test_prompt_padding_changes_nothing():
    sampling = Sampling(max_new_tokens=6, eos_id=NEVER, pad_id=PAD)
    wide = Prompts(
        tokens=jnp.pad(PROMPTS.tokens, ((0, 0), (3, 0)), constant_values=4),
        mask=jnp.pad(PROMPTS.mask, ((0, 0), (3, 0))),
        ids=PROMPTS.ids,
    )
    expected = generate(MODEL, PROMPTS, jax.random.key(0), sampling, group_size=4)
    got = generate(MODEL, wide, jax.random.key(0), sampling, group_size=4)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-4)


def test_new_weights_prompts_and_keys_do_not_recompile():
    sampling = Sampling(max_new_tokens=6, eos_id=NEVER, pad_id=PAD)
    graphdef, params = nnx.split(MODEL)

    def run(params, key):
        generate_from_state(
            params, PROMPTS, key, graphdef=graphdef, sampling=sampling, group_size=4
        )

    run(params, jax.random.key(0))
    compiled = generate_from_state._cache_size()
    run(jax.tree.map(lambda x: 0.9 * x, params), jax.random.key(5))
    generate(MODEL, PROMPTS, jax.random.key(7), sampling, group_size=4)
    assert generate_from_state._cache_size() == compiled


def test_bfloat16_generation_is_near_float32():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    sampling = Sampling(max_new_tokens=6, eos_id=NEVER, pad_id=PAD)
    out = generate(peaked(config), PROMPTS, jax.random.key(0), sampling, group_size=4)
    assert out.log_probs.dtype == jnp.float32
    expected = fresh_log_probs(MODEL, out.tokens, out.mask, temperature=1.0)
    gap = np.abs(out.log_probs - expected)
    assert 1e-5 < gap.mean() < 0.1


@pytest.mark.parametrize("name", ["plain", "top_p"])
def test_second_tokens_are_drawn_from_the_policys_distribution(name):
    """Chi-square of the pair (first, second) against its exact probability."""
    sampling = Sampling(**{"max_new_tokens": 2, "eos_id": NEVER, "pad_id": PAD, **SETTINGS[name]})
    row = jax.tree.map(lambda x: x[1:2], PROMPTS)
    out = generate(MODEL, row, jax.random.key(3), sampling, group_size=4096)
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(9), jnp.arange(9), indexing="ij"), -1)
    hidden = nnx.jit(Decoder.completion_hidden)(MODEL, row, pairs.reshape(1, 81, 2))
    scaled = np.asarray(MODEL.logits(hidden))[0] / sampling.temperature
    probs = np.stack([[nucleus(x, sampling.top_p) for x in pair] for pair in scaled])
    first, second = np.asarray(pairs.reshape(81, 2)).T
    expected = 4096 * probs[np.arange(81), 0, first] * probs[np.arange(81), 1, second]
    counts = np.bincount(np.asarray(out.tokens[0] @ jnp.asarray([9, 1])), minlength=81)
    assert np.all(counts[expected == 0] == 0)
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    assert stats.chisquare(counts[keep], expected[keep], sum_check=False).pvalue > 1e-3


# --- sampling -----------------------------------------------------------------------------------


def nucleus(scaled, top_p: float):
    """The renormalised distribution over the smallest set of mass p, ties at its edge included."""
    weights = np.exp(np.asarray(scaled, np.float64) - np.max(scaled))
    probs, kept, mass = weights / weights.sum(), np.zeros(len(weights), bool), 0.0
    for value in sorted(set(scaled), reverse=True):
        if mass >= top_p:
            break
        kept |= scaled == value
        mass = probs[kept].sum()
    return np.where(kept, probs, 0) / probs[kept].sum()


logit_rows = st.lists(st.integers(-4, 4), min_size=8, max_size=8)  # integers: ties are common


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.sampled_from([1, 2, 3, 5, 8, 20]))
def test_top_k_against_brute_force(row, k):
    scaled = np.asarray(row, np.float32)
    got = np.asarray(truncate(jnp.asarray(scaled), top_k=k, top_p=1.0)) > -1e20
    kth = sorted(row, reverse=True)[min(k, 8) - 1]
    np.testing.assert_array_equal(got, scaled >= kth)  # what ties with the k-th stays


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.sampled_from([0.05, 0.31, 0.5, 0.83, 0.97]), st.sampled_from([0, 3]))
def test_top_p_against_brute_force(row, p, k):
    scaled = np.asarray(row, np.float32)
    got = np.asarray(truncate(jnp.asarray(scaled), top_k=k, top_p=p)) > -1e20
    if k:  # the nucleus is that of the distribution renormalised over the top k
        scaled = np.where(scaled >= sorted(row, reverse=True)[k - 1], scaled, -np.inf)
    np.testing.assert_array_equal(got, nucleus(scaled, p) > 0)


def test_no_truncation_is_the_identity():
    logits = jnp.asarray([[1.0, -2.0, 3.0]])
    np.testing.assert_array_equal(truncate(logits, top_k=0, top_p=1.0), logits)
    np.testing.assert_array_equal(truncate(logits, top_k=3, top_p=1.0), logits)


jitted_categorical = jax.jit(categorical)
zero_or_more = st.one_of(st.just(0.0), st.floats(2**-10, 1.0, width=32))
weight_rows = st.sampled_from([1, 5, 12]).flatmap(
    lambda size: st.lists(zero_or_more, min_size=size, max_size=size).filter(any)
)
edges = st.sampled_from([0.0, 2.0**-23, 0.5, 1 - 2.0**-23])  # 1 − 2⁻²³ is the largest drawn
uniform = st.one_of(edges, st.floats(0, 1 - 2.0**-23, width=32))


@settings(max_examples=200, deadline=None)
@given(weight_rows, uniform, uniform)
def test_categorical_inverts_the_distribution_function(row, first, second):
    with np.errstate(divide="ignore"):
        scaled = np.log(np.asarray(row, np.float32))
    scaled = np.where(np.isneginf(scaled), -1e30, scaled).astype(np.float32)
    uniforms = jnp.asarray([first, second], jnp.float32)
    got = int(jitted_categorical(uniforms, jnp.asarray(scaled)))
    assert row[got] > 0
    weights, width = np.asarray(row, np.float64), int(np.ceil(np.sqrt(len(row))))
    starts = range(0, len(row), width)
    sums = [weights[i : i + width].sum() for i in starts]
    start = width * (got // width)
    below, within = sum(sums[: got // width]), weights[start:got].sum()
    for lower, size, whole, u in (
        (below, sums[got // width], sum(sums), first),
        (within, weights[got], sums[got // width], second),
    ):
        assert lower - 1e-5 * whole <= u * whole <= lower + size + 1e-5 * whole


@pytest.mark.parametrize("vocab", [1, 2, 3, 10, 101, 260])
def test_categorical_draws_every_token_at_its_rate(vocab):
    scaled = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)
    rows = jnp.broadcast_to(jnp.asarray(scaled), (2**16, vocab))
    uniforms = jax.random.uniform(jax.random.key(0), (2, 2**16))
    counts = np.bincount(jitted_categorical(uniforms, rows), minlength=vocab)
    assert len(counts) == vocab
    expected = 2**16 * np.exp(scaled) / np.exp(scaled).sum()
    if vocab > 1:
        assert stats.chisquare(counts, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 2.0, "top_k": 4, "top_p": 0.8}],
)
def test_draws_follow_the_truncated_softmax(changes):
    sampling = Sampling(max_new_tokens=1, eos_id=NEVER, pad_id=PAD, **changes)
    logits = np.asarray([1.3, 0.2, -0.7, 2.0, 0.9, -1.5], np.float32)
    rows = jnp.broadcast_to(jnp.asarray(logits), (8192, 6))
    uniforms = jax.random.uniform(jax.random.key(0), (2, 8192))
    tokens, log_probs = jax.jit(draw, static_argnums=2)(uniforms, rows, sampling)
    scaled = logits / sampling.temperature
    full = scaled - np.log(np.exp(scaled).sum())
    np.testing.assert_allclose(log_probs, full[np.asarray(tokens)], atol=1e-5)
    if sampling.top_k:
        scaled = np.where(np.argsort(np.argsort(-scaled)) < sampling.top_k, scaled, -np.inf)
    expected = 8192 * nucleus(scaled, sampling.top_p)
    counts = np.bincount(np.asarray(tokens), minlength=6)
    assert np.all(counts[expected == 0] == 0)
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be ≥ 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0; use greedy=True"),
        ({"top_k": -1}, "top_k must be ≥ 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_sampling_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 4, "eos_id": EOS, "pad_id": PAD, **changes})


def test_prompt_and_completion_must_fit_the_context():
    sampling = Sampling(max_new_tokens=29, eos_id=EOS, pad_id=PAD)
    with pytest.raises(ValueError, match=r"max_len.*32.*4.*29"):
        generate(MODEL, PROMPTS, jax.random.key(0), sampling)
