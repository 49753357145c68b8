"""The asynchronous loop: actors write and score; the learner updates and publishes its weights.

hand out items ─► actors ─► take what is acknowledged ─► (replay) ─► update ─┐
        ▲                                                                    │
        └── new weights ◄── encode, write (in a thread of its own) ◄── copy ◄┘
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.actors import Journal, Pool, Refusal, Result, RolloutChecks, WorkItem
from jaxrl.checkpoint import Checkpointer
from jaxrl.data.batches import Demonstrations
from jaxrl.learner import Learner, LearnerState
from jaxrl.replay import EmptyReplay, Replay
from jaxrl.sync import Published, Publisher
from jaxrl.train import multihost
from jaxrl.train.intake import Intake
from jaxrl.train.metrics import observed, staleness, summarise
from jaxrl.train.publishing import Publications
from jaxrl.train.synchronous import (
    NonFiniteUpdates,
    SamplerDrift,
    Span,
    imitated,
    no_span,
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

    A version is published beside the updates that follow it: the learner waits for a copy of its
    weights to be dispatched, no longer. One publication is under way at a time; versions that
    become due meanwhile are passed over for the newest. With several processes all that is
    collective of a publication is done between updates, when the first process says so; see
    `jaxrl.sync.background`.

    Attributes:
      learner: updates the policy.
      pool: the actors; started and closed by `run`. A learner of several processes
        (`jax.distributed`) makes a trainer in each, and gives pool, replay and journal to the
        first one only, which leads.
      publisher: of the policy's weights.
      checks: what rollouts must look like; holds the training set.
      prompts_per_item: B of one work item; without replay also of one update.
      seed: of the order of the prompts and of all sampling.
      max_staleness: versions by which the policy that wrote may lie behind the learner when its
        rollouts are used first: trained on, or added to the replay, which has a bound of its own.
      sync_every: updates between two publications.
      replay: where given, updates draw from it (trajectory balance); actors and learner then
        never wait for each other, once the first rollouts are there, up to `max_unread`.
      journal: keeps acknowledged rollouts over a crash of the learner; without one what was
        acknowledged after the last checkpoint is written again.
      prompts_per_update: B of an update drawn from `replay`; `prompts_per_item` where None.
      replay_group_size: K of an update drawn from `replay`, where actors write S completions of
        each prompt; S where None.
      max_unread: with a replay, answers that may wait for the end of an update before actors get
        no more items; bounds memory where updates are long.
      sampler_tolerance: see `Trainer`; holds for tokens of the learner's present version. Actors
        with quantised weights differ from the learner by right: it must be above that.
      max_refused: items in a row that may be refused, or updates that may be skipped.
      stall_s: the longest wait for any answer.
      demonstrations: what the learner's `ptx` loss imitates, as many as completions.
      span: names the parts of a step for a timeline.
    """

    learner: Learner
    pool: Pool | None
    publisher: Publisher
    checks: RolloutChecks
    prompts_per_item: int
    seed: int
    max_staleness: int
    sync_every: int = 1
    replay: Replay | None = None
    journal: Journal | None = None
    prompts_per_update: int | None = None
    replay_group_size: int | None = None
    max_unread: int = 256
    sampler_tolerance: float = 1e-2
    max_refused: int = 16
    stall_s: float = 1800.0
    demonstrations: Demonstrations | None = None
    span: Span = field(default=no_span)

    def __post_init__(self) -> None:
        if min(self.sync_every, self.prompts_per_item, self.max_unread) < 1:
            raise ValueError(
                "sync_every, prompts_per_item and max_unread must be at least 1: "
                f"{self.sync_every=}, {self.prompts_per_item=}, {self.max_unread=}"
            )
        if self.max_staleness < self.sync_every - 1:
            raise ValueError(
                "weights that are published every k updates are up to k − 1 versions old: "
                f"max_staleness ≥ sync_every − 1 is needed, got {self.max_staleness=}, "
                f"{self.sync_every=}"
            )
        oldest = None if self.replay is None else self.replay.config.max_staleness
        if oldest is not None and oldest < self.sync_every - 1:
            raise ValueError(
                "a replay must keep what the newest published policy writes, up to k − 1 versions "
                f"old: its max_staleness ≥ sync_every − 1 is needed, got {oldest}, "
                f"{self.sync_every=}"
            )
        if self.replay is None and (self.prompts_per_update or self.replay_group_size):
            raise ValueError(
                "prompts_per_update and replay_group_size are of what is drawn from a replay: give "
                f"one, or set prompts_per_item: {self.prompts_per_update=}, "
                f"{self.replay_group_size=}"
            )
        self._intake = Intake(
            self.checks,
            batch=self.prompts_per_item,
            seed=self.seed,
            max_staleness=self.max_staleness,
            journal=self.journal,
        )
        self._recovered = False
        self._saved: dict[int, Mapping[str, Any]] = {}
        self._publications = Publications(
            self.publisher, every=self.sync_every, before=self._intake.flush, on_turn=self._wake
        )
        self._version = 0
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
          LeaderStopped: one of these came to the first process of several; this is another one.
          Stalled: no actor answered for `stall_s`.
        """
        if not self._recovered:
            self._intake.recover(None, start)
        with self._publications, self.pool or contextlib.nullcontext():
            if self.pool is not None:
                self.pool.start(self._intake.accept, None if self.replay is None else self._supply)
            ended = time.perf_counter()
            for step in range(start, steps):
                version = int(state.step)
                batch = self._next(step, state, version)
                with self.span("update"):
                    demonstrations = imitated(
                        self.demonstrations, batch.rollouts.mask.shape, seed=self.seed, step=step
                    )
                    rollouts = jax.tree.map(jnp.asarray, batch.rollouts)
                    state, metrics = self.learner.update(state, rollouts, demonstrations)
                    summary = summarise(rollouts, metrics) | staleness(rollouts, version)
                now = time.perf_counter()
                summary["learner_idle_share"] = batch.waited_s / (now - ended)
                summary["learner_publishing_share"] = batch.publishing_s / (now - ended)
                summary |= observed(
                    {} if self.pool is None else self.pool.statistics,
                    refused=self._intake.refused,
                    results=batch.news,
                    published=batch.published,
                )
                ended = now
                self._check(summary, step)
                yield step + 1, state, summary, batch.refusals
            self._publications.finish(
                state.params["policy"], int(state.step), starting=self._intake.expect
            )

    # ------------------------------------------------------------------ over a crash

    def restore(self, checkpoints: Checkpointer, state: LearnerState) -> tuple[int, LearnerState]:
        """The last good checkpoint and all that the journal has beyond it; call it before `run`.

        Args:
          checkpoints: of this run.
          state: where a new run starts; gives structure and shardings.

        Returns:
          Steps done and state: 0 and `state` where there is no checkpoint.

        Raises:
          Exception: see `Checkpointer.restore_latest`.
          Malformed: the journal holds what is no result, though its checksums hold.
        """
        found = checkpoints.restore_latest(lambda metadata: self._tree(state, metadata["replay"]))
        self._recovered = True
        if found is None:
            self._intake.recover(None, 0)
            return 0, state
        if self.replay is not None:
            parts = {"arrays": found.tree["replay"], "metadata": found.metadata["replay"]}
            self.replay.load(parts)
        self._intake.recover(found.metadata["intake"], found.step)
        return found.step, found.tree["learner"]

    def save(self, checkpoints: Checkpointer, step: int, state: LearnerState) -> None:
        """Begins to save what `run` has just yielded; see `Checkpointer.save`.

        The journal is cleared of what the oldest checkpoint on disk holds, which may be needed
        when a later one proves damaged. All processes of the learner call it together.

        Args:
          checkpoints: of this run.
          step: steps done.
          state: as yielded.

        Raises:
          Exception: see `Checkpointer.save`.
        """
        replay = self._replay_state()
        metadata = {
            "intake": self._intake.state(),
            "replay": None if replay is None else replay["metadata"],
        }
        tree = {"learner": state, "replay": {} if replay is None else replay["arrays"]}
        checkpoints.save(step, tree, metadata=metadata)
        self._saved[step] = metadata["intake"]
        oldest = min(checkpoints.steps(), default=None)
        if oldest in self._saved:
            self._intake.collect(self._saved[oldest], oldest)
            self._saved = {at: kept for at, kept in self._saved.items() if at >= oldest}

    def _replay_state(self) -> dict[str, Any] | None:
        """The replay's state, in every process: each of them writes its part of a checkpoint."""
        if not multihost.leads():
            return multihost.tree_from_message(multihost.hear())
        state = None if self.replay is None else self.replay.state_dict()
        if jax.process_count() > 1:
            multihost.tell(*multihost.tree_to_message(state))
        return state

    def _tree(self, state: LearnerState, replay: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"learner": state, "replay": {} if replay is None else Replay.template(replay)}

    # ------------------------------------------------------------------- one step's parts

    def _wake(self) -> None:
        if self.pool is not None:
            self.pool.wake()

    def _publish(self, state: LearnerState, version: int, batch: "_Batch") -> None:
        """Publishes the policy when it is due; the learner waits for neither codec nor store."""
        began = time.perf_counter()
        with self.span("publish"):
            complete = self._publications.lead(
                state.params["policy"], version, starting=self._intake.expect
            )
        if complete:
            batch.published = self._publications.published
        batch.publishing_s += time.perf_counter() - began

    def _hand_out(self, version: int) -> None:
        """Keeps the actors supplied, as far ahead as the staleness bound allows.

        Each item is used up by one update: an item behind `ahead` others is used at
        version + ahead, and may then not be older than allowed. It may need the version that is
        being published: the actor waits for it.
        """
        assert self.pool is not None
        promised = self._publications.promised
        while self.replay is None and promised is not None:
            ahead = self._intake.pending
            if ahead > self.max_staleness - (version - promised):
                return
            self.pool.submit(self._intake.next_item(version + ahead - self.max_staleness))

    def _supply(self) -> WorkItem | None:
        """The next item for an actor that has none, where a replay decouples the two sides."""
        assert self.pool is not None
        if self._publications.promised is None or self.pool.unread >= self.max_unread:
            return None
        return self._intake.next_item(self._version - self.max_staleness)

    def _next(self, step: int, state: LearnerState, version: int) -> "_Batch":
        """Waits for what the next update trains on, with all processes of the learner."""
        if not multihost.leads():
            return self._follow(state)
        try:
            batch = self._lead(step, state, version)
        except Exception as error:  # whatever it was, else the other processes would wait forever
            multihost.tell({"stop": f"{type(error).__name__}: {error}"})
            raise
        if jax.process_count() > 1:  # else nobody would read what is a copy of it all
            multihost.tell(*multihost.rollouts_to_message(batch.rollouts))
        return batch

    def _follow(self, state: LearnerState) -> "_Batch":
        """Does as the leader does until it has a batch."""
        message = self._publications.follow(state.params["policy"])
        return _Batch(results=[multihost.rollouts_from_message(message)])

    def _lead(self, step: int, state: LearnerState, version: int) -> "_Batch":
        """Waits for what the next update trains on; publishes and hands out meanwhile."""
        assert self.pool is not None, "the leader has the actors"
        batch, self._version = _Batch(), version
        repeated = self._intake.repeat(step)
        # Its version was published before the crash, and actors may have it.
        if repeated is not None and self._fill(batch, repeated, version).ready:
            return batch
        deadline = time.monotonic() + self.stall_s
        self._collect(0.0, batch)
        while True:
            self._publish(state, version, batch)
            self._hand_out(version)
            taken, stale = self._intake.take(version, at_most=1 if self.replay is None else None)
            self._refuse(stale, batch)
            if self._fill(batch, taken, version).ready:
                self._intake.note(step, batch.news)
                return batch
            if time.monotonic() > deadline:
                raise Stalled(
                    f"no rollouts for {self.stall_s:.0f} s with {self._intake.waiting} items "
                    f"handed out to {self.pool.size} actors; the log says what they do, and "
                    "stall_s how long to wait"
                )
            with self.span("wait"):
                waiting = time.perf_counter()
                self._collect(1.0, batch)
                batch.waited_s += time.perf_counter() - waiting

    def _fill(self, batch: "_Batch", results: list[Result], version: int) -> "_Batch":
        """Adds results to the batch, through the replay where there is one."""
        batch.news += results
        if self.replay is None:
            batch.results = [x.rollouts for x in results if x.rollouts is not None]
            return batch
        for result in results:
            assert result.rollouts is not None
            self.replay.add(result.rollouts, tag=result.version)
        size = self.prompts_per_update or self.prompts_per_item
        # A replay that holds nothing yet, or nothing fresh enough, needs more answers.
        group = self.replay_group_size or self.checks.group_size
        with contextlib.suppress(EmptyReplay):
            batch.results = [self.replay.sample(size, group, version)]
        return batch

    def _collect(self, timeout_s: float, batch: "_Batch") -> None:
        """Takes in what the actors have done, waiting up to `timeout_s` for the first."""
        assert self.pool is not None
        results = self.pool.poll(timeout_s)
        if any(result.refusal is None for result in results):
            self._refused = 0
        self._refuse(self._intake.receive(results), batch)

    def _refuse(self, refusals: list[Refusal], batch: "_Batch") -> None:
        batch.refusals += refusals
        self._refused += len(refusals)
        if self._refused > self.max_refused:
            raise TooManyRefusals(self._refused, refusals[-1])

    def _check(self, summary: Mapping[str, float], step: int) -> None:
        if summary["sampler_gap"] > self.sampler_tolerance:
            raise SamplerDrift(summary["sampler_gap"], self.sampler_tolerance, step)
        self._skipped = self._skipped + 1 if summary["skipped"] else 0
        if self._skipped > self.max_refused:
            raise NonFiniteUpdates(self._skipped, step)


@dataclass
class _Batch:
    """What one update trains on, and what came about while it was waited for."""

    results: list[Rollouts] = field(default_factory=list)
    news: list[Result] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    published: Published | None = None
    waited_s: float = 0.0
    publishing_s: float = 0.0

    @property
    def ready(self) -> bool:
        return bool(self.results)

    @property
    def rollouts(self) -> Rollouts:
        return self.results[0]
