"""The asynchronous loop: actors write and score; the learner updates and publishes its weights.

hand out items ─► actors ─► take what is acknowledged ─► (replay) ─► update ─► publish
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.actors import Pool, Refusal, Result, RolloutChecks
from jaxrl.data.batches import Demonstrations
from jaxrl.learner import Learner, LearnerState
from jaxrl.replay import Replay
from jaxrl.sync import Published, Publisher
from jaxrl.train.intake import Intake
from jaxrl.train.synchronous import (
    NonFiniteUpdates,
    SamplerDrift,
    Span,
    imitated,
    no_span,
    summarise,
)
from jaxrl.types import Rollouts

Step = tuple[int, LearnerState, dict[str, float], list[Refusal]]


class TooManyRefusals(ValueError):
    """Item after item is refused: something is broken."""

    def __init__(self, count: int, last: Refusal):
        super().__init__(
            f"rollouts must be fit to train on: {count} items in a row were refused, the last "
            f"({last.reason}) with: {last.detail}"
        )


class Stalled(TimeoutError):
    """Nothing came from the actors for too long."""


@dataclass(kw_only=True, eq=False)
class AsynchronousTrainer:
    """All parts of an asynchronous run, and how far it is.

    With `max_staleness=0` and `sync_every=1` it computes what `Trainer` computes, bit for bit;
    with `max_staleness=1` generation of the next batch overlaps the update (one-step off-policy);
    N actors are all busy from `max_staleness=N` on.

    Attributes:
      learner: updates the policy.
      pool: the actors; started and closed by `run`.
      publisher: of the policy's weights.
      checks: what rollouts must look like; holds the training set.
      prompts_per_item: B of one work item; without replay also of one update.
      seed: of the order of the prompts and of all sampling.
      max_staleness: versions by which the policy that wrote may lie behind the learner when its
        rollouts are used first: trained on, or added to the replay, which has a bound of its own.
      sync_every: updates between two publications.
      replay: where given, updates draw from it (trajectory balance); actors and learner then
        never wait for each other, once the first rollouts are there.
      prompts_per_update: B of an update drawn from `replay`; `prompts_per_item` where None.
      sampler_tolerance: see `Trainer`; holds for tokens of the learner's present version.
      max_refused: items in a row that may be refused, or updates that may be skipped.
      stall_s: the longest wait for any answer.
      demonstrations: what the learner's `ptx` loss imitates, as many as completions.
      span: names the parts of a step for a timeline.
    """

    learner: Learner
    pool: Pool
    publisher: Publisher
    checks: RolloutChecks
    prompts_per_item: int
    seed: int
    max_staleness: int
    sync_every: int = 1
    replay: Replay | None = None
    prompts_per_update: int | None = None
    sampler_tolerance: float = 1e-2
    max_refused: int = 16
    stall_s: float = 1800.0
    demonstrations: Demonstrations | None = None
    span: Span = field(default=no_span)

    def __post_init__(self) -> None:
        if self.sync_every < 1 or self.prompts_per_item < 1:
            raise ValueError(
                "sync_every and prompts_per_item must be at least 1: "
                f"{self.sync_every=}, {self.prompts_per_item=}"
            )
        if self.max_staleness < self.sync_every - 1:
            raise ValueError(
                "weights that are published every k updates are up to k − 1 versions old: "
                f"max_staleness ≥ sync_every − 1 is needed, got {self.max_staleness=}, "
                f"{self.sync_every=}"
            )
        if self.prompts_per_update is not None and self.replay is None:
            raise ValueError(
                "prompts_per_update is drawn from a replay: give one, or set prompts_per_item"
            )
        self._intake = Intake(
            self.checks,
            batch=self.prompts_per_item,
            seed=self.seed,
            max_staleness=self.max_staleness,
        )
        self._published: Published | None = None
        self._refused = self._skipped = 0

    def run(self, state: LearnerState, *, start: int, steps: int) -> Iterator[Step]:
        """Trains from step `start` up to `steps`, then closes the pool.

        Yields:
          (steps done, state, metrics, refusals since the step before). The yielded state is
          donated to the next step: copy what must outlive it.

        Raises:
          TooManyRefusals: more than `max_refused` items in a row were refused.
          NonFiniteUpdates: more than `max_refused` updates in a row were skipped.
          SamplerDrift: a sampler's log-probabilities are not the learner's.
          NoActorsLeft: every actor was given up.
          Stalled: no actor answered for `stall_s`.
        """
        with self.pool:
            self.pool.start(self._intake.accept)
            ended = time.perf_counter()
            for step in range(start, steps):
                version = int(state.step)
                published = self._publish(state, version)
                waiting = time.perf_counter()
                rollouts, news, refusals = self._next(version)
                waited_s = time.perf_counter() - waiting
                with self.span("update"):
                    demonstrations = imitated(
                        self.demonstrations, rollouts.mask.shape, seed=self.seed, step=step
                    )
                    state, metrics = self.learner.update(
                        state, jax.tree.map(jnp.asarray, rollouts), demonstrations
                    )
                    summary = summarise(rollouts, metrics)
                now = time.perf_counter()
                summary |= staleness(rollouts, version)
                summary |= {"learner_idle_share": waited_s / (now - ended)}
                summary |= self._observed(news, published)
                ended = now
                self._check(summary, step)
                yield step + 1, state, summary, refusals

    def _publish(self, state: LearnerState, version: int) -> Published | None:
        """Publishes the policy when it is due; its cost is a pause of the learner."""
        last = self._published
        if last is not None and version - last.version < self.sync_every:
            return None
        with self.span("publish"):
            self._published = self.publisher.publish(state.params["policy"], version)
        self._intake.newest = max(self._intake.newest, version)
        return self._published

    def _hand_out(self, version: int) -> None:
        """Keeps the actors supplied, as far ahead as the staleness bound allows."""
        assert self._published is not None
        while True:
            if self.replay is None:
                # Each item is used up by one update: an item behind `ahead` others is used at
                # version + ahead, and may then not be older than allowed.
                ahead = self._intake.pending
                room = self.max_staleness - (version - self._published.version)
            else:
                ahead, room = self._intake.waiting, max(2 * self.pool.size, 1) - 1
            if ahead > room:
                return
            used_at = version + (ahead if self.replay is None else 0)
            self.pool.submit(self._intake.next_item(used_at - self.max_staleness))

    def _next(self, version: int) -> tuple[Rollouts, list[Result], list[Refusal]]:
        """The rollouts of the next update, the results that came for it, and refusals."""
        refusals: list[Refusal] = []
        deadline = time.monotonic() + self.stall_s
        self._collect(0.0, refusals)
        while True:
            self._hand_out(version)
            news, stale = self._intake.take(version, at_most=None if self.replay else 1)
            refusals += stale
            self._count_refusals(stale)
            if self.replay is not None:
                for result in news:
                    assert result.rollouts is not None
                    self.replay.add(result.rollouts, iteration=result.version)
                if len(self.replay):
                    batch = self.prompts_per_update or self.prompts_per_item
                    groups = self.checks.group_size
                    return self.replay.sample(batch, groups, version), news, refusals
            elif news:
                assert news[0].rollouts is not None
                return news[0].rollouts, news, refusals
            if time.monotonic() > deadline:
                raise Stalled(
                    f"no rollouts for {self.stall_s:.0f} s with {self._intake.waiting} items "
                    f"handed out to {self.pool.size} actors; see the log for what they do, or "
                    "raise stall_s"
                )
            with self.span("wait"):
                self._collect(1.0, refusals)

    def _collect(self, timeout_s: float, refusals: list[Refusal]) -> None:
        results = self.pool.poll(timeout_s)
        if any(result.refusal is None for result in results):
            self._refused = 0
        news = self._intake.receive(results)
        self._count_refusals(news)
        refusals += news

    def _count_refusals(self, refusals: list[Refusal]) -> None:
        self._refused += len(refusals)
        if self._refused > self.max_refused:
            raise TooManyRefusals(self._refused, refusals[-1])

    def _check(self, summary: Mapping[str, float], step: int) -> None:
        if summary["sampler_gap"] > self.sampler_tolerance:
            raise SamplerDrift(summary["sampler_gap"], self.sampler_tolerance, step)
        self._skipped = self._skipped + 1 if summary["skipped"] else 0
        if self._skipped > self.max_refused:
            raise NonFiniteUpdates(self._skipped, step)

    def _observed(self, news: list[Result], published: Published | None) -> dict[str, float]:
        """What a user watches of the two sides, as numbers."""
        actors = self.pool.statistics.values()
        seen = {f"refused_{reason}": float(n) for reason, n in self._intake.refused.items()}
        seen["duplicates"] = float(sum(actor.duplicates for actor in actors))
        seen["restarts"] = float(sum(actor.restarts for actor in actors))
        if actors:
            seen["actor_idle_share"] = float(np.mean([actor.idle_share for actor in actors]))
        if news:
            seen["actor_pause_s"] = float(np.mean([result.timings.paused for result in news]))
        if published is not None:
            seen |= {
                "sync_bytes": float(published.size_bytes),
                "sync_density": published.density,
                "sync_s": published.seconds,
            }
        return seen


def staleness(rollouts: Rollouts, version: int) -> dict[str, float]:
    """Mean, maximum and shares of the tokens' ages, in versions; of no token of the policy: {}.

    Tokens of the frozen reference policy have no age and are left out.
    """
    written = np.asarray(rollouts.policy_version)
    ages = version - written[np.asarray(rollouts.mask) & (written >= 0)]
    if not ages.size:
        return {}
    values, counts = np.unique(ages, return_counts=True)
    shares = {f"staleness_{v}": float(n / ages.size) for v, n in zip(values, counts, strict=True)}
    return {"staleness": float(ages.mean()), "staleness_max": float(ages.max())} | shares
