"""One actor: newest weights in, scored rollouts out."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jaxrl.actors.stopwatch import Stopwatch
from jaxrl.actors.work import Interrupted, Refusal, Result, Score, WorkItem
from jaxrl.data.batches import PromptSet
from jaxrl.rollouts import Collector, NonFiniteScores, Scorer
from jaxrl.sync import Subscriber
from jaxrl.types import Completions, Rollouts

_LONGEST_PAUSE_S = 2.0  # between two looks for weights, where looks are slow or fail
_LOOKING = 0.1  # share of its time that a thread may spend on looking for weights

SCORES = "scores"
"""The reason of refusals for rewards or costs that are not finite."""


class WeightsUnavailable(TimeoutError):
    """The version that an item needs did not come in time."""


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """How an actor waits.

    Attributes:
      poll_s: seconds between two looks for new weights; more where looks take long and find
        nothing, as at an object store: an actor that is busy spends at most a tenth of its time on
        them. One that waits for weights looks at once, and then every `poll_s`.
      patience_s: the longest wait for the version that an item needs.
    """

    poll_s: float = 0.05
    patience_s: float = 600.0

    def pause_s(self, look_s: float, *, after_s: float | None = None) -> float:
        """Seconds until the next look for new weights.

        Args:
          look_s: that the last one took, if it was for nothing and nobody waits; else 0.
          after_s: the pause before it, where it failed; None: it did not.

        >>> config = ActorConfig(poll_s=0.05)
        >>> [config.pause_s(look_s) for look_s in (0.001, 0.125, 60.0)]
        [0.05, 1.125, 2.0]
        >>> config.pause_s(0.001, after_s=0.05)
        0.1
        """
        pause_s = self.poll_s if after_s is None else 2 * after_s
        return min(max(pause_s, (1 / _LOOKING - 1) * look_s), max(self.poll_s, _LONGEST_PAUSE_S))


class Actor:
    """Writes and scores the rollouts of work items; a context manager.

    New weights are fetched, verified and rebuilt in a thread of their own while the old ones
    generate. They take over between two items, so that one item is of one version. An item may be
    scored, in another thread, while the next one is written; two are never scored at once.
    """

    def __init__(
        self,
        *,
        name: str,
        collector: Collector,
        scorer: Scorer,
        prompts: PromptSet,
        reference: Any,
        subscriber: Subscriber,
        config: ActorConfig | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        """An actor that is ready to be entered.

        Args:
          name: in logs and statistics.
          collector: writes completions.
          scorer: rewards and costs.
          prompts: the learner's training set.
          reference: parameters of the frozen reference policy.
          subscriber: gives the policy's parameters.
          config: how it waits; defaults where None.
          close: called at the end, to close what `subscriber` reads from.
        """
        self.name = name
        self._collector, self._scorer, self._prompts = collector, scorer, prompts
        self._reference, self._subscriber = reference, subscriber
        self._config, self._close = config or ActorConfig(), close
        self._stop, self._news, self._look = (threading.Event() for _ in range(3))
        self._awaited = False  # the actor has nothing to do until there are newer weights
        self._fetcher = threading.Thread(target=self._fetch, name=f"{name}-sync", daemon=True)
        self._failure: Exception | None = None
        self._scoring = threading.Lock()
        self._watch = Stopwatch()

    def __enter__(self) -> "Actor":
        self._fetcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.interrupt()
        self._fetcher.join()
        if self._close is not None:
            self._close()

    def interrupt(self) -> None:
        """Ends a wait for weights, from any thread: `write` then raises `Interrupted`."""
        self._stop.set()
        self._news.set()
        self._look.set()

    @property
    def version(self) -> int:
        """Of the weights that would write now; −1 before there are any."""
        version = self._subscriber.version
        return -1 if version is None else version

    def write(self, item: WorkItem) -> Score:
        """Writes an item's completions; what it returns scores them.

        Raises:
          WeightsUnavailable: `item.min_version` did not come within the actor's patience.
          Interrupted: see `interrupt`.
          Exception: what the subscriber or the collector raised, or what is returned raises of a
            reward; the actor is unusable.
        """
        self._catch_up(item.min_version)
        version = self.version
        with self._watch.during("generate_s"):
            rollouts, greedy = self._collector.collect(
                self._subscriber.params,
                self._reference,
                self._prompts.take(np.asarray(item.rows, np.int64)),
                item.key,
                version,
            )
            jax.block_until_ready(rollouts.tokens)
        return lambda: self._score(item, version, rollouts, greedy)

    def _score(
        self, item: WorkItem, version: int, rollouts: Rollouts, greedy: Completions | None
    ) -> Result:
        scored, refusal = None, None
        with self._scoring, self._watch.during("score_s"):
            try:
                scored = _on_host(self._scorer(rollouts, greedy))
            except NonFiniteScores as error:
                refusal = Refusal(reason=SCORES, detail=str(error), item=item.id, actor=self.name)
        return Result(
            item=item.id,
            actor=self.name,
            version=version,
            rollouts=scored,
            refusal=refusal,
            timings=self._watch.read(),
        )

    def _catch_up(self, wanted: int) -> None:
        """Takes the newest weights over, waiting for version `wanted`."""
        begun = time.monotonic()
        while True:
            self._news.clear()
            with self._watch.during("paused_s"):
                self._subscriber.flip()
            now = time.monotonic()
            if self.version >= max(wanted, 0):
                self._awaited = False
                return
            if self._failure is not None:
                raise self._failure
            if self._stop.is_set():
                raise Interrupted(f"{self.name} was told to stop")
            if now - begun > self._config.patience_s:
                raise WeightsUnavailable(
                    f"{self.name} needs weights of version {wanted} or later and has version "
                    f"{self.version} after {now - begun:.0f} s: does the learner publish to the "
                    "store that this actor reads? (patience_s sets how long it waits)"
                )
            if not self._awaited:
                self._awaited = True
                self._look.set()
            self._news.wait(self._config.poll_s)

    def _fetch(self) -> None:
        """In the background: keeps the next weights ready beside those that serve."""
        try:
            pause_s = self._config.poll_s
            while True:
                self._look.wait(pause_s)
                self._look.clear()
                if self._stop.is_set():
                    return
                began = time.perf_counter()
                found = self._subscriber.prepare()
                look_s = 0.0 if found or self._awaited else time.perf_counter() - began
                if found:
                    self._news.set()
                troubled = self._subscriber.problem is not None
                pause_s = self._config.pause_s(look_s, after_s=pause_s if troubled else None)
        except Exception as error:  # what may pass by itself the subscriber tries again itself
            self._failure = error
            self._news.set()


def _on_host(rollouts: Rollouts) -> Rollouts:
    """NumPy arrays, which outlive devices and cross processes."""
    return jax.tree.map(np.asarray, rollouts)
