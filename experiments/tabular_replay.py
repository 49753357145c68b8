"""`experiments.tabular` with a replay: few completions are written anew, the others come again."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from experiments import tabular
from experiments.cmdp import CMDP
from experiments.tabular import Learner, Schedule, World
from jaxrl.constraints import Rectified
from jaxrl.recipes import Recipe
from jaxrl.replay import RECTIFIED, Replay, ReplayConfig
from jaxrl.types import Rollouts


def rate(kl_coef: float) -> float:
    """½/β, half of the step after which a group of distinct completions meets its target.

    A group moves D = R' − β·log(π/π_ref) of a member that is in it n times by α·β·n·(D̄ − D):
    α·β·n = 1 is an exact projection and 2 the end of stability. The half leaves room for a
    completion that comes twice, where fewer than G distinct ones are known.
    """
    return 0.5 / kl_coef


def train(
    recipe: Recipe,
    cmdps: Sequence[CMDP],
    seeds: Sequence[int],
    *,
    schedule: Schedule,
    config: ReplayConfig = RECTIFIED,
    chunks: int = 20,
) -> Iterator[tuple[int, Learner]]:
    """Trains one table for each CMDP and yields (step, state) `chunks` times.

    Of the `schedule.samples` of an update a share of 1 − `recipe.replay_share` is written anew.

    Raises:
      ValueError: see `tabular.prepared`.
    """
    recipe, worlds, learners = tabular.prepared(recipe, cmdps, seeds, schedule=schedule)
    prompts = max(1, schedule.samples // recipe.group_size)
    fresh = recipe.fresh_prompts(prompts) * recipe.group_size
    writing = replace(schedule, samples=fresh)
    if isinstance(recipe.constraint, Rectified):
        config = replace(config, margin=recipe.constraint.margin)
    replays = [Replay(config, seed=seed) for seed in seeds]
    every = max(1, schedule.steps // chunks)
    for step in range(schedule.steps):
        learners, written = _write(recipe, writing, worlds, learners)
        host = jax.device_get(written)
        batches = []
        for index, replay in enumerate(replays):
            replay.add(jax.tree.map(lambda x, i=index: x[i], host), step)
            batches.append(replay.sample(prompts, recipe.group_size, step))
        batch = jax.tree.map(lambda *xs: np.stack(xs), *batches)
        learners = _update(recipe, schedule, learners, batch)
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            yield step + 1, learners


@partial(jax.jit, static_argnums=(0, 1))
def _write(
    recipe: Recipe, schedule: Schedule, worlds: World, learners: Learner
) -> tuple[Learner, Rollouts]:
    """Fresh completions of every seed."""

    def one(world: World, learner: Learner) -> tuple[Learner, Rollouts]:
        key, rollout_key = jax.random.split(learner.key)
        written = tabular.roll_out(
            recipe, schedule, world, learner.params, rollout_key, learner.step
        )
        return replace(learner, key=key), written

    return jax.vmap(one)(worlds, learners)


@partial(jax.jit, static_argnums=(0, 1))
def _update(recipe: Recipe, schedule: Schedule, learners: Learner, batch: Rollouts) -> Learner:
    return jax.vmap(partial(tabular.update, recipe, schedule))(learners, batch)
