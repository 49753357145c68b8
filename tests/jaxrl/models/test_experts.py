"""Experts divided among eight devices against a loop over tokens, and what capacity drops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sharding
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.models.expert_exchange import Exchange, exchanged_experts
from jaxrl.models.layout import Layout

EXPERTS, CHOSEN, WIDTH, INNER = 8, 3, 6, 4
MESHES = {
    "experts only": {"expert": 8},
    "experts, batch and inner width": {"data": 2, "expert": 2, "tensor": 2},
    "batch and sequence, experts whole": {"fsdp": 4, "context": 2},
}


def operands(rows=8, size=4, *, router_scale=1.0):
    shapes = {
        "x": (rows, size, WIDTH), "router": (WIDTH, EXPERTS), "gate": (EXPERTS, WIDTH, INNER),
        "up": (EXPERTS, WIDTH, INNER), "down": (EXPERTS, INNER, WIDTH),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(0), len(shapes))
    made = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}
    made["router"] *= router_scale
    return made


def token_by_token(x, router, gate, up, down, *, normalise=True):
    """Every expert on every token, weighted by what the router says of it or by nothing."""
    probabilities = jax.nn.softmax(x @ router, axis=-1)
    kth = jnp.sort(probabilities, axis=-1)[..., -CHOSEN, None]
    weights = jnp.where(probabilities >= kth, probabilities, 0.0)
    if normalise:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    hidden = jax.nn.silu(jnp.einsum("nsd,edf->nsef", x, gate))
    hidden *= jnp.einsum("nsd,edf->nsef", x, up)
    return jnp.einsum("nsef,efd,nse->nsd", hidden, down, weights)


def on(mesh, tree):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def mesh_of(sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def exchanged(given, *, normalise=True, capacity_factor=None):
    return exchanged_experts(
        **given, layout=Layout.current(), experts_per_token=CHOSEN, normalise=normalise,
        activation=jax.nn.silu, capacity_factor=capacity_factor,
    )  # fmt: skip


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("normalise", [True, False])
def test_values_and_gradients_are_those_of_the_loop(name, normalise):
    given = operands()
    direction = jax.random.normal(jax.random.key(7), given["x"].shape)

    def loss(given, run):
        return jnp.sum(run(given) * direction)

    def reference(given):
        return token_by_token(**given, normalise=normalise)

    expected = jax.jit(jax.value_and_grad(lambda g: loss(g, reference)))(given)
    mesh = mesh_of(MESHES[name])
    with jax.set_mesh(mesh):
        run = jax.jit(
            jax.value_and_grad(lambda g: loss(g, lambda g: exchanged(g, normalise=normalise)))
        )
        found = run(on(mesh, given))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for which, wanted in expected[1].items():
        np.testing.assert_allclose(found[1][which], wanted, atol=2e-5, rtol=1e-5, err_msg=which)


def test_the_gradient_keeps_no_record_of_which_row_was_written_last():
    """Which JAX notes in an integer for each number, where places may repeat."""
    with jax.set_mesh(mesh_of({"expert": 8})):
        traced = jax.make_jaxpr(jax.grad(lambda given: jnp.sum(exchanged(given))))(operands())
    shapes = {
        (var.aval.dtype.name, var.aval.shape)
        for inner in [traced.jaxpr, *_inner(traced.jaxpr)]
        for eqn in inner.eqns
        for var in eqn.outvars
    }
    assert any(dtype == "float32" and shape[-1:] == (WIDTH,) for dtype, shape in shapes)
    assert not any("int" in dtype and shape[-1:] == (WIDTH,) for dtype, shape in shapes)


def _inner(jaxpr):
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            yield inner
            yield from _inner(inner)


def test_nothing_is_dropped_when_all_tokens_want_the_same_experts():
    given = operands()
    given["x"] = jnp.broadcast_to(given["x"][:1, :1], given["x"].shape)
    mesh = mesh_of({"expert": 8})
    with jax.set_mesh(mesh):
        found = jax.jit(exchanged)(on(mesh, given))
    np.testing.assert_allclose(found, token_by_token(**given), atol=1e-5)


def test_rows_beyond_the_capacity_are_dropped_from_the_end():
    """All tokens are alike: of a device's 4, each expert of another device takes the first one."""
    given = operands()
    given["x"] = jnp.broadcast_to(given["x"][:1, :1], given["x"].shape)
    mesh = mesh_of({"expert": 8})
    with jax.set_mesh(mesh):
        # Balanced are 4 · 3 / 8 rows; two thirds of that is 1 row for each of the devices.
        found = jax.jit(lambda g: exchanged(g, capacity_factor=2 / 3))(on(mesh, given))
    expected = np.array(token_by_token(**given))
    expected[:, 1:] = 0.0
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("ways", "factor", "rows"),
    [(8, None, 100), (2, None, 300), (2, 1.0, 150), (2, 1.25, 188), (2, 9.0, 300), (1, None, 300)],
)
def test_capacity(ways, factor, rows):
    exchange = Exchange(
        experts=EXPERTS, experts_per_token=CHOSEN, normalise=True, activation=jax.nn.silu,
        ways=ways, capacity_factor=factor, summed=(),
    )  # fmt: skip
    assert exchange.capacity(100) == rows


def test_the_expert_axis_has_to_divide_the_experts():
    given = operands()
    given |= {name: given[name][:6] for name in ("gate", "up", "down")}
    given["router"] = given["router"][:, :6]
    with jax.set_mesh(mesh_of({"expert": 8})), pytest.raises(ValueError, match="must divide"):
        exchanged(given)


CONFIG = DecoderConfig(
    vocab_size=11, layers=2, embed=16, heads=4, kv_heads=2, head_dim=8, mlp=12, max_len=32,
    experts=8, experts_per_token=2,
)  # fmt: skip


def sequence_loss(graphdef, params, tokens):
    logits = nnx.merge(graphdef, params)(tokens)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])


def test_a_plan_with_an_expert_axis_sends_rows_to_experts():
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: 3 * x, params)
    tokens = jax.random.randint(jax.random.key(1), (8, 6), 0, 11)

    def gradient(params, tokens):
        return jax.grad(lambda p: sequence_loss(graphdef, p, tokens))(params)

    plan = sharding.plan(
        gradient, (params, tokens), cluster=jax.devices(), data=(1,),
        constraints=sharding.Constraints(pinned={"fsdp": 2, "expert": 4}),
    )  # fmt: skip
    planned = plan.apply(gradient)
    found, expected = planned(params, tokens), jax.jit(gradient)(params, tokens)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert "all_to_all" in planned.lower(params, tokens).as_text()


def test_on_a_mesh_no_device_sees_the_tokens_of_others():
    mesh, tokens = mesh_of({"data": 8}), jnp.zeros((8, 16), jnp.int32)

    def compiled(config):
        graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
        rows = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
        with jax.set_mesh(mesh):
            run = jax.jit(lambda p, t: sequence_loss(graphdef, p, t))
            return run.lower(on(mesh, params), rows).compile().as_text()

    def moved(text):
        names = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        return sum(text.count(f" {name}(") for name in names)

    left_alone = dataclasses.replace(CONFIG, expert_exchange="partitioner")
    assert moved(compiled(CONFIG)) == 1  # the mean
    assert moved(compiled(left_alone)) > 1
