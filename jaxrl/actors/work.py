"""What passes between a learner and its actors: work items one way, results the other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import PRNGKeyArray

from jaxrl.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """One batch of prompts to complete: the same item always gives the same samples.

    An item may be handed to several actors, when one dies or is slow; one answer counts.

    Attributes:
      id: counts from 0; names the item for ever.
      rows: which prompts of the training set.
      seed: of the run.
      min_version: the oldest version of the policy that may write it; an actor waits for it.
    """

    id: int
    rows: tuple[int, ...]
    seed: int
    min_version: int = 0

    @property
    def key(self) -> PRNGKeyArray:
        """Consumed by sampling: one root for every run, folded with the item."""
        return jax.random.fold_in(jax.random.key(self.seed), self.id)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why an item's rollouts are not trained on.

    Attributes:
      reason: one word, by which refusals are counted; see `jaxrl.actors.validation`.
      detail: a sentence for the log.
      item: the item's id.
      actor: who delivered it.
    """

    reason: str
    detail: str
    item: int
    actor: str


@dataclass(frozen=True, kw_only=True)
class Timings:
    """What an actor did between two results, in seconds.

    Attributes:
      generate_s: wrote completions.
      score_s: computed rewards and costs.
      overlap_s: did two of these at once, and so counted twice above.
      paused_s: exchanged its weights, the only time at which generation stands still for them.
      idle_s: waited for work or for weights.
    """

    generate_s: float = 0.0
    score_s: float = 0.0
    overlap_s: float = 0.0
    paused_s: float = 0.0
    idle_s: float = 0.0

    def __add__(self, other: "Timings") -> "Timings":
        return Timings(
            generate_s=self.generate_s + other.generate_s,
            score_s=self.score_s + other.score_s,
            overlap_s=self.overlap_s + other.overlap_s,
            paused_s=self.paused_s + other.paused_s,
            idle_s=self.idle_s + other.idle_s,
        )

    @property
    def total_s(self) -> float:
        """Seconds that passed."""
        return self.generate_s + self.score_s - self.overlap_s + self.paused_s + self.idle_s


@dataclass(frozen=True, kw_only=True)
class Result:
    """An actor's answer to an item: scored rollouts, or why there are none.

    Attributes:
      item: the item's id.
      actor: who wrote it.
      version: of the policy that wrote it.
      rollouts: NumPy arrays; None when refused.
      refusal: None unless refused.
      timings: of the actor since its last result.
    """

    item: int
    actor: str
    version: int
    rollouts: Rollouts | None
    refusal: Refusal | None = None
    timings: Timings = field(default_factory=Timings)


class Interrupted(RuntimeError):
    """An actor was told to stop while it waited."""


@runtime_checkable
class AbstractActor(Protocol):
    """What a pool keeps alive: a context manager that answers work items in two steps.

    While one thread scores an item, another may have the next one written. Whatever either step
    raises is the death of the actor.
    """

    def write(self, item: WorkItem) -> "Score":
        """Has an item's completions written; one thread at a time calls this.

        Returns:
          What scores them and gives the answer; called once, by the same thread.
        """
        ...

    def interrupt(self) -> None:
        """Ends what either step waits for, from any thread: it raises `Interrupted`."""
        ...

    def __enter__(self) -> Any: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


Score = Callable[[], Result]
"""Computes the rewards and costs of what an actor has written."""

Build = Callable[[str], AbstractActor]
"""Makes the actor of a name, in the thread or process that it will live in."""

Accept = Callable[[Result], Refusal | None]
"""Makes a result durable, or says why it is refused; an OSError means: offer it again later."""

Supply = Callable[[], WorkItem | None]
"""Makes the next item for an actor that would be idle; None where there shall be none for now."""
