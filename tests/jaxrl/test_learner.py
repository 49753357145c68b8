"""One update against plain `jax.grad` and optax, what it must leave alone, eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxrl import recipes
from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer, lm_ptx
from jaxrl.models import (
    Decoder,
    DecoderConfig,
    LoraConfig,
    LoraParam,
    ScalarModel,
    logical_axes,
)
from jaxrl.recipes import KL
from jaxrl.rollouts import Collector, Sampling
from jaxrl.types import REFERENCE_VERSION, Prompts
from sharding import Plan

CONFIG = DecoderConfig(
    vocab_size=16, layers=2, embed=8, heads=4, kv_heads=2, head_dim=4, mlp=16, max_len=24,
    remat="none",
)  # fmt: skip
TEMPERATURE = 0.8
EOS, PAD = 1, 0
SAMPLING = Sampling(max_new_tokens=5, eos_id=EOS, pad_id=PAD, temperature=TEMPERATURE)
PROMPTS = Prompts(
    tokens=jnp.asarray([[0, 0, 3], [4, 5, 6], [0, 7, 8], [9, 3, 3]], jnp.int32),
    mask=jnp.asarray([[0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]], bool),
    ids=jnp.arange(4),
)
RATE = 0.1


def peaked(seed):
    """A policy whose distributions are far from uniform."""
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(seed)))
    return graphdef, jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)


GRAPHDEF, PARAMS = peaked(0)
REFERENCE = peaked(1)[1]
CRITIC_DEF, CRITIC = nnx.split(ScalarModel(CONFIG, ("reward", "cost"), rngs=nnx.Rngs(2)))


def collected(group_size, *, params=PARAMS, reference_completions=0):
    """Rollouts of the policy with made-up scores of both signs."""
    collector = Collector(
        graphdef=GRAPHDEF,
        sampling=SAMPLING,
        group_size=group_size,
        reference_completions=reference_completions,
    )
    rollouts, _ = collector.collect(params, REFERENCE, PROMPTS, jax.random.key(0), 0)
    reward, cost = np.random.default_rng(0).normal(size=(2, 4, group_size)).astype(np.float32)
    return rollouts.replace(
        rewards={"reward": jnp.asarray(reward)}, costs={"cost": jnp.asarray(cost)}
    )


def momentum():
    """An optimiser with state that, unlike Adam, does not blow up the noise of tiny gradients."""
    return optax.sgd(RATE, momentum=0.9)


def learner(recipe, **changes):
    return Learner(
        recipe=recipe,
        apply=lm_apply(
            GRAPHDEF, CRITIC_DEF if recipe.value_heads else None, temperature=TEMPERATURE
        ),
        optimizer=momentum(),
        **changes,
    )


def started(trainer):
    params = {"policy": PARAMS}
    if trainer.recipe.value_heads:
        params["critic"] = CRITIC
    return trainer.init(params, num_prompts=4)


def assert_close(left, right, **tolerance):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)


def moved(before, after):
    """Which leaves of a tree are no longer what they were, by path."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {jax.tree_util.keystr(path): bool(jnp.any(a != b)) for (path, a), b in pairs}


ROLLOUTS = collected(4)
DR_GRPO = recipes.get("dr_grpo", group_size=4, kl=KL(coef=0.1, placement="loss", estimator="k3"))
LAGRANGIAN = recipes.get("ppo_lagrangian", group_size=4)
CRITIC_FREE, WITH_CRITIC = learner(DR_GRPO), learner(LAGRANGIAN)  # compiled once for all tests


# --- the truth: one sequence after another, no jit, no recipe -----------------------------------


def plain_log_probs(params, rollouts, *, temperature=TEMPERATURE):
    """Of each completion token, from whole sequences without padding on the left."""
    model = nnx.merge(GRAPHDEF, params)
    batch, groups, _ = rollouts.tokens.shape
    rows = []
    for b in range(batch):
        prompt = np.asarray(PROMPTS.tokens)[b][np.asarray(PROMPTS.mask)[b]]
        whole = jnp.concatenate(
            [jnp.broadcast_to(prompt, (groups, len(prompt))), rollouts.tokens[b]], axis=1
        )
        logits = jax.nn.log_softmax(model(whole) / temperature)[:, len(prompt) - 1 : -1]
        rows.append(jnp.take_along_axis(logits, rollouts.tokens[b][..., None], axis=-1)[..., 0])
    return jnp.stack(rows)


def dr_grpo_loss(params, rollouts):
    """Token mean of −min(ρA, clip(ρ)A) + β·k3 with A = R − mean R   (arXiv:2503.20783)."""
    new, old = plain_log_probs(params, rollouts), rollouts.behaviour_log_probs
    ratio = jnp.exp(new - old)
    advantage = rollouts.reward - rollouts.reward.mean(axis=1, keepdims=True)
    advantage = advantage[..., None]
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    gap = rollouts.reference_log_probs - new
    per_token = -surrogate + 0.1 * (jnp.exp(gap) - gap - 1)
    return jnp.sum(per_token, where=rollouts.mask) / rollouts.mask.sum()


plain_gradient = jax.jit(jax.value_and_grad(dr_grpo_loss))


def test_one_update_is_a_plain_gradient_step():
    state, metrics = CRITIC_FREE.update(started(CRITIC_FREE), ROLLOUTS)
    loss, gradient = plain_gradient(PARAMS, ROLLOUTS)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)
    expected = jax.tree.map(lambda p, g: p - RATE * g, PARAMS, gradient)
    assert_close(state.params["policy"], expected, atol=2e-5)
    assert (int(state.step), float(metrics["skipped"])) == (1, 0.0)
    assert all(moved(PARAMS, state.params["policy"]).values())


def test_the_second_epoch_keeps_the_old_log_probs():
    trainer = learner(recipes.get("dr_grpo", group_size=4, kl=DR_GRPO.kl, epochs=2))
    state, metrics = trainer.update(started(trainer), ROLLOUTS)
    optimizer, params = momentum(), PARAMS
    opt_state = optimizer.init(params)
    for _ in range(2):
        loss, gradient = plain_gradient(params, ROLLOUTS)
        updates, opt_state = optimizer.update(gradient, opt_state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    assert abs(float(metrics["ratio"]) - 1) > 1e-3  # of the second pass, off its own policy
    assert float(metrics["sampler_gap"]) < 1e-4  # of the first, or every run would raise the alarm
    assert_close(state.params["policy"], params, atol=1e-4)
    assert int(state.step) == 1


def test_the_second_epoch_keeps_the_old_values():
    """Composed by hand from the recipe's parts: targets once, from the values before any step."""
    recipe = recipes.get("ppo_lagrangian", group_size=4, epochs=2)
    trainer = learner(recipe)
    state, _ = trainer.update(started(trainer), ROLLOUTS)
    multipliers, _ = recipe.update(recipe.init(4), ROLLOUTS)
    values = jnp.zeros((*ROLLOUTS.tokens.shape, 2))  # the critic's heads start at zero
    targets = recipe.targets(multipliers, ROLLOUTS, values)

    @jax.jit
    @jax.grad
    def gradient(params):
        return recipe.loss(multipliers, ROLLOUTS, targets, trainer.apply(params, ROLLOUTS))[0]

    optimizer, params = momentum(), {"policy": PARAMS, "critic": CRITIC}
    opt_state = optimizer.init(params)
    for _ in range(2):
        updates, opt_state = optimizer.update(gradient(params), opt_state)
        params = optax.apply_updates(params, updates)
    assert_close(state.params, params, atol=1e-5)
    # The critic's trunk too: after the first step its heads are no longer zero.
    assert all(moved({"policy": PARAMS, "critic": CRITIC}, state.params).values())
    np.testing.assert_array_equal(state.recipe.value, multipliers.value)


def test_demonstrations_add_their_likelihood():
    """PTX adds its gradient to that of RL, which is a step's difference: SGD is linear in it."""
    demonstrations = (PROMPTS, ROLLOUTS.tokens[:, 0], ROLLOUTS.mask[:, 0])
    trainer = learner(DR_GRPO, ptx=lm_ptx(GRAPHDEF), ptx_coef=3.0)
    plain, _ = CRITIC_FREE.update(started(CRITIC_FREE), ROLLOUTS)
    mixed, metrics = trainer.update(started(trainer), ROLLOUTS, demonstrations)

    @jax.value_and_grad
    def likelihood(params):
        # At temperature 1, whatever the rollouts were sampled at: people did not write at 0.8.
        log_probs = plain_log_probs(params, ROLLOUTS, temperature=1.0)[:, 0]
        return -jnp.sum(log_probs, where=ROLLOUTS.mask[:, 0]) / ROLLOUTS.mask[:, 0].sum()

    loss, gradient = jax.jit(likelihood)(PARAMS)
    np.testing.assert_allclose(metrics["ptx_loss"], loss, rtol=1e-5)
    difference = jax.tree.map(lambda a, b: b - a, plain.params["policy"], mixed.params["policy"])
    assert_close(difference, jax.tree.map(lambda g: -RATE * 3.0 * g, gradient), atol=1e-4)


def test_policy_and_critic_have_rates_and_clips_of_their_own():
    config = OptimizerConfig(
        learning_rate=1e-3, critic_learning_rate=4e-2, warmup_steps=4, max_grad_norm=1.0
    )
    params = {"policy": {"w": jnp.zeros((2, 2))}, "critic": {"w": jnp.zeros((2, 2))}}
    # A critic's explosion must not shrink the policy's gradient; Adam's first step is the rate.
    gradient = {"policy": {"w": jnp.full((2, 2), 0.1)}, "critic": {"w": jnp.full((2, 2), 1e6)}}
    optimizer = lm_optimizer(config)
    state = optimizer.init(params)
    for rise in (1, 2, 3, 4, 4, 4):
        updates, state = optimizer.update(gradient, state, params)
        np.testing.assert_allclose(updates["policy"]["w"], -1e-3 * rise / 4, rtol=1e-4)
        np.testing.assert_allclose(updates["critic"]["w"], -4e-2 * rise / 4, rtol=1e-4)
    means = {name: s.inner_state[1][0].mu[name]["w"] for name, s in state.inner_states.items()}
    # Six steps of the clipped gradients, ½ in each of four places, or 0.1 unclipped.
    np.testing.assert_allclose(means["critic"], 0.5 * (1 - 0.9**6), rtol=1e-5)
    np.testing.assert_allclose(means["policy"], 0.1 * (1 - 0.9**6), rtol=1e-5)


def test_the_rate_falls_along_a_cosine_and_decays_matrices_only():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay_steps=4, weight_decay=0.5)
    optimizer = config.build()
    params = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    state = optimizer.init(params)
    for step in range(4):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        rate = 0.5 * (1 + np.cos(np.pi * step / 4))
        np.testing.assert_allclose(updates["matrix"], -0.5 * rate, rtol=1e-5)
        np.testing.assert_array_equal(updates["norm"], 0.0)


def test_weight_decay_spares_the_norms_and_biases_of_stacked_layers():
    config = DecoderConfig(
        vocab_size=5, layers=2, embed=4, heads=2, kv_heads=1, head_dim=2, mlp=6, max_len=8,
        qk_norm=True, attention_bias=True,
    )  # fmt: skip
    params = jax.tree.map(jnp.ones_like, nnx.state(Decoder(config, rngs=nnx.Rngs(0))))
    optimizer = OptimizerConfig(warmup_steps=0, weight_decay=0.5).build()

    @jax.jit
    def first_updates(params):
        without_gradient = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(without_gradient, optimizer.init(params), params)[0]

    updates = first_updates(params)
    decayed = {path[-1] for path, u in nnx.to_flat_state(updates) if np.any(u[...] != 0)}
    assert decayed == {
        "embedding", "query", "key", "value", "attention_out", "gate", "up", "down",
    }  # fmt: skip


def test_a_step_that_is_not_finite_changes_nothing():
    scores = {"reward": ROLLOUTS.reward.at[1, 2].set(jnp.nan)}
    log_probs = ROLLOUTS.behaviour_log_probs.at[0, 0, 0].set(-jnp.inf)
    state, metrics = WITH_CRITIC.update(started(WITH_CRITIC), ROLLOUTS)
    assert float(metrics["skipped"]) == 0.0
    kept = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    for broken in ({"rewards": scores}, {"behaviour_log_probs": log_probs}):
        state, metrics = WITH_CRITIC.update(state, ROLLOUTS.replace(**broken))
        assert float(metrics["skipped"]) == 1.0
        assert_close(jax.tree.leaves(state), kept, rtol=0)
    state, metrics = WITH_CRITIC.update(state, ROLLOUTS)
    assert (float(metrics["skipped"]), int(state.step)) == (0.0, 2)


def test_only_the_first_update_compiles():
    heard = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            heard.append(seconds)

    trainer = Learner(
        recipe=recipes.get("repo_tb"),
        apply=lm_apply(GRAPHDEF, None, temperature=TEMPERATURE),
        optimizer=lm_optimizer(OptimizerConfig()),
    )
    rollouts = collected(8)
    state = started(trainer)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state, _ = jax.block_until_ready(trainer.update(state, rollouts))
        assert len(heard) == 1
        for _ in range(2):
            state, _ = jax.block_until_ready(trainer.update(state, rollouts))
        assert len(heard) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_sampler_gap_tells_whose_weights_wrote():
    _, honest = CRITIC_FREE.update(started(CRITIC_FREE), ROLLOUTS)
    assert float(honest["sampler_gap"]) < 1e-4
    written_by_another = collected(4, params=REFERENCE)
    _, stale = CRITIC_FREE.update(started(CRITIC_FREE), written_by_another)
    assert float(stale["sampler_gap"]) > 0.5


def test_what_the_reference_wrote_is_not_the_policys_behaviour():
    mixed = collected(4, reference_completions=2)
    own = mixed.policy_version[:, :, 0] != REFERENCE_VERSION
    assert np.array_equal(own, np.tile([True, True, False, False], (4, 1)))
    _, metrics = CRITIC_FREE.update(started(CRITIC_FREE), mixed)
    log_ratio = plain_log_probs(PARAMS, mixed) - mixed.reference_log_probs
    kl = jnp.sum(log_ratio, where=mixed.mask & own[..., None]) / jnp.sum(own)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    assert float(metrics["sampler_gap"]) < 1e-4


def test_padding_changes_nothing():
    state, metrics = WITH_CRITIC.update(started(WITH_CRITIC), ROLLOUTS)
    left = {"mode": "constant", "constant_values": 7}
    prompts = ROLLOUTS.prompts.replace(
        tokens=jnp.pad(PROMPTS.tokens, ((0, 0), (2, 0)), **left),
        mask=jnp.pad(PROMPTS.mask, ((0, 0), (2, 0))),
    )

    def pad(x, value):
        return jnp.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=value)

    padded = ROLLOUTS.replace(
        prompts=prompts,
        tokens=pad(ROLLOUTS.tokens, 7),
        mask=pad(ROLLOUTS.mask, False),
        behaviour_log_probs=pad(ROLLOUTS.behaviour_log_probs, 0.0),
        reference_log_probs=pad(ROLLOUTS.reference_log_probs, 0.0),
        policy_version=pad(ROLLOUTS.policy_version, 0),
    )
    wide, wide_metrics = WITH_CRITIC.update(started(WITH_CRITIC), padded)
    assert_close(wide.params, state.params, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(wide_metrics[name], metrics[name], atol=1e-5, err_msg=name)


def test_eight_devices_do_what_one_does():
    params = {"policy": PARAMS, "critic": CRITIC}
    plan = Plan.from_rules(
        logical_axes(params),
        mesh={"fsdp": 4, "tensor": 2},
        rules={"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"},
        batch=("fsdp",),
    )
    planned = learner(LAGRANGIAN, plan=plan)
    whole, state = started(WITH_CRITIC), started(planned)
    for step in range(2):
        whole, expected = WITH_CRITIC.update(whole, ROLLOUTS)
        state, metrics = planned.update(state, ROLLOUTS)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], atol=1e-5)
        # One rounding of the parameters moves this peaked model's second update by 1e-5 already.
        assert_close(state.params, whole.params, atol=1e-5 if step == 0 else 1e-4)
    query = state.params["policy"]["layers"]["query"][...]
    assert query.sharding.spec == P(None, "fsdp", "tensor")
    assert query.addressable_shards[0].data.shape == (2, 2, 2, 4)
    moments = state.opt_state[0].trace
    assert moments["policy"]["layers"]["query"][...].sharding == query.sharding
    trunk = moments["critic"]["trunk"]["layers"]["value"][...]
    assert trunk.sharding.spec == P(None, "fsdp", "tensor")
    assert planned._jitted._cache_size() == 1  # results lie where arguments lay


def test_parameters_that_the_recipe_does_not_train_are_refused():
    with pytest.raises(ValueError, match=r"repo trains \['critic', 'policy'\], got \['policy'\]"):
        learner(recipes.get("repo")).init({"policy": PARAMS}, num_prompts=4)
    with pytest.raises(ValueError, match=r"grpo trains \['policy'\]"):
        learner(DR_GRPO).init({"policy": PARAMS, "critic": CRITIC}, num_prompts=4)


@pytest.mark.parametrize("name", ["learning_rate", "critic_learning_rate", "max_grad_norm"])
def test_rates_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be > 0, got 0"):
        OptimizerConfig(**{name: 0.0})


# --- adapters -----------------------------------------------------------------------------------


def test_adapters_alone_are_trained_as_they_would_be_among_all():
    config = dataclasses.replace(
        CONFIG, lora=LoraConfig(rank=2, alpha=8.0, targets=("query", "down"))
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    source = dict(nnx.to_flat_state(PARAMS))
    graphdef, params = nnx.split(model)
    params = nnx.from_flat_state(
        (path, source.get(path, variable)) for path, variable in nnx.to_flat_state(params)
    )
    graphdef, adapters, frozen = nnx.split(nnx.merge(graphdef, params), LoraParam, ...)
    assert len(jax.tree.leaves(adapters)) == 4
    collector = Collector(graphdef=graphdef, sampling=SAMPLING, group_size=4, frozen=frozen)
    rollouts, _ = collector.collect(adapters, params, PROMPTS, jax.random.key(0), 0)
    reward = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    rollouts = rollouts.replace(
        rewards={"reward": jnp.asarray(reward)}, costs={"cost": jnp.asarray(-reward)}
    )

    def updated(policy, **options):
        trainer = Learner(
            recipe=recipes.get("rloo"),
            apply=lm_apply(graphdef, None, temperature=TEMPERATURE),
            optimizer=optax.sgd(RATE),
            **options,
        )
        state, metrics = trainer.update(trainer.init({"policy": policy}, num_prompts=4), rollouts)
        assert metrics["sampler_gap"] < 1e-4
        return dict(nnx.to_flat_state(state.params["policy"]))

    alone, among = updated(adapters, frozen={"policy": frozen}), updated(params)
    before = dict(nnx.to_flat_state(adapters))
    assert set(alone) == set(before)
    for path, variable in alone.items():
        np.testing.assert_allclose(variable.get_value(), among[path].get_value(), atol=1e-7)
        moved = np.any(variable.get_value() != before[path].get_value())
        assert moved == path[-1].endswith("_b")  # B is zero, so that A has no gradient yet
