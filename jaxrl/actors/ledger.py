"""Who has which work item: handed out at least once, accepted exactly once."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

from jaxrl.actors.work import Accept, Refusal, Result, Supply, Timings, WorkItem

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ActorStatistics:
    """What one actor has done so far.

    Attributes:
      items: results accepted.
      refused: results refused, by reason.
      duplicates: results dropped since another actor's came first.
      timings: seconds of work and of waiting.
      restarts: times that it died and was started again.
      version: of the weights behind its last result; −1 before the first.
    """

    items: int = 0
    refused: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    duplicates: int = 0
    timings: Timings = field(default_factory=Timings)
    restarts: int = 0
    version: int = -1

    @property
    def idle_share(self) -> float:
        """Share of its time that it waited for work or weights; 0 before the first result."""
        return self.timings.idle_s / self.timings.total_s if self.timings.total_s else 0.0


class Seat(NamedTuple):
    """Where one item at a time is in hand.

    Attributes:
      actor: by whose name the item is known.
      number: tells apart the seats of one actor, and two actors that were given one name.
    """

    actor: str
    number: int = 0


@dataclass
class _Open:
    """An item that has no accepted answer yet."""

    item: WorkItem
    holders: dict[Seat, float] = field(default_factory=dict)  # who → when it took the item
    failures: int = 0
    arriving: bool = False  # an answer is being made durable: too late to give the item up


class Ledger:
    """The book of open items; every method may be called from any thread.

    Items go out lowest id first; where none is left, a `supply` is asked for more. An item comes
    back to the queue when its actor dies, and is handed to a second actor when nothing else is left
    to do and the first has had it for `lease_s`; whoever answers second is a duplicate.
    """

    def __init__(
        self, accept: Accept, *, supply: Supply | None = None, lease_s: float, max_failures: int
    ) -> None:
        """An empty book.

        Args:
          accept: makes a result durable before it is acknowledged.
          supply: gives the next item to an actor that would have none, or None for now; called
            by one actor's thread at a time.
          lease_s: seconds after which an idle actor may get an item that another one holds.
          max_failures: deaths of actors over one item after which the item is refused.
        """
        self._accept, self._supply = accept, supply
        self._lease_s, self._max_failures = lease_s, max_failures
        self._open: dict[int, _Open] = {}
        self._done: list[Result] = []
        self._statistics: dict[str, ActorStatistics] = {}
        self._closed = self._woken = False
        self._changed = threading.Condition()
        self._receiving = threading.Lock()  # one result at a time: accepted in one order

    def submit(self, item: WorkItem) -> None:
        """Queues an item.

        Raises:
          ValueError: an item of this id is open.
        """
        with self._changed:
            self._queue(item)
            self._changed.notify_all()

    def _queue(self, item: WorkItem) -> _Open:
        if item.id in self._open:
            raise ValueError(f"an item is submitted once: {item.id=} is open already")
        entry = self._open[item.id] = _Open(item)
        return entry

    def take(
        self,
        seat: Seat,
        timeout_s: float | None = None,
        *,
        ended: Callable[[], bool] = lambda: False,
    ) -> WorkItem | None:
        """The next item for a seat.

        Args:
          seat: holds the item until its answer comes, or `release`.
          timeout_s: how long to wait for one; None: as long as it takes.
          ended: whether nobody waits for it any more; asked again at every `wake`.

        Returns:
          The item; None after `timeout_s`, when the book is closed, or where it is `ended`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._closed and not ended():
                now = time.monotonic()
                if (found := self._next(seat, now)) is not None:
                    found.holders[seat] = now
                    return found.item
                left = None if deadline is None else deadline - now
                if left is not None and left <= 0:
                    return None
                # Leases run out without anybody saying so.
                patience = self._lease_s if self._open else None
                waits = [x for x in (left, patience) if x is not None]
                self._changed.wait(min(waits) if waits else None)
        return None

    def _next(self, seat: Seat, now: float) -> _Open | None:
        free = [x for x in self._open.values() if not x.holders]
        if not free and self._supply is not None and (item := self._supply()) is not None:
            free = [self._queue(item)]
        if not free:
            free = [
                x
                for x in self._open.values()
                if all(seat.actor != holder.actor for holder in x.holders)
                and now - max(x.holders.values()) >= self._lease_s
            ]
        return min(free, key=lambda x: x.item.id, default=None)

    def give(self, result: Result) -> str:
        """Takes a result in.

        Returns:
          "accepted", "refused" or "duplicate": all three settle the matter for the actor.

        Raises:
          OSError: it could not be made durable; the item stays open and the actor should offer
            the result again.
        """
        with self._receiving:
            with self._changed:
                entry = self._open.get(result.item)
                if entry is None:
                    self._count(result, "duplicate", None)
                    return "duplicate"
                entry.arriving = True
            try:
                outcome, kept = self._judge(result)
            except BaseException:
                with self._changed:
                    entry.arriving = False
                raise
            with self._changed:
                self._count(result, outcome, kept)
                self._settle(kept)
        return outcome

    def _judge(self, result: Result) -> tuple[str, Result]:
        refusal = result.refusal or self._accept(result)
        if refusal is None:
            return "accepted", result
        _log.warning("refused item %d of %s: %s", result.item, result.actor, refusal.detail)
        return "refused", replace(result, rollouts=None, refusal=refusal)

    def _count(self, result: Result, outcome: str, kept: Result | None) -> None:
        old = self._statistics.get(result.actor, ActorStatistics())
        refused = Counter(old.refused)
        if kept is not None and kept.refusal is not None:
            refused[kept.refusal.reason] += 1
        self._statistics[result.actor] = replace(
            old,
            items=old.items + (outcome == "accepted"),
            duplicates=old.duplicates + (outcome == "duplicate"),
            refused=MappingProxyType(dict(refused)),
            timings=old.timings + result.timings,
            version=result.version,
        )

    def _settle(self, result: Result) -> None:
        del self._open[result.item]
        self._done.append(result)
        self._changed.notify_all()

    def release(self, seat: Seat, why: str, *, blame: bool = True) -> None:
        """Takes back what a seat held: it is free again, or refused as fatal.

        Args:
          seat: of an actor that is lost.
          why: for the log.
          blame: whether the item may have been the cause; not where only a connection broke.
        """
        with self._changed:
            held = [x for x in self._open.values() if seat in x.holders]
            for entry in held:
                del entry.holders[seat]
                entry.failures += blame
                if blame and entry.failures >= self._max_failures and not entry.arriving:
                    detail = f"item {entry.item.id} ended {entry.failures} actors, last: {why}"
                    refusal = Refusal(
                        reason="fatal", detail=detail, item=entry.item.id, actor=seat.actor
                    )
                    _log.error("%s; it is refused", detail)
                    result = Result(
                        item=entry.item.id,
                        actor=seat.actor,
                        version=-1,
                        rollouts=None,
                        refusal=refusal,
                    )
                    self._count(result, "refused", result)
                    self._settle(result)
            self._changed.notify_all()
        for entry in held:
            _log.warning(
                "%s did not answer item %d (%s): it is handed out again",
                seat.actor, entry.item.id, why,
            )  # fmt: skip

    def lose(self, actor: str, why: str) -> None:
        """Notes the death of an actor, of which `release` takes back what it held."""
        with self._changed:
            old = self._statistics.get(actor, ActorStatistics())
            self._statistics[actor] = replace(old, restarts=old.restarts + 1)
        _log.warning("lost %s (%s)", actor, why)

    def poll(self, timeout_s: float) -> list[Result]:
        """All results that came in since the last call.

        Waits up to `timeout_s` for the first, or until `wake`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._closed or self._woken, timeout_s)
            done, self._done, self._woken = self._done, [], False
            self._changed.notify_all()  # the supply may depend on what has been taken in
        return done

    def wake(self) -> None:
        """Ends the present or next `poll` at once, and lets idle actors ask the supply again."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    @property
    def unread(self) -> int:
        """Results that `poll` has not given out yet."""
        return len(self._done)

    def close(self) -> None:
        """Ends every wait; actors get no more items."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def statistics(self) -> Mapping[str, ActorStatistics]:
        """What each actor has done, by its name."""
        with self._changed:
            return dict(sorted(self._statistics.items()))
