"""Fine-tuning: the loss by hand, what it learns, and that it leaves its start alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrl.models import Decoder, DecoderConfig
from jaxrl.policy import negative_log_likelihood, packed_negative_log_likelihood
from jaxrl.rollouts import Sampling, generate_from_state
from jaxrl.supervised import Supervised
from jaxrl.types import PackedRows, Prompts

CONFIG = DecoderConfig(
    vocab_size=8, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, max_len=8,
    remat="none",
)  # fmt: skip
GRAPHDEF, PARAMS = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
EOS = 1
PROMPTS = Prompts(
    tokens=jnp.asarray([[0, 2], [3, 4]], jnp.int32),
    mask=jnp.asarray([[False, True], [True, True]]),
    ids=jnp.arange(2),
)
TOKENS = jnp.asarray([[5, 6, EOS], [7, EOS, 0]], jnp.int32)
MASK = jnp.asarray([[True, True, True], [True, True, False]])
TRAINER = Supervised(graphdef=GRAPHDEF, optimizer=optax.adam(1e-2))


def test_the_loss_is_the_mean_over_real_tokens():
    model = nnx.merge(GRAPHDEF, PARAMS)
    # Two sequences without padding, one after the other; the token at i + 1 is predicted at i.
    first = jax.nn.log_softmax(model(jnp.asarray([[2, 5, 6, EOS]])))[0]
    second = jax.nn.log_softmax(model(jnp.asarray([[3, 4, 7, EOS]])))[0]
    expected = -(first[0, 5] + first[1, 6] + first[2, EOS] + second[1, 7] + second[2, EOS]) / 5
    loss = nnx.jit(negative_log_likelihood)(model, PROMPTS, TOKENS, MASK)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    nothing = nnx.jit(negative_log_likelihood)(model, PROMPTS, TOKENS, jnp.zeros_like(MASK))
    assert float(nothing) == 0.0


def test_it_learns_the_demonstrations_and_nothing_of_the_padding():
    before = jax.tree.map(np.array, PARAMS)
    state, other = TRAINER.init(PARAMS), TRAINER.init(PARAMS)
    junk = jnp.where(MASK, TOKENS, 3)
    losses = []
    for _ in range(60):
        state, loss = TRAINER.update(state, PROMPTS, TOKENS, MASK)
        other, same = TRAINER.update(other, PROMPTS, junk, MASK)
        losses.append(float(loss))
        np.testing.assert_allclose(same, loss, rtol=1e-4)
    np.testing.assert_allclose(losses[0], np.log(8), rtol=0.05)  # untrained: nearly uniform
    assert losses[-1] < 0.1
    assert int(state.step) == 60
    sampling = Sampling(max_new_tokens=3, eos_id=EOS, pad_id=0, greedy=True)
    written = generate_from_state(
        state.params, PROMPTS, jax.random.key(0), graphdef=GRAPHDEF, sampling=sampling, group_size=1
    )
    np.testing.assert_array_equal(written.tokens[:, 0], TOKENS)
    # The state is donated at every step; what the caller passed in is still there.
    for kept, now in zip(jax.tree.leaves(before), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(kept, now)


def test_packed_rows_have_the_loss_and_the_gradients_of_the_same_sequences_apart():
    # Three sequences in two rows: [2 5 6 1 | 3 4 7 1] and [6 5 2], the prompts 2, 3 4 and 6.
    prompts = Prompts(
        tokens=jnp.asarray([[0, 2], [3, 4], [0, 6]], jnp.int32),
        mask=jnp.asarray([[False, True], [True, True], [False, True]]),
        ids=jnp.arange(3),
    )
    tokens = jnp.asarray([[5, 6, EOS], [7, EOS, 0], [5, 2, 0]], jnp.int32)
    mask = jnp.asarray([[True] * 3, [True, True, False], [True, True, False]])
    rows = PackedRows(
        tokens=jnp.asarray([[2, 5, 6, EOS, 3, 4, 7, EOS], [6, 5, 2, 0, 0, 0, 0, 0]], jnp.int32),
        segments=jnp.asarray([[1] * 4 + [2] * 4, [1] * 3 + [0] * 5], jnp.int32),
        mask=jnp.asarray([[0, 1, 1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0, 0]], bool),
    )
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, PARAMS)

    def of(loss, config, *data):
        graphdef = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))[0]
        return jax.jit(jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p), *data)))(params)

    expected = of(negative_log_likelihood, CONFIG, prompts, tokens, mask)
    for changes in ({}, {"logit_chunk": 3}, {"attention": "splash"}):
        config = dataclasses.replace(CONFIG, **changes)
        loss, gradients = of(packed_negative_log_likelihood, config, rows)
        np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
        for mine, theirs in zip(
            jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)
    state, loss = TRAINER.update_packed(TRAINER.init(params), rows)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    assert int(state.step) == 1
