"""One mesh for learning and generation: against every mesh planned alone, and what it refuses."""

import functools
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import sharding
from jaxrl import policy, recipes
from jaxrl.deployment import Workload, actor_programs, shared_mesh
from jaxrl.deployment.programs import update_parts
from jaxrl.deployment.shared_mesh import learning
from jaxrl.models import Decoder, DecoderConfig, LoraConfig, LoraParam
from jaxrl.models.named import named
from jaxrl.rollouts import Sampling
from jaxrl.rollouts.generate import generate_from_state
from jaxrl.types import Prompts
from sharding import Cluster, Constraints

POLICY = DecoderConfig(
    vocab_size=512, layers=1, embed=256, heads=8, kv_heads=4, head_dim=32, mlp=512, max_len=128
)
WORKLOAD = Workload(
    recipe=recipes.get("rloo"), policy=POLICY, prompts_per_step=8, prompt_len=64,
    completion_len=64, as_configured=True,
)  # fmt: skip
FOUR = Cluster.from_name("v5p:2x2x1")


def seconds(program, degrees):
    """Of one call on a mesh that is given whole."""
    pinned = dict(zip(("data", "fsdp", "tensor"), degrees, strict=True))
    plan = sharding.plan(
        program.step, program.args, cluster=FOUR, state=program.state, data=program.data,
        donate=program.donate,
        constraints=Constraints(pinned=pinned | {"context": 1, "expert": 1, "stage": 1, "zero": 3}),
    )  # fmt: skip
    host = plan.breakdown.get("host", 0.0) if program.on_device else 0.0
    return plan.step_time_s - host


def test_no_mesh_is_faster_than_the_one_that_is_chosen():
    found = shared_mesh(WORKLOAD, FOUR)
    learn = learning(WORKLOAD)
    decode = {p.name: p for p in actor_programs(WORKLOAD, 8)}["decode"]
    times = {}
    chosen = tuple(found.mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    for degrees in {(4, 1, 1), (1, 4, 1), (1, 1, 4), chosen}:
        times[degrees] = seconds(learn, degrees) + 64 * seconds(decode, degrees)
    assert found.considered == 6  # ordered factors of four in three places
    assert found.update_s + found.generation_s == pytest.approx(times[chosen])
    assert times[chosen] <= 1.02 * min(times.values())
    assert max(times.values()) > 1.1 * min(times.values())  # it matters which


def test_batches_are_divided_as_they_may_be():
    found = shared_mesh(WORKLOAD, FOUR, divides=lambda ways: ways <= 2)
    assert found.mesh["tensor"] >= 2
    assert "tensor=" in str(found)
    with pytest.raises(ValueError, match="no mesh of 4 devices divides every batch"):
        shared_mesh(WORKLOAD, FOUR, divides=lambda ways: False)


def test_what_fits_on_no_mesh_is_refused():
    large = replace(WORKLOAD, policy=named("llama3-8b"))
    with pytest.raises(sharding.DoesNotFit) as refused:
        shared_mesh(large, Cluster.from_name("v5e:2x2"))
    # Weights, gradients and two moments in float32 of 8 billion parameters, on four devices.
    assert refused.value.needed_bytes > 8e9 * 16 / 4


def test_adapters_learn_beside_the_weights_of_their_reference():
    small = DecoderConfig(
        vocab_size=32, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, max_len=12,
        lora=LoraConfig(rank=2),
    )  # fmt: skip
    workload = replace(WORKLOAD, policy=small, prompts_per_step=2, prompt_len=8, completion_len=4)
    program = learning(workload)
    trained = jax.tree.leaves(program.args[1].params)
    assert len(trained) == 4  # A and B of query and value, and none of the frozen kernels
    graphdef, params = nnx.split(Decoder(small, rngs=nnx.Rngs(0)))
    _, adapters, frozen = nnx.split(nnx.merge(graphdef, params), LoraParam, ...)
    learner, _, shapes = update_parts(workload)
    rng = np.random.default_rng(0)
    prompts = Prompts(
        tokens=jnp.asarray(rng.integers(0, 32, (2, 8)), jnp.int32),
        mask=jnp.ones((2, 8), bool), ids=jnp.arange(2, dtype=jnp.int32),
    )  # fmt: skip
    tokens = jnp.asarray(rng.integers(0, 32, shapes.tokens.shape), jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    model = nnx.merge(graphdef, params)
    log_probs = policy.evaluate(model, prompts, tokens, mask, temperature=1.0).log_probs
    rollouts = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes).replace(
        prompts=prompts,
        tokens=tokens,
        mask=mask,
        behaviour_log_probs=log_probs,
        rewards={"reward": jnp.asarray(rng.normal(size=shapes.tokens.shape[:2]), jnp.float32)},
    )
    state = learner.init({"policy": adapters}, num_prompts=2)
    _, found = jax.jit(program.step)(params, state, rollouts)
    told = rollouts.replace(reference_log_probs=log_probs)
    _, wanted = replace(learner, frozen={"policy": frozen}).update(state, told)
    assert found["grad_norm"] > 1e-3
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_decoding_is_costed_in_the_types_that_the_collector_generates_in(compute_dtype, tied):
    small = DecoderConfig(
        vocab_size=40, layers=2, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=24, max_len=12,
        compute_dtype=compute_dtype, tie_embeddings=tied,
    )  # fmt: skip
    workload = replace(WORKLOAD, policy=small, prompts_per_step=2, prompt_len=8, completion_len=4)
    decode = {p.name: p for p in actor_programs(workload, 2)}["decode"]
    ends, layers, cache, *_ = decode.args
    costed = Counter((x.shape, x.dtype) for x in jax.tree.leaves((ends, layers, cache)))

    # What the loop over tokens reads, of the collector's own call with the learner's parameters.
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(small, rngs=nnx.Rngs(0))))
    _, held, shapes = update_parts(workload)
    write = functools.partial(
        generate_from_state, graphdef=graphdef, group_size=workload.group_size,
        sampling=Sampling(max_new_tokens=4, eos_id=1, pad_id=0),
    )  # fmt: skip
    made = jax.make_jaxpr(write)(held["policy"], shapes.prompts, jax.random.key(0))
    (loop,) = loops(made.jaxpr)
    read = Counter((v.aval.shape, v.aval.dtype) for v in loop.invars)
    missing = costed - read
    assert not missing, missing
    assert {dtype for shape, dtype in costed if shape == (40, 16)} == {np.dtype("float32")}
    caches = {x.dtype for x in jax.tree.leaves(cache.own)}
    assert caches == {jnp.dtype(compute_dtype)}


def loops(jaxpr):
    """The loops of a jaxpr that carry a batch on, its calls entered."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            yield eqn
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from loops(inner)


def test_actors_of_a_large_run_hold_bf16():
    large = replace(WORKLOAD, as_configured=False)
    (prefill, *_) = actor_programs(large, 2)
    assert {x.dtype for x in jax.tree.leaves(prefill.args[0])} == {jnp.dtype("bfloat16")}
