"""No train step holds the logits of all positions at once: a walk over everything it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.extend import core

from jaxrl import recipes
from jaxrl.learner import Learner, lm_apply, lm_ptx
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.supervised import Supervised
from jaxrl.types import PackedRows, Prompts, Rollouts

B, G, P, T, V, CHUNK = 2, 4, 5, 24, 499, 4
CONFIG = DecoderConfig(
    vocab_size=V, layers=1, embed=4, heads=1, kv_heads=1, head_dim=4, mlp=4, max_len=P + T,
    compute_dtype="bfloat16", logit_chunk=CHUNK,
)  # fmt: skip
PROMPTS = Prompts(
    tokens=jnp.ones((B, P), jnp.int32), mask=jnp.ones((B, P), bool), ids=jnp.arange(B)
)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for held in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
        ):
            if isinstance(held, core.ClosedJaxpr):
                yield from equations(held.jaxpr)
            elif isinstance(held, core.Jaxpr):
                yield from equations(held)


def widest(step, *args):
    """Most positions, of whatever dtype, that any array of a step has entries of V for."""
    sizes = [0]
    for eqn in equations(jax.make_jaxpr(step)(*args).jaxpr):
        for var in eqn.outvars:
            shape = getattr(var.aval, "shape", ())
            if V in shape:
                sizes.append(var.aval.size // V)
    return max(sizes)


def update_of_rl(config):
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    learner = Learner(
        recipe=recipes.get("grpo"),
        apply=lm_apply(graphdef, None, temperature=0.7),
        optimizer=optax.adam(1e-3),
        ptx=lm_ptx(graphdef),
        ptx_coef=1.0,
    )
    state = learner.init({"policy": params}, num_prompts=B)
    tokens = jnp.ones((B, G, T), jnp.int32)
    zeros = jnp.zeros(tokens.shape)
    rollouts = Rollouts(
        prompts=PROMPTS, tokens=tokens, mask=tokens > 0, behaviour_log_probs=zeros,
        reference_log_probs=zeros, policy_version=tokens,
        rewards={"reward": jnp.ones((B, G))}, costs={"cost": jnp.ones((B, G))},
    )  # fmt: skip
    demonstrations = PROMPTS, tokens[:, 0], tokens[:, 0] > 0
    return learner.step, (state, rollouts, demonstrations)


def supervised(config):
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    trainer = Supervised(graphdef=graphdef, optimizer=optax.adam(1e-3))
    return trainer, trainer.init(params)


def update_of_sft(config):
    trainer, state = supervised(config)
    tokens = jnp.ones((B * G, T), jnp.int32)
    prompts = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), PROMPTS)
    return trainer.update, (state, prompts, tokens, tokens > 0)


def update_of_packed_sft(config):
    trainer, state = supervised(config)
    tokens = jnp.ones((B * G, T + 1), jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(T + 1)[None] > 0, tokens.shape)
    return trainer.update_packed, (state, PackedRows(tokens=tokens, segments=tokens, mask=mask))


@pytest.mark.parametrize("make", [update_of_rl, update_of_sft, update_of_packed_sft])
def test_logits_exist_for_one_chunk_of_positions(make):
    step, args = make(CONFIG)
    assert widest(step, *args) == B * G * CHUNK
    step, args = make(dataclasses.replace(CONFIG, logit_chunk=None))
    assert widest(step, *args) == B * G * T
