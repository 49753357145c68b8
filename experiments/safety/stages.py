"""The stages of a run: fine-tune, train with one algorithm, evaluate. Each one resumes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int64

from experiments.harness import Run
from experiments.safety import placement
from experiments.safety.config import SafetyConfig
from experiments.safety.policies import Policy as Policy
from experiments.safety.policies import initial_policy as initial_policy
from experiments.safety.policies import learned_part, trained_policy
from experiments.safety.task import Evaluators, Task
from jaxrl.checkpoint import Checkpointer
from jaxrl.constraints import Rectified
from jaxrl.data.batches import PromptSet, shuffled
from jaxrl.data.packing import PackedDemonstrations
from jaxrl.learner import Learner, LearnerState, lm_apply, lm_optimizer, lm_ptx
from jaxrl.models import ScalarModel
from jaxrl.processes import Preempted
from jaxrl.recipes import Recipe
from jaxrl.replay import RECTIFIED, Replay
from jaxrl.rollouts import Collector, Sampling
from jaxrl.supervised import Supervised, SupervisedState
from jaxrl.train import Scorer, Tape, Trainer
from sharding import Plan

HELDOUT = "heldout"
LOG_EVERY = 10  # SFT steps between rows of metrics


def _plan(config: SafetyConfig, params: Any) -> Plan:
    return placement.plan_of(placement.mesh_of(config.mesh), params)


def _resume(
    run: Run, stage: str, checkpoints: Checkpointer, state: Any, replay: Replay | None = None
) -> tuple[int, Any]:
    """The stage's newest good checkpoint, or where it starts; metrics and replay follow."""

    def template(metadata: Mapping[str, Any]) -> Any:
        if replay is None:
            return state
        return {"state": state, "replay": Replay.template(metadata["replay"])}

    found = checkpoints.restore_latest(template)
    step = 0 if found is None else found.step
    if found is not None and replay is None:
        state = found.tree
    elif found is not None and replay is not None:
        replay.load({"arrays": found.tree["replay"], "metadata": found.metadata["replay"]})
        state = found.tree["state"]
    run.rewind(stage, step)
    return step, state


def _save(checkpoints: Checkpointer, step: int, state: Any, replay: Replay | None) -> None:
    if replay is None:
        checkpoints.save(step, state)
        return
    kept = replay.state_dict()
    tree = {"state": state, "replay": kept["arrays"]}
    checkpoints.save(step, tree, metadata={"replay": kept["metadata"]})


def fine_tune(run: Run, config: SafetyConfig, task: Task) -> Policy:
    """SFT: what every algorithm starts from, and its frozen reference."""
    policy, demos = initial_policy(config, task), task.demonstrations
    total = config.sft.steps
    if not total:  # a pretrained model, which lies where it should
        return policy
    trainer = Supervised(
        graphdef=policy.graphdef,
        optimizer=config.sft.optimizer().build(),
        plan=_plan(config, policy.params),
    )
    packed = PackedDemonstrations(demonstrations=demos, width=config.sft.pack, seed=config.seed)

    def update(state: SupervisedState, step: int) -> tuple[SupervisedState, Float32[Array, ""]]:
        if config.sft.pack:
            return trainer.update_packed(state, packed.take(step, config.sft.batch))
        rows = shuffled(len(demos), config.sft.batch, seed=config.seed, step=step)
        return trainer.update(state, *demos.take(rows))

    with Checkpointer(run.checkpoints / "sft") as checkpoints:
        start, state = _resume(run, "sft", checkpoints, trainer.init(policy.params))
        with run.progress("sft", total, start=start) as bar:
            for step in range(start, total):
                state, loss = update(state, step)
                done = step + 1
                if done % LOG_EVERY == 0 or done == total:
                    metrics = {"loss": float(loss)}
                    if not math.isfinite(metrics["loss"]):
                        raise ValueError(
                            f"the loss of SFT must be finite: it is {metrics['loss']} at step "
                            f"{done}; lower --sft.learning-rate and choose another --out"
                        )
                    run.log("sft", done, metrics)
                    bar.update(done, metrics)
                stopping = run.preempted()
                if done % (config.checkpoint_every * 5) == 0 or done == total or stopping:
                    checkpoints.save(done, state)
                if stopping:
                    raise Preempted(f"after step {done} of sft")
    return replace(policy, params=state.params)


def sampling(config: SafetyConfig, task: Task) -> Sampling:
    return config.sampling(eos_id=task.tokenizer.eos_id, pad_id=task.tokenizer.pad_id)


def train(
    run: Run,
    config: SafetyConfig,
    task: Task,
    evaluators: Evaluators,
    recipe: Recipe,
    reference: Policy,
) -> Policy:
    """Trains the SFT policy with one recipe."""
    trainer = trainer_of(run, config, task, evaluators, recipe, reference)
    state = initial_state(config, trainer.learner, task, reference)
    with Checkpointer(run.checkpoints / recipe.name) as checkpoints:
        start, state = _resume(run, recipe.name, checkpoints, state, trainer.replay)
        with run.progress(recipe.name, config.steps, start=start) as bar:
            updates = trainer.run(state, start=start, steps=config.steps)
            for done, state, metrics, refusal in run.each_profiled(updates):
                run.log(recipe.name, done, metrics)
                bar.update(done, metrics)
                if refusal is not None:
                    path = run.write_samples(f"refused-{recipe.name}-{done}", refusal.rows)
                    bar.note(f"step {done}: {refusal} (rows in {path})")
                stopping = run.preempted()
                if done % config.checkpoint_every == 0 or done == config.steps or stopping:
                    _save(checkpoints, done, state, trainer.replay)
                if stopping:
                    raise Preempted(f"after step {done} of {recipe.name}")
    return trained_policy(run, config, recipe, reference, state)


def trainer_of(
    run: Run,
    config: SafetyConfig,
    task: Task,
    evaluators: Evaluators,
    recipe: Recipe,
    reference: Policy,
) -> Trainer:
    """The parts of a run of one recipe that starts from `reference`."""
    part, critic_def = learned_part(config, reference), None
    shapes: dict[str, Any] = {"policy": part.reference}
    if recipe.value_heads:
        critic_def, shapes["critic"] = nnx.split(
            nnx.eval_shape(lambda: _critic(config, reference, recipe))
        )
    plan = _plan(config, shapes)
    reference_params, frozen, replay = part.reference, part.frozen, _replay(config, recipe)
    if plan.mesh:
        reference_params = plan.bind().place({"policy": reference_params})["policy"]
        frozen = None if frozen is None else plan.bind().place({"policy": frozen})["policy"]
    return Trainer(
        learner=Learner(
            recipe=recipe,
            apply=lm_apply(part.graphdef, critic_def, temperature=config.temperature),
            optimizer=lm_optimizer(config.optimizer_of(recipe)),
            ptx=lm_ptx(part.graphdef),
            ptx_coef=config.ptx_coef,
            plan=plan,
            frozen={} if frozen is None else {"policy": frozen},
        ),
        collector=Collector(
            graphdef=part.graphdef,
            sampling=sampling(config, task),
            frozen=frozen,
            plan=plan,
            group_size=recipe.group_size,
            reference_completions=recipe.reference_samples,
            greedy=recipe.needs_greedy,
        ),
        scorer=Scorer(
            tokenizer=task.tokenizer,
            prompts=task.train,
            rewards={"reward": evaluators.reward},
            costs={"cost": evaluators.cost},
        ),
        prompts=task.train,
        prompts_per_step=recipe.fresh_prompts(config.samples_per_step // recipe.group_size),
        reference=reference_params,
        seed=config.seed,
        sampler_tolerance=config.sampler_tolerance,
        demonstrations=task.ptx,
        replay=replay,
        prompts_per_update=None if replay is None else config.samples_per_step // recipe.group_size,
        tape=None if config.tape is None else Tape(config.tape / recipe.name),
        span=run.span,
    )


def _replay(config: SafetyConfig, recipe: Recipe) -> Replay | None:
    if not recipe.replay_share:
        return None
    margin = recipe.constraint.margin if isinstance(recipe.constraint, Rectified) else 0.0
    return Replay(replace(RECTIFIED, margin=margin), seed=config.seed)


def _critic(config: SafetyConfig, reference: Policy, recipe: Recipe) -> ScalarModel:
    return ScalarModel(reference.decoder, recipe.value_heads, rngs=nnx.Rngs(config.seed))


def initial_state(
    config: SafetyConfig, learner: Learner, task: Task, reference: Policy
) -> LearnerState:
    """The state before the first update: the policy is the reference, its critic reads like it."""
    params: dict[str, Any] = {"policy": learned_part(config, reference).params}
    if learner.recipe.value_heads:
        critic = _critic(config, reference, learner.recipe)
        # A critic that can read already learns faster: its trunk starts from the SFT policy.
        nnx.update(critic.trunk, reference.params)
        params["critic"] = nnx.state(critic)
    return learner.init(params, num_prompts=len(task.train))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a policy wrote for a set of prompts, N × S.

    Attributes:
      rows: of the prompts within their set.
      rewards: of the reward that was optimised.
      costs: of the judge.
      refusals: whether the completion declines.
      kl: log-ratio of each completion to the reference policy, in nats.
      completions: the texts, N lists of S.
    """

    rows: Int64[np.ndarray, " N"]
    rewards: Float32[np.ndarray, "N S"]
    costs: Float32[np.ndarray, "N S"]
    refusals: Bool[np.ndarray, "N S"]
    kl: Float32[np.ndarray, "N S"]
    completions: list[list[str]]

    def arrays(self) -> Mapping[str, np.ndarray]:
        return {
            name: getattr(self, name) for name in ("rows", "rewards", "costs", "refusals", "kl")
        }


def evaluated_rows(prompts: PromptSet, at_most: int) -> np.ndarray:
    """Which prompts of a set are evaluated: spread over it, since sets are ordered by kind."""
    count = min(len(prompts), at_most or len(prompts))
    return np.linspace(0, len(prompts) - 1, count).round().astype(np.int64)


def evaluate_all(
    config: SafetyConfig,
    task: Task,
    evaluators: Evaluators,
    policy: Policy,
    reference: Policy,
) -> dict[str, Evaluation]:
    """Evaluations on the held-out prompts and on every further set, by the name of the set."""
    settings = config.evaluation
    found = {
        HELDOUT: evaluate(
            config, task, evaluators, policy, reference, task.heldout,
            at_most=settings.prompts, samples=settings.samples,
        )
    }  # fmt: skip
    for name, prompts in task.extra.items():
        found[name] = evaluate(
            config, task, evaluators, policy, reference, prompts,
            at_most=settings.extra_prompts, samples=settings.extra_samples,
        )  # fmt: skip
    return found


def evaluate(
    config: SafetyConfig,
    task: Task,
    evaluators: Evaluators,
    policy: Policy,
    reference: Policy,
    prompts: PromptSet,
    *,
    at_most: int,
    samples: int,
) -> Evaluation:
    """Samples and scores completions of a set of prompts; a function of the seed.

    Every policy is sampled with the same keys, so that differences between two of them are
    paired.
    """
    batch, chosen = config.evaluation.batch, evaluated_rows(prompts, at_most)
    count = len(chosen)
    plan = _plan(config, policy.params)
    collector = Collector(
        graphdef=policy.graphdef, sampling=sampling(config, task), group_size=samples, plan=plan
    )
    scorer = Scorer(tokenizer=task.tokenizer, prompts=prompts, rewards={}, costs={})
    root = jax.random.key(config.seed + 1_000_003)  # apart from the keys of training
    tokens, kl = [], []
    for index, begin in enumerate(range(0, count, batch)):
        # The last batch is filled up, so that all have one shape and compile once.
        rows = chosen[np.minimum(np.arange(begin, begin + batch), count - 1)]
        key = jax.random.fold_in(root, index)
        rollouts, _ = collector.collect(policy.params, reference.params, prompts.take(rows), key, 0)
        log_ratio = rollouts.behaviour_log_probs - rollouts.reference_log_probs
        tokens.append(np.asarray(rollouts.tokens))
        kl.append(np.asarray(log_ratio.sum(-1)))
    tokens, kl = np.concatenate(tokens)[:count], np.concatenate(kl)[:count]
    asked, written = scorer.texts(chosen, tokens)

    def score(function, dtype) -> np.ndarray:
        return np.asarray(function(asked, written), dtype).reshape(count, samples)

    return Evaluation(
        rows=chosen,
        rewards=score(evaluators.reward, np.float32),
        costs=score(evaluators.judge, np.float32),
        refusals=score(evaluators.is_refusal, bool),
        kl=kl.astype(np.float32),
        completions=[written[i : i + samples] for i in range(0, len(written), samples)],
    )
