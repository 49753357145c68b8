"""Actors with weights of 8 bits: which bits they have, and what the learner makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl import recipes
from jaxrl.actors import Actor, RolloutChecks, Threads
from jaxrl.data.batches import PromptSet
from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.rollouts import Collector, Sampling, Scorer
from jaxrl.sync import MemoryStore, Publisher, Subscriber, SyncConfig, quantise
from jaxrl.tokenizers import PLAIN, train_bpe
from jaxrl.train import AsynchronousTrainer, SamplerDrift

TEXTS = ("one", "two words", "three", "four more", "five", "six", "seven")
TOKENIZER = train_bpe(TEXTS * 3, 270)
PROMPTS = PromptSet.encode(TOKENIZER, TEXTS, PLAIN, max_len=10)
CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, embed=32, heads=2, kv_heads=1, head_dim=16, mlp=32,
    max_len=16, remat="none",
)  # fmt: skip
GRAPHDEF, PARAMS = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
LEARNER = Learner(
    recipe=recipes.get("async_rloo", group_size=4),
    apply=lm_apply(GRAPHDEF, None, temperature=1.0),
    optimizer=lm_optimizer(OptimizerConfig(learning_rate=1e-2)),
)


def run(how, steps, tolerance):
    """Trains; returns (version, published, dense weights, rollouts) of each item, and policies."""
    store, seen, policies, rows = MemoryStore(), [], {0: jax.tree.map(jnp.copy, PARAMS)}, []

    def build(name):
        subscriber = Subscriber(
            store, run_id="r", like=jax.eval_shape(lambda: PARAMS), name=name, dequantise=True
        )
        actor = Actor(
            name=name,
            collector=Collector(
                graphdef=GRAPHDEF,
                sampling=Sampling(
                    max_new_tokens=4, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id
                ),
                group_size=4,
            ),
            scorer=Scorer(
                tokenizer=TOKENIZER, prompts=PROMPTS,
                rewards={"reward": lambda p, c: [float(len(text)) for text in c]},
                costs={"cost": lambda p, c: np.zeros(len(c))},
            ),
            prompts=PROMPTS,
            reference=PARAMS,
            subscriber=subscriber,
        )  # fmt: skip
        write = actor.write

        def watched(item):
            score = write(item)
            weights = subscriber.published, subscriber.params  # before the next item's take over

            def scored():
                result = score()
                seen.append((result.version, *weights, result.rollouts))
                return result

            return scored

        actor.write = watched
        return actor

    loop = AsynchronousTrainer(
        learner=LEARNER,
        pool=Threads(1, build),
        publisher=Publisher(store, run_id="r", config=SyncConfig(quantise=how)),
        checks=RolloutChecks(
            prompts=PROMPTS, group_size=4, completion_len=4, vocab_size=TOKENIZER.vocab_size
        ),
        prompts_per_item=2,
        seed=3,
        max_staleness=0,
        sampler_tolerance=tolerance,
        stall_s=60.0,
    )
    state = LEARNER.init({"policy": PARAMS}, num_prompts=len(PROMPTS))
    for done, present, row, _ in loop.run(state, start=0, steps=steps):
        policies[done] = jax.tree.map(jnp.copy, present.params["policy"])
        rows.append(row)
    return seen, policies, rows


def log_probs(params, rollouts):
    rollouts = jax.tree.map(jnp.asarray, rollouts)
    return np.asarray(LEARNER.apply({"policy": params}, rollouts).log_probs)


@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_an_actor_has_the_bits_that_the_learner_quantised_and_says_so(how):
    seen, policies, rows = run(how, 3, tolerance=10.0)
    assert [version for version, *_ in seen[:3]] == [0, 1, 2]
    for version, published, dense, rollouts in seen[:3]:
        expected = quantise(policies[version], how)
        for got, want in zip(jax.tree.leaves(published), jax.tree.leaves(expected), strict=True):
            assert got.dtype == want.dtype
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(dense)}
        assert dtypes == {np.dtype(np.float32)}
        said = rollouts.behaviour_log_probs
        np.testing.assert_allclose(said, log_probs(dense, rollouts), atol=2e-5)
        assert np.abs(said - log_probs(policies[version], rollouts)).max() > 1e-4
    # Of one version, and yet not of one policy: the correction sees the actor's own.
    for row, (version, _, _, rollouts) in zip(rows, seen, strict=False):
        assert row["staleness_max"] == 0
        ratio = np.exp(log_probs(policies[version], rollouts) - rollouts.behaviour_log_probs)
        assert row["ratio"] == pytest.approx(ratio[rollouts.mask].mean(), rel=2e-6)
        assert abs(row["importance_weight"] - 1) > 1e-5
        assert row["sampler_gap"] > 1e-4


def test_a_tolerance_below_what_quantising_costs_raises_the_alarm():
    with pytest.raises(SamplerDrift, match="raise sampler_tolerance"):
        run("fp8", 1, tolerance=1e-4)
