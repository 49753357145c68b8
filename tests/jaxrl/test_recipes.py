"""Recipes: compositions against closed forms, padding, and the shape of what they return."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages as adv
from jaxrl import recipes
from jaxrl.constraints import Lagrangian, Rectified
from jaxrl.recipes import KL
from jaxrl.types import PolicyOutput, Prompts, Rollouts

NAMES = tuple(recipes.RECIPES)


def make(recipe, *, seed=0, prompts=3, tokens=5, padding=0):
    """Random rollouts, critic values and outputs; `padding` adds masked tokens of rubbish."""
    rng = np.random.default_rng(seed)
    shape = (prompts, recipe.group_size, tokens)
    heads = len(recipe.value_heads)
    lengths = rng.integers(1, tokens + 1, size=shape[:2])
    arrays = {name: rng.normal(size=shape) for name in ("behaviour", "reference", "new", "h")}
    values, new_values = rng.normal(size=(2, *shape, heads))
    scores = rng.normal(size=(2, *shape[:2]))
    greedy = rng.normal(size=(2, prompts))

    def pad(array, axis=2):
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, padding)
        return np.pad(array, widths, constant_values=7.0).astype(np.float32)

    mask = jnp.asarray(np.arange(tokens + padding) < lengths[..., None])
    full = (*shape[:2], tokens + padding)
    logs = {name: jnp.asarray(pad(array)) for name, array in arrays.items()}
    rollouts = Rollouts(
        prompts=Prompts(
            tokens=jnp.zeros((prompts, 2), jnp.int32),
            mask=jnp.ones((prompts, 2), bool),
            ids=jnp.arange(prompts),
        ),
        tokens=jnp.zeros(full, jnp.int32),
        mask=mask,
        behaviour_log_probs=logs["behaviour"] * mask,
        reference_log_probs=logs["reference"] * mask,
        policy_version=jnp.zeros(full, jnp.int32),
        rewards={"reward": jnp.asarray(scores[0], jnp.float32)},
        costs={"cost": jnp.asarray(scores[1], jnp.float32)},
        greedy={
            "reward": jnp.asarray(greedy[0], jnp.float32),
            "cost": jnp.asarray(greedy[1], jnp.float32),
        },
    )
    output = PolicyOutput(
        log_probs=logs["new"] * mask,
        entropy=logs["h"],
        values=jnp.asarray(pad(new_values)) if heads else None,
    )
    return rollouts, jnp.asarray(pad(values)) if heads else None, output


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    recipe = recipes.get(name)

    @jax.jit
    def step(rollouts, values, output):
        state = recipe.init(3)
        targets = recipe.targets(state, rollouts, values, log_probs=output.log_probs)
        loss, gradient = jax.value_and_grad(lambda o: recipe.loss(state, rollouts, targets, o)[0])(
            output
        )
        return loss, gradient.log_probs, targets.advantages, recipe.update(state, rollouts)[0]

    results = []
    for padding in (0, 3):
        rollouts, values, output = make(recipe, padding=padding)
        loss, gradient, advantages, state = step(rollouts, values, output)
        masked = ~np.asarray(rollouts.mask)
        assert not np.asarray(advantages)[masked].any()
        assert not np.asarray(gradient)[masked].any()
        results.append((loss, gradient[:, :, :5], advantages[:, :, :5], state.value))
    for plain, padded in zip(*results, strict=True):
        np.testing.assert_allclose(plain, padded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_compiles_and_maps_over_seeds(name):
    recipe = recipes.get(name)
    rollouts, values, output = make(recipe)
    state = recipe.init(3)

    @jax.jit
    @jax.vmap
    def step(state, rollouts, values, output):
        targets = recipe.targets(state, rollouts, values, log_probs=output.log_probs)
        loss, _ = recipe.loss(state, rollouts, targets, output)
        return loss, recipe.update(state, rollouts)[0]

    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (state, rollouts, values, output))
    losses, states = step(*twice)
    assert losses.shape == (2,)
    assert bool(jnp.isfinite(losses).all())
    assert jax.tree.structure(states) == jax.tree.structure(state)


def without_multiplier(recipe):
    return replace(recipe, constraint=replace(recipe.constraint, init_value=0.0, rule="additive"))


@pytest.mark.parametrize("name", ["repo", "ppo_lagrangian"])
def test_at_multiplier_zero_the_critic_algorithms_are_ppo(name):
    recipe = replace(without_multiplier(recipes.get(name)), kl=KL(coef=0.1, placement="reward"))
    ppo = recipes.get("ppo", kl=recipe.kl)
    rollouts, values, _ = make(recipe)
    found = recipe.targets(recipe.init(3), rollouts, values)
    expected = ppo.targets(ppo.init(3), rollouts, values[..., :1])
    np.testing.assert_array_equal(found.advantages, expected.advantages)
    np.testing.assert_array_equal(found.returns[..., :1], expected.returns)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "remax"])
def test_at_multiplier_zero_the_critic_free_ones_are_unconstrained(name):
    plain, constrained = recipes.get(name), without_multiplier(recipes.get(f"repo_{name}"))
    rollouts, _, _ = make(plain)
    found = constrained.targets(constrained.init(3), rollouts, None)
    expected = plain.targets(plain.init(3), rollouts, None)
    np.testing.assert_array_equal(found.advantages, expected.advantages)


def test_kl_in_reward_and_cost_keeps_its_weight_at_any_multiplier():
    """(A_R − λA_C)/(1 + λ) with λ_gae = 1, no values: its KL part is −β·Σ_{s≥t} kl_s."""
    for multiplier in (0.0, 1.0, 50.0):
        recipe = recipes.get(
            "ppo_lagrangian",
            advantage=adv.GAE(gae_lambda=1.0),
            constraint=Lagrangian(init_value=multiplier, max_value=None, rule="additive"),
            kl=KL(coef=0.3, placement="reward_and_cost"),
        )
        rollouts, values, _ = make(recipe)
        zero = jnp.zeros((3, 1))
        rollouts = rollouts.replace(rewards={"reward": zero}, costs={"cost": zero})
        found = recipe.targets(recipe.init(3), rollouts, jnp.zeros_like(values)).advantages
        kl = rollouts.behaviour_log_probs - rollouts.reference_log_probs
        to_go = jnp.cumsum(kl[..., ::-1], axis=-1)[..., ::-1]
        np.testing.assert_allclose(
            found, jnp.where(rollouts.mask, -0.3 * to_go, 0.0), rtol=1e-4, atol=1e-5
        )


def test_rloo_subtracts_the_sequence_kl_from_the_reward():
    recipe = recipes.get("rloo")
    rollouts, _, _ = make(recipe)
    kl = (rollouts.behaviour_log_probs - rollouts.reference_log_probs).sum(axis=-1)
    rewards = np.asarray(rollouts.reward - 0.05 * kl)
    expected = rewards - (rewards.sum(axis=1, keepdims=True) - rewards) / 3
    found = recipe.targets(recipe.init(3), rollouts, None).advantages
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-4, atol=1e-5)


def test_remax_adds_a_local_kl_to_the_discounted_advantage():
    """ret_t = −β·kl_t + γ^(tokens left)·clip(R − R_greedy, ±5)."""
    recipe = recipes.get("remax")
    rollouts, _, _ = make(recipe)
    found = np.asarray(recipe.targets(recipe.init(3), rollouts, None).advantages)
    kl = np.asarray(rollouts.behaviour_log_probs - rollouts.reference_log_probs)
    for b in range(3):
        length = int(rollouts.lengths[b, 0])
        gap = float(np.clip(rollouts.reward[b, 0] - rollouts.greedy["reward"][b], -5, 5))
        for t in range(length):
            expected = -0.05 * kl[b, 0, t] + 0.99 ** (length - 1 - t) * gap
            assert found[b, 0, t] == pytest.approx(expected, abs=1e-5)


def test_grpo_adds_k3_in_the_loss():
    recipe = recipes.get("grpo")
    rollouts, _, output = make(recipe)
    targets = recipe.targets(recipe.init(3), rollouts, None)
    with_kl, _ = recipe.loss(recipe.init(3), rollouts, targets, output)
    without = replace(recipe, kl=replace(recipe.kl, coef=0.0))
    plain, _ = without.loss(recipe.init(3), rollouts, targets, output)
    delta = np.asarray(rollouts.reference_log_probs - output.log_probs)[np.asarray(rollouts.mask)]
    assert float(with_kl - plain) == pytest.approx(
        0.04 * np.mean(np.exp(delta) - delta - 1), rel=1e-4
    )


def test_critic_loss_is_added_with_its_weight():
    recipe = recipes.get("repo")
    rollouts, values, output = make(recipe)
    state = recipe.init(3)
    targets = recipe.targets(state, rollouts, values, log_probs=output.log_probs)
    loss, metrics = recipe.loss(state, rollouts, targets, output)
    assert float(loss) == pytest.approx(float(metrics["policy_loss"] + metrics["value_loss"]))


def test_the_recommended_loss_uses_no_importance_ratio():
    """Only π, π_ref and the scores matter, not who wrote a completion."""
    recipe = recipes.get("repo_tb")
    rollouts, _, output = make(recipe)
    state = recipe.init(3)
    targets = recipe.targets(state, rollouts, None)
    other = rollouts.replace(behaviour_log_probs=rollouts.behaviour_log_probs - 3.0)
    assert float(recipe.loss(state, rollouts, targets, output)[0]) == float(
        recipe.loss(state, other, recipe.targets(state, other, None), output)[0]
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_target_share_is_how_far_the_log_ratios_have_come(share):
    """log π = log π_ref + share·R'/β + a constant of the prompt."""
    recipe = recipes.get("tba", group_size=4, kl=KL(coef=0.5))
    rollouts, _, output = make(recipe, tokens=1)
    shift = share * rollouts.reward / 0.5 + jnp.arange(3.0)[:, None]
    moved = output.replace(log_probs=rollouts.reference_log_probs + shift[..., None])
    state = recipe.init(3)
    _, metrics = recipe.loss(state, rollouts, recipe.targets(state, rollouts, None), moved)
    assert float(metrics["target_share"]) == pytest.approx(share, abs=1e-4)


def test_a_replay_saves_three_quarters_of_the_prompts():
    assert [recipes.get("repo_tb_replay").fresh_prompts(n) for n in (1, 4, 8)] == [1, 1, 2]
    assert recipes.get("repo_tb").fresh_prompts(8) == 8


def test_half_of_the_recommended_groups_come_from_the_reference():
    assert recipes.RECOMMENDED == "repo_tb"
    assert recipes.get("repo_tb").reference_samples == 4
    assert recipes.get("repo").reference_samples == 0


# ----------------------------------------------------------------- the exact gradient (6.2)


def table(seed):
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.normal(size=6), jnp.float32)  # noqa: E731
    return draw(), draw(), draw(), draw()  # logits, reference logits, reward, cost


def every_response(logits, reference, reward, cost):
    """One rollout of each response: weighting them by π makes sample means exact."""
    log_policy = jax.nn.log_softmax(logits)
    count = logits.shape[0]
    shape = (count, 1, 1)
    return Rollouts(
        prompts=Prompts(
            tokens=jnp.zeros((count, 1), jnp.int32),
            mask=jnp.ones((count, 1), bool),
            ids=jnp.zeros(count, jnp.int32),
        ),
        tokens=jnp.arange(count, dtype=jnp.int32).reshape(shape),
        mask=jnp.ones(shape, bool),
        behaviour_log_probs=log_policy.reshape(shape),
        reference_log_probs=jax.nn.log_softmax(reference).reshape(shape),
        policy_version=jnp.zeros(shape, jnp.int32),
        rewards={"reward": reward[:, None]},
        costs={"cost": cost[:, None]},
    )


@partial(jax.jit, static_argnums=0)
def expected_gradient(recipe, logits, reference, reward, cost, values):
    """Σ_y π(y)·A(y)·∇log π(y), the algorithm's policy gradient without sampling noise."""
    rollouts = every_response(logits, reference, reward, cost)
    shape = (logits.shape[0], 1, 1, len(recipe.value_heads))
    targets = recipe.targets(
        recipe.init(1), rollouts, jnp.broadcast_to(jnp.asarray(values, jnp.float32), shape)
    )
    weighted = jax.nn.softmax(logits) * targets.advantages[:, 0, 0]
    return weighted @ jax.jacobian(jax.nn.log_softmax)(logits)


def repo(**options):
    options = {"normalise": "none", "init_value": 3.0} | options
    return recipes.get("repo", kl=KL(coef=0.2, placement="reward"), constraint=Rectified(**options))


@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_exact_repo_is_the_gradient_of_the_lagrangian_whatever_the_critic(margin):
    logits, reference, reward, cost = table(0)

    def lagrangian(z):
        policy = jax.nn.softmax(z)
        log_ratio = jax.nn.log_softmax(z) - jax.nn.log_softmax(reference)
        penalised = reward - 3.0 * jnp.maximum(cost + margin, 0.0) - 0.2 * log_ratio
        return policy @ penalised

    recipe = repo(cost_critic_target="rectified", cost_on="all", margin=margin)
    expected = jax.jit(jax.grad(lagrangian))(logits)
    for values in ([0.0, 0.0], [1.3, -0.7]):
        found = expected_gradient(recipe, logits, reference, reward, cost, jnp.array(values))
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("critic", ["raw", "rectified"])
def test_the_switch_is_biased_by_the_critic_times_the_gradient_of_p_unsafe(critic):
    """Table 1.5, 2a/2b + 3a: ∇E{C}⁺ − V·∇P(unsafe) stands where ∇E{C}⁺ should."""
    logits, reference, reward, cost = table(1)
    value = 0.6
    exact = expected_gradient(
        repo(cost_critic_target="rectified", cost_on="all"),
        logits,
        reference,
        reward,
        cost,
        jnp.zeros(2),
    )
    switch = expected_gradient(
        repo(cost_critic_target=critic), logits, reference, reward, cost, jnp.array([0.0, value])
    )
    p_unsafe = jax.grad(lambda z: jax.nn.softmax(z) @ (cost > 0))(logits)
    np.testing.assert_allclose(switch - exact, 3.0 * value * p_unsafe, atol=1e-5)


def test_trajectory_balance_has_the_exact_gradient_on_policy():
    """(G−1)/G of the Lagrangian's gradient, enumerated over all groups of two."""
    logits, reference, reward, cost = (x[:3] for x in table(2))
    recipe = recipes.get(
        "repo_tb",
        group_size=2,
        kl=KL(coef=0.2),
        reference_share=0.0,
        constraint=Rectified(
            init_value=3.0, cost_critic_target="rectified", cost_on="all", normalise="none"
        ),
    )
    first, second = (i.reshape(-1) for i in jnp.meshgrid(jnp.arange(3), jnp.arange(3)))
    groups = jnp.stack([first, second], axis=1)  # [9, 2]
    log_reference = jax.nn.log_softmax(reference)[groups][..., None]
    base = every_response(logits, reference, reward, cost)
    rollouts = base.replace(
        prompts=jax.tree.map(lambda x: jnp.zeros((9, *x.shape[1:]), x.dtype), base.prompts),
        tokens=groups[..., None],
        mask=jnp.ones((9, 2, 1), bool),
        behaviour_log_probs=jnp.zeros((9, 2, 1)),
        reference_log_probs=log_reference,
        policy_version=jnp.zeros((9, 2, 1), jnp.int32),
        rewards={"reward": reward[groups]},
        costs={"cost": cost[groups]},
    )
    probability = jnp.prod(jax.nn.softmax(logits)[groups], axis=1)

    def one(z, i):
        picked = jax.tree.map(lambda x: x[i][None], rollouts)
        log_probs = jax.nn.log_softmax(z)[groups[i]][None, :, None]
        output = PolicyOutput(log_probs=log_probs, entropy=jnp.zeros_like(log_probs))
        state = recipe.init(1)
        return recipe.loss(state, picked, recipe.targets(state, picked, None), output)[0]

    per_group = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0)))(logits, jnp.arange(9))
    found = probability @ per_group

    def lagrangian(z):
        log_ratio = jax.nn.log_softmax(z) - jax.nn.log_softmax(reference)
        return jax.nn.softmax(z) @ (reward - 3.0 * jnp.maximum(cost, 0.0) - 0.2 * log_ratio)

    np.testing.assert_allclose(found, -0.5 * jax.grad(lagrangian)(logits), atol=1e-5)


# --------------------------------------------------------------------------------- errors


def test_an_unknown_name_or_field_lists_what_there_is():
    with pytest.raises(ValueError, match=r"unknown algorithm 'reppo'.*repo_tb"):
        recipes.get("reppo")
    with pytest.raises(ValueError, match=r"no field beta.*group_size"):
        recipes.get("repo", beta=0.1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rloo", {"constraint": Rectified()}, "normalise='unsafe' divides whole rewards"),
        ("rloo", {"group_size": 1}, "needs group_size ≥ 2"),
        ("rloo", {"reference_share": 0.5}, "bias ClippedSurrogate"),
        ("ppo", {"replay_share": 0.5}, "completions of old policies .* bias ClippedSurrogate"),
        ("rloo", {"kl": KL(placement="reward_and_cost")}, "needs a cost critic"),
        ("repo_tb", {"kl": KL(coef=0.0)}, "positive KL coefficient"),
        ("repo_tb", {"reference_share": 1.0}, "reference_share must lie in"),
        ("repo", {"constraint": Rectified(bound=10.0)}, "without critic"),
        ("repo", {"epochs": 0}, "at least 1"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        recipes.get(name, **changes)


def test_options_from_a_command_line_reach_every_part():
    text = {"max_value": "none", "rate": "0.2", "switch": "batch", "unsafe_reward": "false",
            "group_size": "4", "kl.placement": "reward_and_cost"}  # fmt: skip
    found = recipes.with_options(recipes.get("repo"), text)
    assert found.constraint == replace(
        recipes.get("repo").constraint,
        max_value=None, rate=0.2, switch="batch", unsafe_reward=False,
    )  # fmt: skip
    assert (found.group_size, found.kl.placement) == (4, "reward_and_cost")
    assert recipes.with_options(recipes.get("repo"), {}) == recipes.get("repo")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lambda", "3", r"repo has no option 'lambda'; it has: .*constraint.max_value"),
        ("max_value", "lots", "repo.max_value must be a number, or none, got 'lots'"),
        ("group_size", "2.5", "repo.group_size must be an integer, got '2.5'"),
        ("unsafe_reward", "perhaps", "must be true or false"),
        (
            "correction",
            "group",
            "repo.correction must be one of none, token, sequence, got 'group'",
        ),
        ("rectify", "batch", "repo.rectify must be one of sample, prompt, got 'batch'"),
        ("margin", "-1", "margin"),
    ],
)
def test_wrong_options_say_what_is_allowed(option, value, message):
    with pytest.raises(ValueError, match=message):
        recipes.with_options(recipes.get("repo"), {option: value})


def test_missing_critic_values_or_greedy_scores_are_named():
    repo_, remax = recipes.get("repo"), recipes.get("remax")
    rollouts, values, output = make(repo_)
    with pytest.raises(ValueError, match=r"heads \('reward', 'cost'\)"):
        repo_.targets(repo_.init(3), rollouts, None)
    targets = repo_.targets(repo_.init(3), rollouts, values)
    with pytest.raises(ValueError, match="the model gave no values"):
        repo_.loss(repo_.init(3), rollouts, targets, output.replace(values=None))
    with pytest.raises(ValueError, match="needs the scores of a greedy completion"):
        remax.targets(remax.init(3), make(remax)[0].replace(greedy=None), None)


# ---------------------------------------------------------------- schedules and stale samples


def test_the_kl_schedule_is_the_papers():
    """β_0(1 − (u−1)/T) + β_f(u−1)/T while u < T_stop, else β_f."""
    kl = recipes.get("tba").kl
    for update in (1, 2, 100, 499, 500, 501, 10_000):
        expected = 0.004
        if update < 500:
            expected = 0.012 * (1 - (update - 1) / 500) + 0.004 * (update - 1) / 500
        assert float(kl.at(update)) == pytest.approx(expected, rel=1e-5)
    assert kl.constant(0.1).at(3) == 0.1
    assert KL(coef=0.3).at(7) == 0.3


@pytest.mark.parametrize("name", ["tba", "ppo", "grpo", "remax"])
def test_a_schedule_reaches_every_update_without_compiling_again(name):
    """Update u of an annealed recipe has the loss of a constant one at β_u."""
    schedule = {"final_coef": 0.01, "anneal_steps": 3}
    plain = recipes.get(name)
    plain = replace(plain, group_size=min(plain.group_size, 4))
    annealed = replace(plain, kl=replace(plain.kl.constant(0.4), **schedule))
    rollouts, values, output = make(annealed)

    def step(recipe, state):
        state, _ = recipe.update(state, rollouts)
        targets = recipe.targets(state, rollouts, values, log_probs=output.log_probs)
        return state, recipe.loss(state, rollouts, targets, output)[0]

    jitted = jax.jit(partial(step, annealed))
    state = annealed.init(3)
    losses = []
    for update in range(1, 5):
        state, loss = jitted(state)
        constant = replace(plain, kl=plain.kl.constant(float(annealed.kl.at(update))))
        assert float(loss) == pytest.approx(float(step(constant, state)[1]), rel=1e-4, abs=1e-6)
        losses.append(float(loss))
    assert jitted._cache_size() == 1
    assert len(set(losses[:3])) == 3
    assert losses[2] == losses[3]


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo"])
def test_on_the_policys_own_samples_the_asynchronous_forms_are_the_plain_ones(name):
    plain, corrected = recipes.get(name), recipes.get(f"async_{name}")
    rollouts, values, output = make(plain)
    rollouts = rollouts.replace(behaviour_log_probs=output.log_probs)

    def loss(recipe, log_probs):
        state = recipe.init(3)
        targets = recipe.targets(state, rollouts, values, log_probs=output.log_probs)
        return recipe.loss(state, rollouts, targets, output.replace(log_probs=log_probs))

    gradient = partial(jax.value_and_grad, has_aux=True)
    (one, _), slope = gradient(partial(loss, plain))(output.log_probs)
    (other, metrics), other_slope = gradient(partial(loss, corrected))(output.log_probs)
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    np.testing.assert_allclose(slope, other_slope, atol=1e-7)
    assert float(metrics["importance_weight"]) == pytest.approx(1.0)
    assert float(metrics["beyond_cap"]) == 0.0


def test_asynchronous_rloo_is_unbiased_for_a_stale_behaviour_policy():
    """Without a cap: the gradient of E R − β·KL, enumerated over all groups of two by μ."""
    logits, reference, reward, behaviour = (x[:3] for x in table(3))
    recipe = recipes.get(
        "async_rloo",
        group_size=2,
        kl=KL(coef=0.2),
        objective=replace(recipes.get("async_rloo").objective, correction_cap=None),
    )
    groups = jnp.asarray([(i, j) for i in range(3) for j in range(3)])
    log_policy, log_mu = jax.nn.log_softmax(logits), jax.nn.log_softmax(behaviour)
    shape = (9, 2, 1)
    rollouts = Rollouts(
        prompts=Prompts(
            tokens=jnp.zeros((9, 1), jnp.int32),
            mask=jnp.ones((9, 1), bool),
            ids=jnp.zeros(9, jnp.int32),
        ),
        tokens=groups[..., None],
        mask=jnp.ones(shape, bool),
        behaviour_log_probs=log_mu[groups][..., None],
        reference_log_probs=jax.nn.log_softmax(reference)[groups][..., None],
        policy_version=jnp.zeros(shape, jnp.int32),
        rewards={"reward": reward[groups]},
        costs={"cost": jnp.zeros((9, 2))},
    )

    @jax.jit
    @jax.jacobian
    def per_group(z):
        state, before = recipe.init(1), log_policy[groups][..., None]
        targets = recipe.targets(state, rollouts, None, log_probs=before)
        log_probs = jax.nn.log_softmax(z)[groups][..., None]
        output = PolicyOutput(log_probs=log_probs, entropy=jnp.zeros(shape))
        # One loss a group.
        return jnp.stack(
            [
                recipe.loss(
                    state,
                    *jax.tree.map(
                        lambda x, i=i: x[i : i + 1] if x.ndim else x, (rollouts, targets)
                    ),
                    jax.tree.map(lambda x, i=i: x[i : i + 1], output),
                )[0]
                for i in range(9)
            ]
        )

    def objective(z):
        log_pi = jax.nn.log_softmax(z)
        return jnp.exp(log_pi) @ (reward - 0.2 * (log_pi - jax.nn.log_softmax(reference)))

    probability = jnp.exp(log_mu[groups].sum(axis=1))
    found = probability @ per_group(logits)
    np.testing.assert_allclose(found, -jax.grad(objective)(logits), atol=1e-5)


def test_stale_samples_need_the_policys_own_log_probabilities():
    recipe = recipes.get("async_grpo")
    rollouts, _, _ = make(recipe)
    with pytest.raises(ValueError, match="async_grpo weighs completions by the policy before"):
        recipe.targets(recipe.init(3), rollouts, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_coef": -1.0}, "final KL coefficient must not be negative"),
        ({"final_coef": 0.1}, "needs anneal_steps ≥ 1"),
        ({"final_coef": 0.1, "anneal_steps": 3, "stop_step": 9}, "stop_step between 1"),
    ],
)
def test_wrong_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KL(**options)


def test_a_schedule_to_zero_leaves_trajectory_balance_without_anchor():
    with pytest.raises(ValueError, match="positive KL coefficient"):
        recipes.get("tba", kl=KL(coef=0.1, final_coef=0.0, anneal_steps=5))
