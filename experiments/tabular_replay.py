"""`experiments.tabular` with a replay: few completions are written anew, the others come again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import numpy as np

from experiments import tabular
from experiments.cmdp import CMDP
from experiments.tabular import Learner, Schedule, World
from jaxrl.recipes import Recipe
from jaxrl.replay import Replay, ReplayConfig
from jaxrl.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """How an update's batch is made up.

    Attributes:
      fresh: completions written for each update, the reference policy's included; they are
        added to the replay, from which the batch of `Schedule.samples` is drawn.
      config: of the replay.
    """

    fresh: int = 16
    config: ReplayConfig = field(default_factory=ReplayConfig)

    def __post_init__(self) -> None:
        if self.fresh < 1:
            raise ValueError(f"an update needs at least one fresh completion: {self.fresh=}")


def train(
    recipe: Recipe,
    cmdps: Sequence[CMDP],
    seeds: Sequence[int],
    *,
    schedule: Schedule,
    plan: ReplayPlan,
    every: int,
) -> Iterator[tuple[int, Learner]]:
    """Trains one table for each CMDP and yields (step, state) after every `every` steps.

    Raises:
      ValueError: a recipe whose objective is biased by replayed completions; see also
        `tabular.prepared`.
    """
    if not recipe.off_policy:
        raise ValueError(
            f"replayed completions bias the objective of {recipe.name}; use trajectory balance"
        )
    recipe, worlds, learners = tabular.prepared(recipe, cmdps, seeds, schedule=schedule)
    writing = replace(schedule, samples=plan.fresh)
    replays = [Replay(plan.config, seed=seed) for seed in seeds]
    prompts = max(1, schedule.samples // recipe.group_size)
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
