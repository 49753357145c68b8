"""Steps whose data is not all batch, and losses with more than products in them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from sharding.execution import stages
from sharding.tracing.trace import trace

KEY = jax.random.key(0)
SGD = optax.sgd(1.0)


def _planned(step, args, **pinned):
    constraints = sharding.Constraints(pinned=pinned)
    return sharding.plan(step, args, cluster="v5e:2x4", constraints=constraints)


def _same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@jax.custom_vjp
def _damped(x):
    return x


_damped.defvjp(lambda x: (x, None), lambda _, g: (0.5 * g,))


def _loss(params, classes, x, labels, options):
    """Class weights, a scalar and a key are no batch, and come before and after it."""
    noise = jax.random.normal(jax.random.wrap_key_data(options["key"]), (12,))
    logits = _damped(jnp.tanh((x + options["rate"] * noise[None]) @ params))
    losses = -jax.nn.log_softmax(logits) * classes[None]
    return jnp.take_along_axis(losses, labels[:, None], 1).mean()


def _args(batch=16):
    options = {"key": jax.random.key_data(KEY), "rate": 0.5}
    params = jax.random.normal(KEY, (12, 8))
    data = (jnp.arange(8.0), jax.random.normal(KEY, (batch, 12)), jnp.arange(batch) % 8, options)
    return params, SGD.init(params), *data


def test_micro_batches_cut_the_batch_and_nothing_else():
    step, args = sharding.train_step(_loss, SGD), _args()
    plan = _planned(step, args, data=4, tensor=2, microbatches=2)
    assert plan.accumulation_steps == 2
    expected = jax.jit(step)(*args)
    _same(plan.apply(step)(*args), expected)
    # A parameter that is a bare array, its sums divided.
    zero = _planned(step, args, fsdp=4, data=2, tensor=1, zero=1, microbatches=2)
    assert zero.updates
    _same(zero.apply(step)(*args), expected)


def test_a_prime_batch_is_planned_where_something_else_divides(models):
    step = sharding.train_step(models.decoder_loss, SGD)
    params = models.decoder_params(KEY)
    args = (params, SGD.init(params), models.tokens(KEY, batch=7))
    plan = sharding.plan(step, args, cluster="h100:1x2")
    assert set(plan.mesh) <= {"tensor", "context", "stage"}
    _same(plan.apply(step)(*args), jax.jit(step)(*args))


def test_one_device_is_a_cluster(models):
    step = sharding.train_step(models.decoder_loss, SGD)
    params = models.decoder_params(KEY)
    plan = sharding.plan(step, (params, SGD.init(params), models.tokens(KEY)), cluster="v5e:1x1")
    assert plan.mesh == {}
    assert plan.bind().mesh.size == 1
    assert "one device" in plan.explain()


def _deep(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]


def _in_branch(params, x):
    return jax.lax.cond(x.sum() > 0, _deep, lambda p, x: x, params, x).mean()


def _in_loop(params, x):
    return jax.lax.scan(lambda x, _: (_deep(params, x), None), x, None, length=2)[0].mean()


@jax.custom_vjp
def _straight(params, x):
    return _deep(params, x)


_straight.defvjp(
    lambda params, x: (_deep(params, x), (params, x)),
    lambda held, g: (jnp.zeros_like(held[0]), g),
)


def _in_custom_vjp(params, x):
    return _straight(params, x).mean()


@pytest.mark.parametrize(
    ("loss", "within"),
    [(_in_branch, "cond"), (_in_loop, "scan"), (_in_custom_vjp, "custom_vjp_call")],
)
def test_layers_within_something_are_left_there_and_the_step_is_planned(loss, within):
    params, x = jax.random.normal(KEY, (4, 8, 8)), jax.random.normal(KEY, (16, 8))
    assert f"within a {within}" in stages.obstacle(trace(loss, (params, x)))
    step = sharding.train_step(loss, SGD)
    args = (params, SGD.init(params), x)
    plan = _planned(step, args, data=8)
    assert f"pipeline stages were out of reach: its scan over layers is within a {within}" in (
        plan.explain()
    )
    assert plan.pipeline == ()
    # A loop is seen through for rematerialisation, a branch is not.
    assert ("rematerialisation was out of reach" in plan.explain()) == (within != "scan")
    _same(plan.apply(step)(*args), jax.jit(step)(*args))


def test_a_policy_that_would_change_nothing_is_refused():
    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x.mean()

    step = sharding.train_step(loss, SGD)
    params = jax.random.normal(KEY, (3, 8, 8))
    args = (params, SGD.init(params), jax.random.normal(KEY, (16, 8)))
    for pin in ({"remat": "full"}, {"offload": "activations"}):
        with pytest.raises(ValueError, match=r"write its layers with sharding\.layers"):
            _planned(step, args, **pin)


def test_donated_memory_is_the_caller_s_only_where_it_lies_as_planned():
    step, args = sharding.train_step(_loss, SGD), _args()
    plan = _planned(step, args, data=8, zero=0)
    assert plan.donate == (0,)
    run = plan.apply(step)
    params, state, *_ = run(*args)
    assert not args[0].is_deleted()
    # What the step gave lies as planned, and its memory goes to the next result.
    again, *_ = run(params, state, *args[2:])
    assert params.is_deleted()
    kept, *_ = plan.apply(step, donate=())(again, state, *args[2:])
    assert not again.is_deleted()
    assert kept.sharding == again.sharding


def test_steps_of_one_shape_are_traced_once(monkeypatch):
    step, args = sharding.train_step(_loss, SGD), _args()
    run = _planned(step, args, data=8).apply(step)
    params, state, _ = run(*args)

    traced = []

    def noted(*arguments, **options):
        traced.append(arguments)
        return eval_shape(*arguments, **options)

    eval_shape = jax.eval_shape
    monkeypatch.setattr(jax, "eval_shape", noted)
    run(params, state, *args[2:])
    assert traced == []


def test_names_and_options_of_the_compiler_stay_with_their_operations():
    from jax.experimental.xla_metadata import set_xla_metadata

    def loss(params, x):
        with jax.named_scope("rotation"), set_xla_metadata(told="so"):
            return jnp.tanh(x @ params).mean()

    step = sharding.train_step(loss, SGD)
    params = jnp.ones((8, 8))
    args = (params, SGD.init(params), jnp.ones((16, 8)))
    text = _planned(step, args, data=8).apply(step).lower(*args).as_text(debug_info=True)
    assert "rotation" in text
    assert 'told = "so"' in text
