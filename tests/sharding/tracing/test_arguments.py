"""Which argument is the batch, what was said of it, and what is no argument."""

import jax
import jax.numpy as jnp
import optax
import pytest

import sharding
from sharding.execution.step_trace import trace_step
from sharding.tracing.arguments import abstract
from sharding.tracing.trace import trace

WEIGHTS = jax.ShapeDtypeStruct((12, 5), jnp.float32)
BATCH = jax.ShapeDtypeStruct((8, 12), jnp.float32)
LABELS = jax.ShapeDtypeStruct((8,), jnp.int32)
KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)
CLASSES = jax.ShapeDtypeStruct((5,), jnp.float32)


def _batch(traced):
    return [traced.sizes[atom] for atom in traced.splits.batch]


def _keyed(params, key, x):
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 0.5, x.shape)
    return jnp.square(jnp.where(kept, x, 0.0) @ params).mean()


def _weighted(params, weights, x, labels):
    losses = -jax.nn.log_softmax(x @ params)
    picked = jnp.take_along_axis(losses * weights[None], labels[:, None], 1)
    return picked.mean()


def _positioned(params, positions, x):
    h = jax.nn.one_hot(x, 12) @ params + jnp.sin(positions)[None, :, None]
    scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", h, h), -1)
    return jnp.einsum("bts,bsd->btd", scores, h).mean()


@pytest.mark.parametrize(
    ("loss", "data", "batch"),
    [
        (_keyed, (KEY, BATCH), 8),
        (_weighted, (CLASSES, BATCH, LABELS), 8),
        (_positioned, (jax.ShapeDtypeStruct((6,), jnp.float32),
                       jax.ShapeDtypeStruct((8, 6), jnp.int32)), 8),
    ],
    ids=["key", "class weights", "positions"],
)  # fmt: skip
def test_the_batch_is_found_behind_what_leads_with_something_else(loss, data, batch):
    assert _batch(trace(loss, (WEIGHTS, *data))) == [batch]


def test_data_says_whose_leading_axis_the_batch_is():
    def gram(params, x, y):  # rows of x and of y do the same work
        return (x @ params @ params.T @ y.T).mean()

    args = (WEIGHTS, BATCH, jax.ShapeDtypeStruct((6, 12), jnp.float32))
    assert _batch(trace(gram, args, data=(1,))) == [8]
    assert _batch(trace(gram, args, data=(2,))) == [6]
    # The positions of a train step are its own: the optimiser's state stands between.
    step = sharding.train_step(gram, optax.sgd(0.1))
    state = jax.eval_shape(step.optimizer.init, WEIGHTS)
    for position, batch in ((2, 8), (3, 6)):
        traced = trace_step(step, (WEIGHTS, state, *args[1:]), data=(position,))
        assert _batch(traced) == [batch]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"data": (3,)}, r"data names positions of arguments, 0 to 2 for these 3; got \[3\]"),
        ({"state": (-1,)}, r"state names positions of arguments"),
        ({"state": (0, 1), "data": (1, 2)}, r"arguments \[1\] are said to be state and data"),
        ({"state": (0, 2)}, "the state of a train step are arguments 0 and 1"),
        ({"data": (1,)}, "the data of a train step are its arguments from the third on"),
    ],
)
def test_positions_that_make_no_sense_are_refused(said, message):
    step = sharding.train_step(lambda p, x: (x @ p).mean(), optax.sgd(0.1))
    args = (WEIGHTS, jax.eval_shape(step.optimizer.init, WEIGHTS), BATCH)
    with pytest.raises(ValueError, match=message):
        trace_step(step, args, **said)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (BATCH, r"args is the tuple of the step's arguments.*got one ShapeDtypeStruct"),
        ({"w": BATCH}, "got one dict"),
        (({"w": WEIGHTS, "f": jnp.tanh}, BATCH), "argument 0/f is a .*only arrays can be planned"),
    ],
)
def test_what_is_no_argument_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        abstract(args)
