"""A planned step computes what the step computes, on eight devices, for every kind of axis."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import sharding
from sharding.execution import stages
from sharding.tracing.trace import trace

KEY = jax.random.key(0)
ADAM = optax.adam(1e-2)


def _same(found, expected):
    """Equal to 1e-5 of the largest entry of each array, and no NaN."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(float(np.max(np.abs(b), initial=0.0)), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


def _planned(step, args, **pinned):
    constraints = sharding.Constraints(pinned=pinned)
    return sharding.plan(step, args, cluster="v5e:2x4", constraints=constraints)


@pytest.fixture(scope="module")
def decoder(models):
    """Arguments of a train step, and what one unsharded step makes of them."""
    step = sharding.train_step(models.decoder_loss, optax.sgd(1.0))
    params = models.decoder_params(KEY)
    args = (params, step.optimizer.init(params), models.tokens(KEY))
    return step, args, jax.jit(step)(*args)


@pytest.mark.parametrize(
    "pinned",
    [
        {"data": 4, "tensor": 2, "microbatches": 2},
        {"fsdp": 4, "context": 2, "zero": 3, "remat": "full"},
        {"fsdp": 8, "zero": 2, "remat": "dots"},
        {"stage": 2, "tensor": 2, "fsdp": 2, "microbatches": 4, "zero": 3},
        {"stage": 4, "data": 2, "microbatches": 8, "remat": "full"},
        {"tensor": 2, "context": 2, "data": 2, "remat": "attention"},
        {"tensor": 2, "fsdp": 4, "sequence_parallel": True, "remat": "full"},
        {"stage": 2, "tensor": 2, "data": 2, "microbatches": 4, "remat": "attention"},
        {"data": 8, "remat": "dots", "offload": "activations"},
        {"tensor": 2, "fsdp": 4, "zero": 1, "offload": "optimizer"},
    ],
    ids=lambda pinned: "-".join(f"{k}{v}" for k, v in pinned.items()),
)
def test_loss_and_gradients_are_those_of_the_unsharded_step(decoder, pinned):
    # Plain gradient descent with a rate of one: the change of a parameter is its gradient.
    step, args, expected = decoder
    plan = _planned(step, args, **pinned)
    for name, degree in pinned.items():
        if name in ("data", "fsdp", "tensor", "context", "stage"):
            assert plan.mesh[name] == degree
    found = plan.apply(step)(*args)
    change = jax.tree.map(lambda a, b: np.asarray(a - b), found[0], args[0])
    _same(change, jax.tree.map(lambda a, b: np.asarray(a - b), expected[0], args[0]))
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)
    # It really lies where the plan says.
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(found), plan.outputs.values(), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(plan.bind().mesh, spec), leaf.ndim
        ), path


def test_experts_are_divided_and_compute_the_same(models):
    step = sharding.train_step(models.experts_loss, optax.sgd(1.0))
    params = models.experts_params(KEY)
    args = (params, step.optimizer.init(params), models.tokens(KEY))
    plan = _planned(step, args, expert=4, fsdp=2, zero=3)
    assert plan.inputs["0/layers/up"][1] == "expert"
    # What lies outside experts is divided over both axes, which both divide the batch.
    assert ("fsdp", "expert") in plan.inputs["0/head"]
    found, expected = plan.apply(step)(*args), jax.jit(step)(*args)
    _same(found, expected)
    shard = found[0]["layers"]["up"].addressable_shards[0].data
    assert shard.size == params["layers"]["up"].size // 8


def test_stages_may_hold_different_numbers_of_layers(models):
    step = sharding.train_step(models.decoder_loss, optax.sgd(1.0))
    params = models.decoder_params(KEY, layers=3)
    args = (params, step.optimizer.init(params), models.tokens(KEY))
    plan = _planned(step, args, stage=2, data=4, microbatches=2)
    assert sorted(plan.pipeline) == [1, 2]
    _same(plan.apply(step)(*args), jax.jit(step)(*args))


def _traced(plan, step, args):
    return str(jax.make_jaxpr(plan.apply(step)._jit(args)[0])(*args))


def test_sequence_parallelism_divides_what_layers_hand_on(decoder):
    step, args, _ = decoder
    spec = "spec=P('data', 'tensor', None)"
    for wanted in (True, False):
        plan = _planned(step, args, data=4, tensor=2, sequence_parallel=wanted)
        assert plan.sequence_parallel == wanted
        assert (spec in _traced(plan, step, args)) == wanted
    # A sequence of 15 does not divide by two: it stays whole, and is not costed as divided.
    tokens = args[2][:, :-1]
    assert not _planned(step, (*args[:2], tokens), data=4, tensor=2).sequence_parallel


def test_context_parallelism_divides_the_sequence_within_layers(decoder):
    # The tokens are 17 and the sequence a slice of 16: walks of the loss and of its gradient
    # have to mean the same dimension by it.
    step, args, _ = decoder
    plan = _planned(step, args, data=2, context=4)
    assert plan.activations["sequence"] == ("context",)
    assert "spec=P('data', 'context', None)" in _traced(plan, step, args)


def test_selective_rematerialisation_keeps_no_scores(decoder):
    step, args, _ = decoder
    batch, length = args[2].shape[0], args[2].shape[1] - 1
    # Stacked over 4 layers, for 2 heads of keys x 2 queries each: what the forward scan leaves.
    stacked = f"f32[4,{batch},2,2,{length},{length}]"
    for remat in ("none", "attention"):
        plan = _planned(step, args, data=8, remat=remat)
        assert plan.remat == remat
        assert (stacked in _traced(plan, step, args)) == (remat == "none")
    kept = [_planned(step, args, data=8, remat=r) for r in ("full", "attention", "none")]
    sizes = [plan.prediction.memory_breakdown["temporary"] for plan in kept]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_projections_are_kept_where_the_program_names_them(models):
    def loss(params, x):
        def layer(x, w):
            query = checkpoint_name(x @ w["query"], "query")
            out = checkpoint_name(jnp.tanh(query) @ w["out"], "out")
            return x + jnp.tanh(out @ w["up"]), None

        return (jax.lax.scan(layer, x, params)[0] ** 2).mean()

    params = {name: 0.3 * jax.random.normal(KEY, (4, 16, 16)) for name in ("query", "out", "up")}
    step = sharding.train_step(loss, optax.sgd(1.0))
    args = (params, step.optimizer.init(params), jax.random.normal(KEY, (16, 16)))
    plans = {r: _planned(step, args, data=8, remat=r) for r in ("full", "projections", "none")}
    sizes = [p.prediction.memory_breakdown["temporary"] for p in plans.values()]
    assert sizes == sorted(sizes)
    for plan in (plans["projections"], _planned(step, args, data=8, remat="projections",
                                                offload="activations")):  # fmt: skip
        _same(plan.apply(step)(*args), jax.jit(step)(*args))
    # Two named products are kept, the third is computed again.
    counts = [_traced(p, step, args).count("dot_general") for p in plans.values()]
    assert counts[0] - counts[1] == 2
    assert counts[2] <= counts[1]


def test_moments_lie_in_the_memory_of_the_host(models):
    step = sharding.train_step(models.decoder_loss, ADAM)
    params = models.decoder_params(KEY)
    args = (params, ADAM.init(params), models.tokens(KEY))
    plan = _planned(step, args, fsdp=8, offload="optimizer")
    assert plan.offload == "optimizer"
    found = plan.apply(step)(*args)
    for moment in jax.tree.leaves((found[1][0].mu, found[1][0].nu)):
        assert moment.sharding.memory_kind == "pinned_host"
    assert found[0]["head"].sharding.memory_kind == "device"
    _same(found[1][0].mu, jax.jit(step)(*args)[1][0].mu)
    # The next step takes what the last one gave.
    again = plan.apply(step)(*found[:2], args[2])
    assert float(again[2]) < float(found[2])
    with pytest.raises(ValueError, match=r"pass sharding.train_step|reaches inside"):
        _planned(models.decoder_loss, (params, args[2]), offload="optimizer")


def test_an_opaque_step_runs_as_it_is(models):
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(models.decoder_loss)(params, tokens)
        updates, state = ADAM.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = models.decoder_params(KEY)
    args = (params, ADAM.init(params), models.tokens(KEY))
    plan = _planned(step, args, fsdp=4, tensor=2, zero=3)
    found = plan.apply(step)(*args)
    assert "opaque" in plan.explain()
    # Adam divides by the root of the second moment: compare the moments, which are gradients.
    _same(found[1][0].mu, jax.jit(step)(*args)[1][0].mu)
    assert found[1][0].mu["head"].sharding == found[0]["head"].sharding


def test_a_step_that_rematerialises_by_itself_keeps_doing_so(models):
    def loss(params, x):
        layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
        return (jax.lax.scan(lambda x, w: (layer(x, w), None), x, params)[0] ** 2).mean()

    def step(params, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return params - grads, value

    args = (jax.random.normal(KEY, (3, 16, 16)), jax.random.normal(KEY, (8, 16)))
    plan = _planned(step, args, data=4, fsdp=2)
    assert "the program's own" in plan.explain()
    applied = plan.apply(step)
    _same(applied(*args), jax.jit(step)(*args))
    # The backward scan still computes tanh again.
    assert applied.lower(*args).as_text().count("stablehlo.tanh") == 2


def _with_ys(params, x):
    x, ys = jax.lax.scan(lambda x, w: (x @ w, x.sum()), x, params)
    return x.mean() + ys.sum()


def _with_batch_norm(params, x):
    def layer(x, w):
        y = x @ w
        return y - y.mean(0, keepdims=True), None

    return jax.lax.scan(layer, x, params)[0].mean()


def _without_scan(params, x):
    for w in params:
        x = x @ w
    return x.mean()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (_with_ys, "returns something for every layer"),
        (_with_batch_norm, "combine examples of the batch"),
        (_without_scan, "no scan over stacked parameters"),
    ],
)
def test_layers_that_cannot_be_cut_are_not(loss, reason):
    args = (jnp.ones((4, 8, 8)), jnp.ones((16, 8)))
    assert reason in stages.obstacle(trace(loss, args))
    step = sharding.train_step(loss, optax.sgd(1.0))
    whole = (args[0], step.optimizer.init(args[0]), args[1])
    assert reason in _planned(step, whole).explain()
    with pytest.raises(ValueError, match=reason):
        _planned(step, whole, stage=2)


def test_a_loaded_plan_runs_like_the_one_that_was_saved(decoder, tmp_path):
    step, args, expected = decoder
    plan = _planned(step, args, fsdp=4, tensor=2, zero=3)
    plan.save(tmp_path / "plan.json")
    loaded = sharding.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.where == sharding.Cluster.from_name("v5e:2x4")  # which `check` compiles for
    _same(loaded.apply(step)(*args), expected)
    with pytest.raises(ValueError, match="no structure of arguments"):
        _ = loaded.in_shardings
    # As `jax.jit` takes them, without `apply`.
    with jax.set_mesh(plan.bind().mesh):
        jitted = jax.jit(step, in_shardings=plan.in_shardings, out_shardings=plan.out_shardings)
        _same(jitted(*plan.apply(step).place(args)), expected)


def test_a_step_is_compiled_again_for_other_shapes_only(decoder, models):
    step, (params, state, _), _ = decoder
    plan = _planned(step, (params, state, models.tokens(KEY)), data=8)
    applied = plan.apply(step)
    longer = models.tokens(KEY, length=9)
    _same(applied(params, state, longer), jax.jit(step)(params, state, longer))
    with pytest.raises(ValueError, match="array axis 0 is partitioned 8 times"):
        applied(params, state, models.tokens(KEY, batch=6))


def test_accumulation_refuses_a_batch_that_it_does_not_divide(decoder, models):
    step, (params, state, tokens), _ = decoder
    plan = _planned(step, (params, state, tokens), tensor=2, context=4, microbatches=4)
    with pytest.raises(ValueError, match="4 micro-batches do not divide a batch of 6"):
        plan.apply(step)(params, state, models.tokens(KEY, batch=6))


def test_specs_of_a_plan_serve_other_programs_that_hold_the_parameters(decoder):
    step, args, _ = decoder
    plan = _planned(step, args, fsdp=4, tensor=2, zero=3)
    placed = plan.bind().place({"policy": args[0]})
    assert placed["policy"]["layers"]["down"].sharding.spec == plan.inputs["0/layers/down"]
    assert plan.batch == ("fsdp",)
    assert plan.inputs["2"] == P("fsdp")


def test_options_reach_the_compiler():
    """That of CPUs knows none of TPUs, and says so."""
    args = (jnp.ones((8, 16)), jnp.ones((16, 16)))
    plan = sharding.plan(lambda x, w: x @ w, args, cluster=jax.devices())
    known = plan.apply(plan.step, options={"xla_cpu_enable_fast_math": "False"})
    np.testing.assert_allclose(known(*args), 16.0)
    unknown = plan.apply(plan.step, options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="windowed_einsum"):
        unknown(*args)
