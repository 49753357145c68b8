"""Kernels as the planner reads them: memory, work, dimensions and collectives, by closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sharding
from sharding.compiled.compile_check import abstract_mesh
from sharding.compiled.computation import computation
from sharding.compiled.footprint import footprint
from sharding.compiled.liveness import fusion_of, peak
from sharding.compiled.partition import partition
from sharding.execution.execute import Execution
from sharding.machines.topology import Cluster
from sharding.programs.fused import planning
from sharding.tracing.trace import trace

H100 = Cluster.from_name("h100:1x8")
HEADS, WIDTH = 4, 8


def _shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def plain_attention(query, key, value):
    """[B, S, H, d] -> [B, S, H, d], nothing masked."""
    scores = jnp.einsum("bshd,bthd->bhst", query, key)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores), value)


def fused_attention(*operands, computed=1.0):
    return _fused(computed, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(computed, query, key, value):
    return sharding.fused(plain_attention, computed=computed)(query, key, value)


def _forward(computed, *operands):
    return _fused(computed, *operands), operands


def _backward(computed, operands, given):
    def gradients(given, *operands):
        return jax.vjp(plain_attention, *operands)[1](given)

    return sharding.fused(gradients, computed=computed)(given, *operands)


_fused.defvjp(_forward, _backward)


def loss_of(attend):
    def loss(params, x):
        def layer(x, w):
            parts = x.reshape(*x.shape[:2], -1) @ w["in"]
            query, key, value = jnp.split(parts.reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
            return x + (attend(query, key, value).reshape(*x.shape[:2], -1) @ w["out"]), None

        return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)

    return loss


def arguments(size, *, batch=4, layers=3):
    width = HEADS * WIDTH
    params = {"in": _shape(layers, width, 3 * width), "out": _shape(layers, width, width)}
    return params, _shape(batch, size, width)


def temporary_bytes(step, args, cluster):
    execution = Execution(mesh=abstract_mesh({"single": 1}), inputs={}, outputs={})
    return footprint(step, args, execution, cluster).peak.temporary


@pytest.mark.parametrize("name", ["h100:1x8", "v5p:2x2x2"])
def test_memory_grows_with_the_length_and_not_with_its_square(name):
    cluster = Cluster.from_name(name)

    def held(attend, size):
        return temporary_bytes(jax.grad(loss_of(attend)), arguments(size), cluster)

    fused = [held(fused_attention, size) for size in (512, 1024, 2048)]
    assert fused[2] - fused[1] == pytest.approx(2 * (fused[1] - fused[0]), rel=1e-3)
    # Scores of all layers are kept for the backward pass; those of one are at the least alive.
    scores = 4 * HEADS * 2048**2 * 4
    assert held(plain_attention, 2048) > fused[2] + scores


def test_work_and_dimensions_are_those_of_the_body():
    args = arguments(64)
    plain, fused = (trace(loss_of(a), args) for a in (plain_attention, fused_attention))
    assert fused.program.forward_flops == plain.program.forward_flops
    assert set(fused.program.splits.values()) == {"data", "context", "tensor"}
    assert [leaf.factors for leaf in fused.inputs] == [leaf.factors for leaf in plain.inputs]
    assert fused.splits == plain.splits
    assert not fused.program.unknown

    half = trace(loss_of(functools.partial(fused_attention, computed=0.5)), args)
    scores_and_sums = 3 * 2 * 2 * 4 * HEADS * 64**2 * WIDTH  # layers, products, multiply-add
    saved = plain.program.forward_flops - half.program.forward_flops
    assert saved == pytest.approx(scores_and_sums / 2)


def test_traffic_is_that_of_arguments_and_results():
    program = trace(loss_of(fused_attention), arguments(64)).program
    (kernel,) = (op for block in program.blocks for op in block.ops if op.kind == "attention")
    assert all(program.size(n) == 4 * 64 * HEADS * WIDTH for n in kernel.inputs + kernel.outputs)
    # No array of the program has an entry for two positions.
    assert max(program.size(n) for n in program.tensors) < 4 * HEADS * 64**2


def test_a_plan_of_long_sequences_takes_no_scores():
    args = arguments(4096, batch=8)
    plans = [
        sharding.plan(loss_of(attend), args, cluster="h100:1x8", state=(0,))
        for attend in (plain_attention, fused_attention)
    ]
    scores = HEADS * 4096**2 * 4  # of one sequence
    assert plans[0].memory_bytes > scores > plans[1].memory_bytes
    assert plans[1].step_time_s < plans[0].step_time_s


@pytest.mark.parametrize(
    ("specs", "moved"),
    [
        # Rows and heads stay where they are.
        ((P("data", None, "tensor"),) * 3, []),
        # Keys and values of all positions meet the queries of some: they are gathered.
        ((P("data", "tensor"),) * 3, ["all-gather"] * 2),
        # A sum over a head's width would have to be reduced before the softmax: not in a kernel.
        ((P("data", None, None, "tensor"), *(P("data"),) * 2), ["all-gather"]),
    ],
)
def test_collectives_follow_from_the_body(specs, moved):
    mesh = {"data": 2, "tensor": 4}
    made = computation(sharding.fused(plain_attention), [_shape(8, 64, HEADS, WIDTH)] * 3)
    partition(made, mesh, specs, [None])
    kinds = [m.kind for i in made.instructions for m in i.moves]
    assert kinds == moved


def test_operands_of_a_kernel_are_in_memory():
    def step(x):
        return sharding.fused(lambda y: jnp.cumsum(y, axis=1) * y)(jnp.exp(x) * 2)

    made = computation(step, (_shape(1024, 1024),))
    partition(made, {"single": 1}, [P()], [P()])
    found = peak(made, {"single": 1}, fusion_of(H100), detail=True)
    assert found.temporary == 1024 * 1024 * 4  # what it reads; its result is the step's


def test_it_runs_batches_and_closes_over_arrays():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    w = jnp.arange(10.0).reshape(5, 2)

    def step(x):
        scale = x.sum()
        return sharding.fused(lambda y, w: {"out": jnp.tanh(y @ w) * scale})(x, w)["out"]

    expected = jnp.tanh(x @ w) * x.sum(axis=(1, 2))[:, None, None]
    np.testing.assert_allclose(jax.jit(jax.vmap(step))(x), expected, rtol=1e-6)
    np.testing.assert_allclose(step(x[1]), expected[1], rtol=1e-6)


def test_derivatives_have_to_be_kernels_too():
    with pytest.raises(NotImplementedError, match="fused"):
        jax.grad(lambda x: sharding.fused(jnp.tanh)(x))(1.0)
    loss, plain = loss_of(fused_attention), loss_of(plain_attention)
    keys = iter(jax.random.split(jax.random.key(0), 3))
    args = jax.tree.map(lambda s: 0.3 * jax.random.normal(next(keys), s.shape), arguments(16))
    for mine, theirs in zip(
        jax.tree.leaves(jax.grad(loss)(*args)), jax.tree.leaves(jax.grad(plain)(*args)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"computed=0.0"):
        sharding.fused(jnp.tanh, computed=0.0)


def test_a_derivative_that_costs_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match=r"backward=-1.0"):
        sharding.fused(jnp.tanh, backward=-1.0)


def test_what_no_result_needs_is_no_part_of_a_kernel():
    def second_of_two(x, y):
        return (x @ y, x + 1)[1]

    made = jax.make_jaxpr(sharding.fused(second_of_two))(jnp.ones((2, 2)), jnp.ones((2, 2)))
    (eqn,) = made.eqns
    assert [e.primitive.name for e in eqn.params["jaxpr"].eqns] == ["add"]
    assert len(eqn.invars) == 2


def test_what_is_traced_for_the_planner_is_never_run():
    @jax.jit
    def step(x):
        return x + (1 if sharding.planned_for() == "tpu" else 2)

    with planning("tpu"):
        assert sharding.planned_for() == "tpu"
        planned = jax.eval_shape(step, 0.0)
        assert jax.make_jaxpr(step)(0.0).jaxpr.eqns
    assert planned.shape == ()
    assert sharding.planned_for() is None
    assert step(0.0) == 2.0


@pytest.mark.parametrize(("name", "kind"), [("v5p:2x2x1", "tpu"), ("h100:1x8", "gpu")])
def test_a_step_learns_what_it_is_planned_for(name, kind):
    seen = set()

    def step(params, x):
        seen.add(sharding.planned_for())
        return jnp.mean((x @ params) ** 2)

    sharding.plan(step, (_shape(16, 4), _shape(32, 16)), cluster=name)
    assert seen == {kind}
