"""Fine-tuning: the loss by hand, what it learns, and that it leaves its start alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrl.models import Decoder, DecoderConfig
from jaxrl.policy import negative_log_likelihood
from jaxrl.rollouts import Sampling, generate_from_state
from jaxrl.supervised import Supervised
from jaxrl.types import Prompts

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
