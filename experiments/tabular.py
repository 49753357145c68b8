"""Trains a table of logits on a `CMDP` with any recipe: the code of the language model, T = 1.

The recipe sees what it would see of a language model: prompts, sampled responses, their
log-probabilities, rewards and costs. It never sees the table.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.cmdp import CMDP
from jaxrl.objectives import TrajectoryBalance
from jaxrl.recipes import Recipe, State
from jaxrl.types import REFERENCE_VERSION, PolicyOutput, Prompts, Rollouts

Params = Any  # {"logits": [M, K], "values": [M, H] where there is a critic}
World = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a table learns.

    Attributes:
      steps: updates.
      samples: completions per update, the reference policy's included.
      rate: change of a logit per sample and unit of advantage.
      critic_rate: share of its error that a value loses per sample.
    """

    steps: int = 6000
    samples: int = 64
    rate: float = 1.0
    critic_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 1:
            raise ValueError(
                f"steps and samples must be at least 1: {self.steps=}, {self.samples=}"
            )
        if self.rate <= 0.0 or self.critic_rate <= 0.0:
            raise ValueError(f"rates must be positive: {self.rate=}, {self.critic_rate=}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Learner:
    """The whole training state of one seed."""

    params: Params
    optimiser: Any
    multipliers: State
    key: PRNGKeyArray
    step: Int[Array, ""]


def start(recipe: Recipe, schedule: Schedule, world: World, key: PRNGKeyArray) -> Learner:
    """The state before the first step: policy = reference, values 0."""
    logits = world["reference_logits"]
    params = {"logits": logits}
    if recipe.value_heads:
        params["values"] = jnp.zeros((logits.shape[0], len(recipe.value_heads)))
    return Learner(
        params=params,
        optimiser=_optimiser(recipe, schedule).init(params),
        multipliers=recipe.init(logits.shape[0]),
        key=key,
        step=jnp.zeros((), jnp.int32),
    )


def _optimiser(recipe: Recipe, schedule: Schedule) -> optax.GradientTransformation:
    """SGD; rates are per sample, losses are means over samples."""
    transforms: dict[Hashable, Any] = {"logits": optax.sgd(schedule.rate * schedule.samples)}
    if recipe.value_heads:
        transforms["values"] = optax.sgd(schedule.critic_rate * schedule.samples)
    return optax.multi_transform(transforms, lambda params: {name: name for name in params})


def apply(params: Params, rollouts: Rollouts) -> PolicyOutput:
    """What the table says of sampled responses."""
    ids = rollouts.prompts.ids
    log_policy = jax.nn.log_softmax(params["logits"][ids])  # [B, K]
    log_probs = jnp.take_along_axis(log_policy, rollouts.tokens[..., 0], axis=1)[..., None]
    entropy = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=1)
    values = None
    if "values" in params:
        heads = params["values"][ids]  # [B, H]
        values = jnp.broadcast_to(heads[:, None, None], (*log_probs.shape, heads.shape[-1]))
    return PolicyOutput(
        log_probs=log_probs,
        entropy=jnp.broadcast_to(entropy[:, None, None], log_probs.shape),
        values=values,
    )


def roll_out(
    recipe: Recipe,
    schedule: Schedule,
    world: World,
    params: Params,
    key: PRNGKeyArray,
    version: Int[Array, ""] | int = 0,
) -> Rollouts:
    """Samples prompts and a group of responses to each; the key is consumed."""
    count = max(1, schedule.samples // recipe.group_size)
    prompts_key, policy_key, reference_key = jax.random.split(key, 3)
    total = world["reward"].shape[0]
    if count <= total:
        ids = jax.random.permutation(prompts_key, total)[:count]
    else:
        ids = jax.random.randint(prompts_key, (count,), 0, total)
    by_reference = recipe.reference_samples
    by_policy = recipe.group_size - by_reference
    logits, reference = params["logits"][ids], world["reference_logits"][ids]
    tokens = jnp.concatenate(
        [_sample(policy_key, logits, by_policy), _sample(reference_key, reference, by_reference)],
        axis=1,
    )
    policy_log_probs = _look_up(jax.nn.log_softmax(logits), tokens)
    reference_log_probs = _look_up(jax.nn.log_softmax(reference), tokens)
    from_reference = jnp.arange(recipe.group_size) >= by_policy
    greedy = None
    if recipe.needs_greedy:
        best = jnp.argmax(logits, axis=1)
        greedy = {"reward": world["reward"][ids, best], "cost": world["cost"][ids, best]}
    mask = jnp.ones((*tokens.shape, 1), bool)
    versions = jnp.where(from_reference, REFERENCE_VERSION, version)
    return Rollouts(
        prompts=Prompts(tokens=ids[:, None], mask=jnp.ones((count, 1), bool), ids=ids),
        tokens=tokens[..., None],
        mask=mask,
        behaviour_log_probs=jnp.where(from_reference, reference_log_probs, policy_log_probs)[
            ..., None
        ],
        reference_log_probs=reference_log_probs[..., None],
        policy_version=jnp.broadcast_to(versions[:, None], mask.shape).astype(jnp.int32),
        rewards={"reward": _look_up(world["reward"][ids], tokens)},
        costs={"cost": _look_up(world["cost"][ids], tokens)},
        greedy=greedy,
    )


def _sample(key: PRNGKeyArray, logits: Float[Array, "B K"], count: int) -> Int[Array, "B {count}"]:
    noise = jax.random.gumbel(key, (logits.shape[0], count, logits.shape[1]))
    return jnp.argmax(logits[:, None] + noise, axis=-1).astype(jnp.int32)


def _look_up(table: Float[Array, "B K"], tokens: Int[Array, "B G"]) -> Float[Array, "B G"]:
    return jnp.take_along_axis(table, tokens, axis=1)


def step(recipe: Recipe, schedule: Schedule, world: World, learner: Learner) -> Learner:
    """One rollout, its updates, and the multiplier's step."""
    key, rollout_key = jax.random.split(learner.key)
    rollouts = roll_out(recipe, schedule, world, learner.params, rollout_key, learner.step)
    return update(recipe, schedule, replace(learner, key=key), rollouts)


def update(recipe: Recipe, schedule: Schedule, learner: Learner, rollouts: Rollouts) -> Learner:
    """The multiplier's step, and the updates on one batch of rollouts."""
    multipliers, _ = recipe.update(learner.multipliers, rollouts)  # before the update (safe-rlhf)
    before = apply(learner.params, rollouts)
    targets = recipe.targets(multipliers, rollouts, before.values, log_probs=before.log_probs)
    optimiser = _optimiser(recipe, schedule)
    params, state = learner.params, learner.optimiser
    for _ in range(recipe.epochs):
        gradient, _ = jax.grad(
            lambda p: recipe.loss(multipliers, rollouts, targets, apply(p, rollouts)), has_aux=True
        )(params)
        updates, state = optimiser.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return replace(
        learner, params=params, optimiser=state, multipliers=multipliers, step=learner.step + 1
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _advance(
    recipe: Recipe, schedule: Schedule, count: int, worlds: World, learners: Learner
) -> Learner:
    """`count` steps of every seed at once."""

    def one(world: World, learner: Learner) -> Learner:
        body = lambda state, _: (step(recipe, schedule, world, state), None)  # noqa: E731
        return jax.lax.scan(body, learner, None, length=count)[0]

    return jax.vmap(one)(worlds, learners)


def train(
    recipe: Recipe,
    cmdps: Sequence[CMDP],
    seeds: Sequence[int],
    *,
    schedule: Schedule,
    chunks: int = 20,
) -> Iterator[tuple[int, Learner]]:
    """Trains one table for each CMDP, all at once, and yields (step, state) `chunks` times.

    The instance's β takes the place of the recipe's.

    Raises:
      ValueError: the instances do not share β, or one seed is not given for each.
    """
    recipe, worlds, learners = prepared(recipe, cmdps, seeds, schedule=schedule)
    size = max(1, schedule.steps // chunks)
    done = 0
    while done < schedule.steps:
        count = min(size, schedule.steps - done)
        learners = _advance(recipe, schedule, count, worlds, learners)
        done += count
        yield done, learners


def prepared(
    recipe: Recipe, cmdps: Sequence[CMDP], seeds: Sequence[int], *, schedule: Schedule
) -> tuple[Recipe, World, Learner]:
    """The recipe with the instances' β, and the worlds and first states of all seeds, stacked."""
    if len(cmdps) != len(seeds):
        raise ValueError(f"one seed for each instance: {len(cmdps)} instances, {len(seeds)} seeds")
    recipe = at_kl(recipe, cmdps)
    worlds = jax.tree.map(lambda *tables: jnp.stack(tables), *(as_world(c) for c in cmdps))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    learners = jax.vmap(lambda w, k: start(recipe, schedule, w, k))(worlds, keys)
    return recipe, worlds, learners


def at_kl(recipe: Recipe, cmdps: Sequence[CMDP]) -> Recipe:
    """The recipe with the instance's β in place of its own, and a loss in reward units.

    Steps are sizes per unit of advantage; the published scale of trajectory balance would make
    them 2/β times as long.
    """
    coefs = {c.kl_coef for c in cmdps}
    if len(coefs) != 1:
        raise ValueError(f"the instances of one run must share β: {sorted(coefs)}")
    objective = recipe.objective
    if isinstance(objective, TrajectoryBalance):
        objective = replace(objective, scale="reward")
    return replace(recipe, kl=recipe.kl.constant(coefs.pop()), objective=objective)


def as_world(cmdp: CMDP) -> World:
    """The tables that rollouts draw from, as float32."""
    tables: Mapping[str, np.ndarray] = {
        "reference_logits": cmdp.reference_logits,
        "reward": cmdp.reward,
        "cost": cmdp.cost,
    }
    return {name: jnp.asarray(table, jnp.float32) for name, table in tables.items()}


def policies(learners: Learner) -> Float[np.ndarray, "S M K"]:
    """The tables' policies, in float64."""
    logits = np.asarray(learners.params["logits"], np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def multipliers(learner: Learner) -> Float[np.ndarray, " S"]:
    """λ of each seed; the mean over prompts where each has its own."""
    value = np.asarray(learner.multipliers.value, np.float64)
    return value.reshape(value.shape[0], -1).mean(axis=1)
