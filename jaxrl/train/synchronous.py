"""The synchronous loop: prompts → rollouts → rewards, costs → update, one step after another.

Under `jax.distributed` every process runs it, with the same prompts and keys in the same order. A
step's rollouts are written by all devices together and then whole in every process; each scores
its share of them, so that a score is computed once, and all have the same numbers.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import learner as learner_lib
from jaxrl import processes
from jaxrl.data.batches import Demonstrations, PromptSet, shuffled
from jaxrl.learner import Learner, LearnerState
from jaxrl.replay import Replay
from jaxrl.rollouts import Collector, NonFiniteScores, Scorer, Scores
from jaxrl.train.metrics import summarise
from jaxrl.train.tape import Tape
from jaxrl.types import Rollouts

Span = Callable[[str], AbstractContextManager[None]]


def no_span(_: str) -> AbstractContextManager[None]:
    """A `Span` that names nothing."""
    return contextlib.nullcontext()


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """All parts of a synchronous run.

    Attributes:
      learner: updates the policy.
      collector: writes rollouts.
      scorer: rewards and costs.
      prompts: the training set.
      prompts_per_step: B.
      reference: parameters of the frozen reference policy.
      seed: of the order of the prompts and of all sampling.
      sampler_tolerance: largest honest difference between the sampler's and the trainer's
        log-probability of one token, in nats; beyond it the alarm is raised.
      max_refused: steps in a row that may be refused for scores that are not finite, or skipped
        for gradients that are not; one more and the run stops, since something is broken.
      demonstrations: what the learner's `ptx` loss imitates, as many a step as completions.
      replay: where given, each step's rollouts go into it and the update's are drawn from it;
        `Replay.state_dict` then belongs into the checkpoint.
      prompts_per_update: B of an update drawn from `replay`; `prompts_per_step` where None.
      replay_group_size: K of an update drawn from `replay`, where S completions of each prompt are
        written; S where None.
      tape: where given, a step whose rollouts it holds uses those, and others are recorded.
      span: names the parts of a step for a timeline.
    """

    learner: Learner
    collector: Collector
    scorer: Scorer
    prompts: PromptSet
    prompts_per_step: int
    reference: Any
    seed: int
    sampler_tolerance: float = 1e-2
    max_refused: int = 3
    demonstrations: Demonstrations | None = None
    replay: Replay | None = None
    prompts_per_update: int | None = None
    replay_group_size: int | None = None
    tape: Tape | None = None
    span: Span = field(default=no_span)

    def __post_init__(self) -> None:
        if self.replay is None and (self.prompts_per_update or self.replay_group_size):
            raise ValueError(
                "prompts_per_update and replay_group_size are of what is drawn from a replay: give "
                f"one, or set prompts_per_step: {self.prompts_per_update=}, "
                f"{self.replay_group_size=}"
            )

    def rollout(self, state: LearnerState, step: int) -> Rollouts:
        """Scored rollouts of step `step`; a function of the state, the seed and the step.

        Raises:
          NonFiniteScores: see `Scorer.score`.
        """
        recorded = None if self.tape is None else self.tape.read(step)
        if recorded is not None:
            return recorded
        rollouts = self._written(state, step)
        if self.tape is not None:
            self.tape.write(step, rollouts)
        return rollouts

    def _written(self, state: LearnerState, step: int) -> Rollouts:
        rows = shuffled(len(self.prompts), self.prompts_per_step, seed=self.seed, step=step)
        # One root for every run, folded with the step: no two rollouts share a key.
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        with self.span("rollout"), self.learner.context():
            rollouts, greedy = self.collector.collect(
                state.params["policy"], self.reference, self.prompts.take(rows), key, state.step
            )
            jax.block_until_ready(rollouts.tokens)
        with self.span("scoring"):
            return self.scorer(rollouts, greedy, score=self._score)

    def _score(self, ids: np.ndarray, tokens: np.ndarray) -> tuple[Scores, Scores]:
        """`Scorer.score`, of which every process does its share of the prompts."""
        if jax.process_count() == 1:
            return self.scorer.score(ids, tokens)
        share = -(-len(ids) // jax.process_count())
        mine = np.arange(jax.process_index() * share, (jax.process_index() + 1) * share)
        mine = np.minimum(mine, len(ids) - 1)  # the last shares may repeat the last row
        failure, scores = None, None
        try:
            scores = self.scorer.unchecked(ids[mine], tokens[mine])
        except Exception as error:  # whatever it is, the others must not wait for these scores
            failure = error
        if processes.anywhere(failure is not None):
            raise failure or ScoringFailed()
        scores = jax.tree.map(lambda x: x[: len(ids)], processes.concatenated(scores))
        self.scorer.check(ids, tokens, *scores)
        return scores

    def run(
        self, state: LearnerState, *, start: int, steps: int
    ) -> Iterator[tuple[int, LearnerState, dict[str, float], NonFiniteScores | None]]:
        """Trains from step `start` up to `steps`.

        Yields:
          (steps done, state, metrics, refusal) after each step. A step whose scores are not
          finite leaves the state alone and yields why. The yielded state is donated to the
          next step: copy what must outlive it.

        Raises:
          NonFiniteScores: more than `max_refused` steps in a row were refused.
          NonFiniteUpdates: more than `max_refused` steps in a row were skipped.
          SamplerDrift: the sampler's log-probabilities are not the learner's.
        """
        refused = skipped = 0
        for step in range(start, steps):
            try:
                rollouts = self.rollout(state, step)
            except NonFiniteScores as error:
                refused += 1
                if refused > self.max_refused:
                    raise
                yield step + 1, state, {"refused": 1.0}, error
                continue
            refused = 0
            with self.span("update"):
                batch = self._batch(rollouts, step)
                demonstrations = imitated(
                    self.demonstrations, batch.mask.shape, seed=self.seed, step=step
                )
                state, metrics = self.learner.update(state, batch, demonstrations)
                summary = summarise(rollouts, metrics)
            self._check_sampler(summary, step)
            skipped = skipped + 1 if summary["skipped"] else 0
            if skipped > self.max_refused:
                raise NonFiniteUpdates(skipped, step)
            yield step + 1, state, summary, None

    def _batch(self, rollouts: Rollouts, step: int) -> Rollouts:
        """What the update learns from: the step's rollouts, or what the replay draws."""
        if self.replay is None:
            return rollouts
        self.replay.add(rollouts, step)
        prompts = self.prompts_per_update or self.prompts_per_step
        group = self.replay_group_size or self.collector.group_size
        drawn = self.replay.sample(prompts, group, step)
        return jax.tree.map(jnp.asarray, drawn)

    def _check_sampler(self, metrics: Mapping[str, float], step: int) -> None:
        if metrics["sampler_gap"] > self.sampler_tolerance:
            raise SamplerDrift(metrics["sampler_gap"], self.sampler_tolerance, step)


def imitated(
    demonstrations: Demonstrations | None, shape: tuple[int, ...], *, seed: int, step: int
) -> learner_lib.Demonstrations | None:
    """The demonstrations of a step: as many as completions, in shape [B, G, T] of the rollouts."""
    if demonstrations is None:
        return None
    rows = shuffled(len(demonstrations), shape[0] * shape[1], seed=seed, step=step)
    return demonstrations.take(rows)


class ScoringFailed(RuntimeError):
    """Another process could not score its share of the rollouts; its own error says why."""


class NonFiniteUpdates(ValueError):
    """Step after step the loss or its gradient is not finite, so that nothing is learned."""

    def __init__(self, count: int, step: int):
        super().__init__(
            f"loss and gradients must be finite: those of the {count} steps up to step {step} are "
            "not; each was skipped and the state is that before them; lower the learning rate or "
            "look at the rewards and costs of these steps"
        )


class SamplerDrift(ValueError):
    """The sampler's log-probabilities are not the trainer's: its weights differ."""

    def __init__(self, gap: float, tolerance: float, step: int):
        super().__init__(
            "sampler and trainer must agree on the log-probability of every token: they differ "
            f"by {gap:.3g} nats at step {step}, tolerated are {tolerance:.3g}; check that the "
            "sampler has the newest weights, the same temperature and the same compute dtype, "
            "or raise sampler_tolerance"
        )
