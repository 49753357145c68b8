"""Which rollouts a learner trains on, and in which order: each acknowledged one exactly once."""

import logging
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from jaxrl.actors import Refusal, Result, RolloutChecks, WorkItem
from jaxrl.actors.validation import STALE
from jaxrl.data.batches import shuffled

_log = logging.getLogger(__name__)


class Settled:
    """A set of item ids that in the end has no gaps.

    Attributes:
      below: every id under it is in the set.
      also: those above.
    """

    def __init__(self, below: int = 0, also: Iterable[int] = ()) -> None:
        self.below, self.also = below, set(also)

    def __contains__(self, item: int) -> bool:
        return item < self.below or item in self.also

    def add(self, item: int) -> None:
        """Adds an id.

        >>> ids = Settled()
        >>> for id in (1, 2, 0, 5):
        ...     ids.add(id)
        >>> ids.below, ids.also
        (3, {5})
        """
        self.also.add(item)
        while self.below in self.also:
            self.also.remove(self.below)
            self.below += 1

    def state(self) -> dict[str, Any]:
        return {"below": self.below, "also": sorted(self.also)}


class Intake:
    """Hands out items within the staleness bound and keeps their answers until they are used.

    An item is *settled* when the learner has used its rollouts (trained on them, or put them into
    the replay, which the checkpoint holds) or has refused them. What was acknowledged and is not
    settled lies in `ready`, and in the journal.
    """

    def __init__(self, checks: RolloutChecks, *, batch: int, seed: int, max_staleness: int) -> None:
        """Begins at item 0.

        Args:
          checks: what rollouts must look like.
          batch: prompts of one item.
          seed: of the order of the prompts and of all sampling.
          max_staleness: versions by which rollouts may lie behind the learner when it uses them.
        """
        self._checks, self._batch, self._seed = checks, batch, seed
        self.max_staleness = max_staleness
        self.newest = 0
        """The newest version that actors may have."""
        self.refused: Counter[str] = Counter()
        self._open: dict[int, WorkItem] = {}
        self._ready: deque[Result] = deque()
        self._settled = Settled()
        self._next = 0

    @property
    def pending(self) -> int:
        """Items handed out or answered that are not settled."""
        return len(self._open) + len(self._ready)

    @property
    def waiting(self) -> int:
        """Items handed out and not answered."""
        return len(self._open)

    def next_item(self, min_version: int) -> WorkItem:
        """The next item to hand out: a function of the seed and its number."""
        while self._next in self._settled:
            self._next += 1
        rows = shuffled(
            len(self._checks.prompts), self._batch, seed=self._seed, step=self._next
        ).tolist()
        item = WorkItem(
            id=self._next, rows=tuple(rows), seed=self._seed, min_version=max(min_version, 0)
        )
        self._open[item.id] = item
        self._next += 1
        return item

    def accept(self, result: Result) -> Refusal | None:
        """Checks a result; called by actors' threads, one at a time, before it is acknowledged."""
        return self._checks.refusal(self._open[result.item], result, newest=self.newest)

    def receive(self, results: Iterable[Result]) -> list[Refusal]:
        """Takes in what the pool has settled; returns the refusals among it."""
        refusals = []
        for result in results:
            del self._open[result.item]
            if result.refusal is None:
                self._ready.append(result)
            else:
                self._settled.add(result.item)
                self.refused[result.refusal.reason] += 1
                refusals.append(result.refusal)
        return refusals

    def take(self, version: int, at_most: int | None = None) -> tuple[list[Result], list[Refusal]]:
        """Settles what is ready, oldest acknowledgement first.

        Args:
          version: of the learner; what is staler than allowed is refused.
          at_most: results to take; all where None.
        """
        taken, refusals = [], []
        while self._ready and (at_most is None or len(taken) < at_most):
            result = self._ready.popleft()
            self._settled.add(result.item)
            staleness = version - result.version
            if staleness <= self.max_staleness:
                taken.append(result)
                continue
            detail = (
                f"item {result.item} of {result.actor} is {staleness} versions old, "
                f"{self.max_staleness} are allowed"
            )
            _log.warning("refused: %s", detail)
            self.refused[STALE] += 1
            refusals.append(
                Refusal(reason=STALE, detail=detail, item=result.item, actor=result.actor)
            )
        return taken, refusals
