"""Traces: roles, named dimensions and work, against what is known of small programs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from sharding.costs.strategies import Strategy
from sharding.execution.step_trace import trace_step
from sharding.machines.topology import Cluster
from sharding.search.solver import evaluate
from sharding.tracing.trace import trace

KEY = jax.random.key(0)


def _dims(traced):
    """Path to the names of the factors of every axis."""
    return {
        leaf.path: [[traced.names[a] for a in factors] for factors in leaf.factors]
        for leaf in traced.inputs
    }


def _roles(traced):
    return {leaf.path: leaf.role for leaf in traced.inputs}


def test_a_decoder_is_divided_as_megatron_divides_it(models):
    params, tokens = models.decoder_params(KEY), models.tokens(KEY)
    traced = trace(models.decoder_loss, (params, tokens))
    dims = _dims(traced)
    kinds = {traced.names[a]: kind for a, kind in traced.splits.kinds.items()}
    assert kinds.pop("batch") == "data"
    assert kinds.pop("sequence") == "context"
    assert set(kinds.values()) == {"tensor"}
    # Heads, the hidden width and the vocabulary of the head; never the width between layers.
    (hidden,), (heads, group, head) = dims["0/layers/down"][1], dims["0/layers/out"][1]
    (vocab,) = dims["0/head"][1]
    assert set(kinds) == {hidden, heads, vocab}
    assert dims["0/layers/key"][2][0] == dims["0/layers/query"][2][0] == heads
    assert dims["0/layers/query"][2][1] == group
    assert dims["0/layers/value"][2][1] == head
    width = dims["0/embed"][1]
    assert width == dims["0/head"][0] == dims["0/layers/gate"][1] == dims["0/layers/norm"][1]
    assert dims["0/layers/gate"] == dims["0/layers/up"] == [["layers"], width, [hidden]]
    assert dims["1"][0] == ["batch"]


def test_work_and_parameters_of_a_decoder_are_those_of_its_shapes(models):
    params, tokens = models.decoder_params(KEY), models.tokens(KEY)
    program = trace(models.decoder_loss, (params, tokens)).program
    assert program.training
    assert program.pipelined
    assert not program.unknown
    assert program.parameter_count == sum(x.size for x in jax.tree.leaves(params))
    # 2 FLOPs a weight and token, and two products of [16, 16] scores over 4 heads of width 4.
    weights = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)
    rows = 16 * 16
    scores = 2 * 2 * 16 * 4 * 16 * 16 * 4 * 4
    assert program.forward_flops == 2 * rows * (weights + params["head"].size) + scores


def test_a_train_step_is_its_forward_pass_and_its_state(models):
    optimizer = optax.adam(1e-3)

    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(models.decoder_loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return (
            optax.apply_updates(params, updates),
            state,
            {"loss": loss, "norm": grads["head"].sum()},
        )

    params, tokens = models.decoder_params(KEY), models.tokens(KEY)
    traced = trace(step, (params, optimizer.init(params), tokens))
    alone = trace(models.decoder_loss, (params, tokens))
    assert traced.program.training
    assert traced.program.forward_flops == alone.program.forward_flops
    assert traced.program.optimizer_bytes == 8.0  # two moments in float32
    roles = _roles(traced)
    assert roles["0/layers/up"] == "param"
    assert roles["2"] == "data"
    assert roles["1/0/mu/layers/up"] == roles["1/0/nu/head"] == "optimizer"
    assert roles["1/0/count"] == "state"
    dims = _dims(traced)
    assert dims["1/0/mu/layers/up"] == dims["1/0/nu/layers/up"] == dims["0/layers/up"]


def test_experts_are_found_by_what_weights_and_rows_share(models):
    params, tokens = models.experts_params(KEY), models.tokens(KEY)
    traced = trace(models.experts_loss, (params, tokens))
    dims = _dims(traced)
    (expert,) = dims["0/layers/up"][1]
    assert expert == dims["0/layers/router"][2][0] == dims["0/layers/down"][1][0]
    kinds = {traced.names[a]: kind for a, kind in traced.splits.kinds.items()}
    assert kinds[expert] == "expert"
    assert kinds["sequence"] == "context"


def test_a_cache_that_comes_back_is_state_and_has_a_batch():
    def step(params, cache, token):
        cache = {"seen": jnp.concatenate([cache["seen"][:, 1:], token[:, None]], 1)}
        return jnp.tanh(cache["seen"] @ params["a"]) @ params["b"], cache

    args = ({"a": jnp.ones((8, 32)), "b": jnp.ones((32, 4))}, {"seen": jnp.ones((16, 8))},
            jnp.ones(16))  # fmt: skip
    traced = trace(step, args)
    assert not traced.program.training
    roles = _roles(traced)
    assert roles == {"0/a": "param", "0/b": "param", "1/seen": "state", "2": "data"}
    assert _dims(traced)["1/seen"][0] == ["batch"]


def test_key_heads_that_a_cache_keeps_apart_are_no_experts():
    # One kernel makes queries, key and value of every key head; each layer has a cache of its own.
    batch, width, kv, group, head, length = 8, 16, 4, 2, 6, 32

    def step(params, cache, x, position):
        for w, held in zip(params, cache, strict=True):
            made = jnp.einsum("bd,dkgh->bkgh", x, w["joined"])
            key = jax.lax.dynamic_update_slice(held["key"], made[:, :, -2:-1], (0, 0, position, 0))
            scores = jnp.einsum("bkgh,bksh->bkgs", made[:, :, :group], key)
            read = jnp.einsum("bkgs,bksh->bkgh", jax.nn.softmax(scores, -1), held["value"])
            x = x + jnp.einsum("bkgh,kghd->bd", read, w["out"])
        return x, cache

    layer = {"joined": jnp.ones((width, kv, group + 2, head)),
             "out": jnp.ones((kv, group, head, width))}  # fmt: skip
    empty = {
        "key": jnp.ones((batch, kv, length, head)),
        "value": jnp.ones((batch, kv, length, head)),
    }
    args = ([layer] * 2, [empty] * 2, jnp.ones((batch, width)), jnp.int32(3))
    traced = trace(step, args, state=(0, 1), data=(2,))
    (heads,), (more,) = _dims(traced)["0/0/joined"][1], _dims(traced)["0/1/joined"][1]
    kinds = {traced.names[atom]: kind for atom, kind in traced.splits.kinds.items()}
    assert kinds == {"batch": "data", heads: "tensor", more: "tensor"}
    assert _roles(traced)["1/0/key"] == "state"
    assert _dims(traced)["1/1/value"][1] == [more]  # the cache lies with its heads


def test_what_is_said_goes_before_what_is_inferred():
    def loss(x, w):
        return (x @ w).sum()

    traced = trace(loss, (jnp.ones((16, 4)), jnp.ones((4, 8))), state=(1,))
    assert _roles(traced) == {"0": "data", "1": "param"}


def test_an_operation_without_a_rule_is_listed():
    def loss(w, x):
        return jnp.abs(jnp.fft.fft(x @ w)).sum()

    traced = trace(loss, (jnp.ones((4, 8)), jnp.ones((16, 4))))
    assert traced.program.unknown == ("fft",)


@pytest.mark.parametrize(
    ("run", "shape", "expected"),
    [
        (lambda x: x.reshape(6, 4, 5), (24, 5), [(0,), (0,), (1,)]),
        (lambda x: x.reshape(24, 5), (6, 4, 5), [(0, 1), (2,)]),
        (lambda x: x.T, (6, 5), [(1,), (0,)]),
        (lambda x: x.sum(0), (6, 5), [(1,)]),
        (lambda x: x[:, :3], (6, 5), [(0,), ()]),
        (lambda x: jnp.flip(x, 0), (6, 5), [(0,), (1,)]),
        (lambda x: jnp.cumsum(x, 1), (6, 5), [(0,), (1,)]),
        (lambda x: jnp.sort(x, 1), (6, 5), [(0,), (1,)]),
        (lambda x: jax.lax.top_k(x, 2)[0], (6, 5), [(0,), ()]),
        (lambda x: jnp.concatenate([x, x], 1), (6, 5), [(0,), ()]),
        (lambda x: jnp.pad(x, ((0, 0), (1, 1))), (6, 5), [(0,), ()]),
        (lambda x: x[None] * jnp.ones((3, 6, 5)), (6, 5), [(), (0,), (1,)]),
        (lambda x: jax.vmap(lambda r, i: r[i])(x, jnp.zeros((6, 2), int)), (6, 5), [(0,), ()]),
        (lambda x: jnp.zeros((9, 5)).at[jnp.arange(6)].add(x), (6, 5), [(), (1,)]),
        (lambda x: jax.lax.scan(lambda c, r: (c + r, c), x[0], x)[1], (6, 5), [(0,), (1,)]),
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, c: c * 2, x), (6, 5), [(0,), (1,)]),
        (lambda x: jax.lax.cond(True, jnp.sin, jnp.cos, x), (6, 5), [(0,), (1,)]),
        (lambda x: jax.nn.relu(jax.checkpoint(jnp.exp)(x)), (6, 5), [(0,), (1,)]),
    ],
)
def test_rules_keep_what_an_operation_keeps(run, shape, expected):
    """`expected`: for every axis of the result, the axes of the operand that it consists of."""
    traced = trace(run, (jnp.ones(shape),), state=(), data=(0,))
    (operand,), (result,) = traced.inputs, traced.outputs
    origin = {atom: i for i, factors in enumerate(operand.factors) for atom in factors}
    found = [tuple(dict.fromkeys(origin[a] for a in f if a in origin)) for f in result.factors]
    assert found == expected
    assert math.prod(traced.sizes[a] for f in result.factors for a in f) == math.prod(result.shape)


def test_parameters_that_are_cast_before_use_are_counted_as_they_are_stored(models):
    def loss(params, tokens):
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return models.decoder_loss(half, tokens)

    params = models.decoder_params(KEY)
    program = trace(loss, (params, models.tokens(KEY))).program
    assert program.parameter_count == sum(x.size for x in jax.tree.leaves(params))
    stored = {t.dtype for t in program.tensors.values() if t.role == "param"}
    assert stored == {"float32"}


def test_axes_named_by_numpys_integers():
    # JAX leaves such axes in the parameters of the operation.
    traced = trace(
        lambda x: jax.lax.reduce_max_p.bind(x, axes=(np.int64(1),), out_sharding=None),
        (jnp.ones((4, 8)),),
    )
    assert len(traced.inputs[0].factors) == 2


def test_an_opaque_step_keeps_for_its_backward_pass_what_its_loss_keeps(models):
    optimizer = optax.adam(1e-2)

    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(models.decoder_loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = models.decoder_params(jax.random.key(0))
    tokens = models.tokens(jax.random.key(0))
    opaque = trace(step, (params, optimizer.init(params), tokens)).program
    open_ = trace_step(
        sharding.train_step(models.decoder_loss, optimizer),
        (params, optimizer.init(params), tokens),
    ).program
    one = {"remat": "none", "microbatches": 1, "zero": 3}
    for degrees in ({"fsdp": 8}, {"tensor": 2, "data": 4}):
        strategy = [Strategy(**degrees, **one, sequence_parallel=False)]
        kept = [
            evaluate(p, strategy, Cluster.from_name("v5e:2x4"))[0].memory_terms["activations"]
            for p in (opaque, open_)
        ]
        # Traced after differentiation, an opaque loss keeps a little of what stops no gradient.
        assert kept[0] == pytest.approx(kept[1], rel=0.1)


def test_optimiser_state_comes_back_as_optimiser_state(models):
    """As what lies with the parameters it came back whole from where it was divided (ZeRO-1)."""
    params, tokens = models.decoder_params(KEY), models.tokens(KEY)
    optimizer = optax.adam(1e-3)

    def step(params, moments, tokens):
        gradients = jax.grad(models.decoder_loss)(params, tokens)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), moments, models.decoder_loss(params, tokens)

    traced = trace(step, (params, optimizer.init(params), tokens))
    before = {leaf.path: leaf.role for leaf in traced.inputs if leaf.path.startswith("1/")}
    after = {leaf.path: leaf.role for leaf in traced.outputs if leaf.path.startswith("1/")}
    assert "optimizer" in before.values()
    assert after == before
