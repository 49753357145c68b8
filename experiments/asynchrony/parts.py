"""The parts of one method's training."""

from dataclasses import dataclass
from typing import Any

from flax import nnx

from experiments.asynchrony.config import POLL_S, AsynchronyConfig, Method
from experiments.asynchrony.policies import Policy
from experiments.asynchrony.task import Task, no_cost
from jaxrl import sync
from jaxrl.actors import Actor, ActorConfig, PoolConfig, Threads
from jaxrl.learner import Learner, LearnerState, lm_apply, lm_optimizer
from jaxrl.models import ScalarModel
from jaxrl.replay import Replay
from jaxrl.rollouts import Collector, Scorer


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What synchronous and asynchronous training of a method are made of.

    Attributes:
      config: of the run.
      method: the method.
      task: what is learned.
      reference: the SFT policy.
      learner, collector, scorer: see `jaxrl.train.Trainer`.
      state: before the first update.
    """

    config: AsynchronyConfig
    method: Method
    task: Task
    reference: Policy
    learner: Learner
    collector: Collector
    scorer: Scorer
    state: LearnerState

    def replay(self) -> Replay:
        return Replay(self.config.replay(), seed=self.config.seed)

    def actors(self, store: sync.Store, run_id: str) -> Threads:
        """Actors that read their weights from a store."""

        def build(name: str) -> Actor:
            return Actor(
                name=name,
                collector=self.collector,
                scorer=self.scorer,
                prompts=self.task.train,
                reference=self.reference.params,
                subscriber=sync.Subscriber(
                    store, run_id=run_id, like=self.reference.params, name=name
                ),
                config=ActorConfig(poll_s=POLL_S),
            )

        # The simulator's actors, too, do one thing after the other.
        return Threads(self.method.actors, build, config=PoolConfig(score_beside=False))


def build(config: AsynchronyConfig, method: Method, task: Task, reference: Policy) -> Parts:
    """The parts of a method that starts from `reference`."""
    recipe = config.recipe(method)
    params: dict[str, Any] = {"policy": reference.params}
    critic_def = None
    if recipe.value_heads:
        decoder = config.model.decoder(
            task.tokenizer.vocab_size, config.prompt_len + config.completion_len
        )
        critic = ScalarModel(decoder, recipe.value_heads, rngs=nnx.Rngs(config.seed))
        # A critic that can read already learns faster: its trunk starts from the SFT policy.
        nnx.update(critic.trunk, reference.params)
        critic_def, params["critic"] = nnx.split(critic)
    learner = Learner(
        recipe=recipe,
        apply=lm_apply(reference.graphdef, critic_def, temperature=config.temperature),
        optimizer=lm_optimizer(config.optimizer_of(recipe)),
    )
    tokenizer = task.tokenizer
    return Parts(
        config=config,
        method=method,
        task=task,
        reference=reference,
        learner=learner,
        collector=Collector(
            graphdef=reference.graphdef,
            sampling=config.sampling(eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id),
            group_size=recipe.group_size,
            reference_completions=recipe.reference_samples,
            greedy=recipe.needs_greedy,
        ),
        scorer=Scorer(
            tokenizer=tokenizer,
            prompts=task.train,
            rewards={"reward": task.verify},
            costs={"cost": no_cost},
        ),
        state=learner.init(params, num_prompts=len(task.train)),
    )
