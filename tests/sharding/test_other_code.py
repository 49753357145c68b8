"""Programs of other people's making are planned and run: linen, NNX, Equinox, plain functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import sharding

KEY = jax.random.key(0)
SGD = optax.sgd(0.5)


def _runs_as_planned(step, args, **pinned):
    """Plans for eight devices, runs on them, and compares with the step on one."""
    constraints = sharding.Constraints(pinned=pinned)
    plan = sharding.plan(step, args, cluster="v5e:2x4", constraints=constraints)
    found, expected = plan.apply(step)(*args), jax.jit(step)(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    return plan, found


def test_a_plain_function_without_annotations():
    def predict(weights, x):
        for w, b in weights:
            x = jnp.tanh(x @ w + b[None])
        return x

    def step(weights, x, y):
        loss, grads = jax.value_and_grad(lambda w: ((predict(w, x) - y) ** 2).mean())(weights)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads), loss

    sizes = [8, 32, 8, 32, 4]
    weights = [
        (jax.random.normal(k, (a, b)) / a**0.5, jnp.zeros(b))
        for k, a, b in zip(jax.random.split(KEY, 4), sizes[:-1], sizes[1:], strict=True)
    ]
    args = (weights, jax.random.normal(KEY, (16, 8)), jnp.zeros((16, 4)))
    plan, found = _runs_as_planned(step, args, tensor=2, fsdp=4, zero=3)
    # Every second width is divided: two products of matrices share one sum.
    divided = ["tensor" in str(plan.inputs[f"0/{i}/1"]) for i in range(4)]
    assert divided == [True, False, True, False]
    assert found[0][0][0].sharding.spec == plan.inputs["0/0/0"]
    assert plan.inputs["1"] == plan.inputs["2"] == P("fsdp")


def test_a_linen_model_with_logical_axes():
    class Classifier(linen.Module):
        @linen.compact
        def __call__(self, x):
            hidden = linen.with_partitioning(linen.initializers.lecun_normal(), ("embed", "mlp"))
            x = linen.relu(linen.Dense(32, kernel_init=hidden)(x))
            x = linen.Conv(8, (3,), kernel_init=linen.initializers.lecun_normal())(x)
            return linen.Dense(4)(x.mean(1))

    model = Classifier()
    x, y = jax.random.normal(KEY, (16, 6, 8)), jnp.arange(16) % 4
    variables = model.init(KEY, x)

    def step(variables, x, y):
        def loss(variables):
            logits = model.apply(variables, x)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(variables)
        return jax.tree.map(lambda w, g: w - 0.1 * g, variables, grads), value

    plan, _ = _runs_as_planned(step, (variables, x, y), tensor=2, data=4)
    # The declared name is the name of the dimension.
    assert "mlp is divided over tensor" in plan.explain()


def test_an_nnx_model_and_its_optimizer_state():
    model = nnx.Sequential(
        nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 4, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model)

    def loss(params, x, y):
        return ((nnx.merge(graph, params)(x) - y) ** 2).mean()

    step = sharding.train_step(loss, optax.adam(0.1))
    args = (params, step.optimizer.init(params), jax.random.normal(KEY, (16, 8)), jnp.ones((16, 4)))
    plan, found = _runs_as_planned(step, args, fsdp=4, tensor=2, zero=3)
    kernel = "layers/0/kernel"
    assert plan.inputs[f"0/{kernel}"] == P("fsdp", "tensor")
    moments = [spec for path, spec in plan.inputs.items() if path.endswith(f"mu/{kernel}")]
    assert moments == [P("fsdp", "tensor")]
    assert jax.tree.structure(found[0]) == jax.tree.structure(params)


def test_an_equinox_model():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed: pip install equinox")
    model = eqx.nn.MLP(8, 4, 32, depth=2, key=KEY)
    params, static = eqx.partition(model, eqx.is_array)

    def loss(params, x, y):
        return ((jax.vmap(eqx.combine(params, static))(x) - y) ** 2).mean()

    step = sharding.train_step(loss, SGD)
    args = (params, SGD.init(params), jax.random.normal(KEY, (16, 8)), jnp.ones((16, 4)))
    plan, found = _runs_as_planned(step, args, data=2, fsdp=2, tensor=2, zero=3)
    assert plan.inputs["0/layers/0/weight"] == P("tensor", "fsdp")
    assert isinstance(found[0], eqx.nn.MLP)
