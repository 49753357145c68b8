"""Batches of rollouts: who wrote what, under which log-probabilities, with which keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl import policy
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.rollouts import Collector, Sampling
from jaxrl.types import REFERENCE_VERSION, Prompts

CONFIG = DecoderConfig(
    vocab_size=12, layers=1, embed=8, heads=2, kv_heads=1, head_dim=4, mlp=8, max_len=12,
    remat="none",
)  # fmt: skip
EOS, PAD = 1, 0
SAMPLING = Sampling(max_new_tokens=6, eos_id=EOS, pad_id=PAD, temperature=0.7, top_k=6)
PROMPTS = Prompts(
    tokens=jnp.asarray([[0, 2], [3, 4], [5, 2]], jnp.int32),
    mask=jnp.asarray([[False, True], [True, True], [True, True]]),
    ids=jnp.asarray([7, 3, 9]),
)


def peaked(seed):
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(seed)))
    return graphdef, jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)


GRAPHDEF, PARAMS = peaked(0)
REFERENCE = peaked(1)[1]
VERSION = 5


def collect(*, key=0, group_size=4, reference_completions=2, greedy=False):
    collector = Collector(
        graphdef=GRAPHDEF,
        sampling=SAMPLING,
        group_size=group_size,
        reference_completions=reference_completions,
        greedy=greedy,
    )
    return collector.collect(PARAMS, REFERENCE, PROMPTS, jax.random.key(key), jnp.int32(VERSION))


@jax.jit
def log_probs_of(params, tokens, mask):
    model = nnx.merge(GRAPHDEF, params)
    return policy.evaluate(model, PROMPTS, tokens, mask, temperature=0.7).log_probs


def test_each_token_carries_who_wrote_it_and_how_likely_that_was():
    rollouts, greedy = collect()
    assert greedy is None
    mask = np.asarray(rollouts.mask)
    assert mask[:, :, 0].all()
    version = np.asarray(rollouts.policy_version)
    expected = np.where(np.arange(4) < 2, VERSION, REFERENCE_VERSION)[None, :, None]
    np.testing.assert_array_equal(version, np.where(mask, expected, 0))
    own = log_probs_of(PARAMS, rollouts.tokens, rollouts.mask)
    theirs = log_probs_of(REFERENCE, rollouts.tokens, rollouts.mask)
    assert float(jnp.max(jnp.abs(own - theirs))) > 0.5  # the two can be told apart
    # Of the full distribution at the temperature, although only six tokens may be drawn.
    np.testing.assert_allclose(rollouts.reference_log_probs, theirs, atol=1e-4)
    np.testing.assert_allclose(rollouts.behaviour_log_probs[:, :2], own[:, :2], atol=1e-4)
    np.testing.assert_allclose(rollouts.behaviour_log_probs[:, 2:], theirs[:, 2:], atol=1e-4)
    assert rollouts.prompts.ids.tolist() == [7, 3, 9]
    assert (dict(rollouts.rewards), dict(rollouts.costs)) == ({}, {})


def test_without_reference_completions_all_are_the_policys():
    rollouts, _ = collect(reference_completions=0)
    assert set(np.asarray(rollouts.policy_version)[np.asarray(rollouts.mask)]) == {VERSION}


def test_no_two_completions_share_their_randomness():
    """One model on both sides: equal keys would make the halves equal."""
    collector = Collector(
        graphdef=GRAPHDEF, sampling=SAMPLING, group_size=8, reference_completions=4
    )
    first, _ = collector.collect(PARAMS, PARAMS, PROMPTS, jax.random.key(0), 0)
    assert not np.array_equal(first.tokens[:, :4], first.tokens[:, 4:])
    again, _ = collector.collect(PARAMS, PARAMS, PROMPTS, jax.random.key(0), 0)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    other, _ = collector.collect(PARAMS, PARAMS, PROMPTS, jax.random.key(1), 0)
    assert not np.array_equal(first.tokens, other.tokens)


def test_the_greedy_completion_is_the_likeliest_and_stands_apart():
    rollouts, greedy = collect(greedy=True)
    assert rollouts.tokens.shape == (3, 4, 6)
    assert greedy.tokens.shape == (3, 1, 6)
    model = nnx.merge(GRAPHDEF, PARAMS)
    hidden = nnx.jit(Decoder.completion_hidden)(model, PROMPTS, greedy.tokens)
    best = jnp.argmax(model.logits(hidden), axis=-1)
    np.testing.assert_array_equal(jnp.where(greedy.mask, best, PAD), greedy.tokens)
    plain, _ = collect()
    np.testing.assert_array_equal(rollouts.tokens, plain.tokens)  # it costs no randomness


@pytest.mark.parametrize("count", [-1, 5])
def test_more_reference_completions_than_the_group_holds_are_refused(count):
    with pytest.raises(ValueError, match=r"between 0 and group_size: .*group_size=4"):
        collect(reference_completions=count)
