"""The one runtime of all actors: a book of items, and a thread for every actor that asks it."""

import abc
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from jaxrl.actors.ledger import ActorStatistics, Ledger, Seat
from jaxrl.actors.work import AbstractActor, Accept, Interrupted, Result, Supply, WorkItem
from jaxrl.sync import ConnectionBroken

_log = logging.getLogger(__name__)


class _Life:
    """One actor from its start to its end.

    Attributes:
      actor: the actor.
      turn: held by whom it writes for.
      failures: what it raised, the first first; one ends the life.
    """

    def __init__(self, actor: AbstractActor) -> None:
        self.actor, self.turn = actor, threading.Lock()
        self.failures: list[Exception] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Notes a failure before anybody else may have a turn."""
        try:
            yield
        except Exception as error:  # an actor may fail in any way; it is raised again
            self.failures.append(error)
            raise


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class NoActorsLeft(RuntimeError):
    """Every actor failed so often in a row that it was given up."""


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How a pool treats its actors.

    Attributes:
      lease_s: seconds after which an idle actor is given an item that another one still holds.
      max_failures: deaths of actors over one item after which the item is refused.
      max_restarts: deaths in a row, without a result in between, after which an actor is given up.
      backoff_s: seconds before the first restart in a row; doubled for each further one.
      score_beside: an actor writes its next item while the last one is scored, so that slow rewards
        do not hold up generation; False: one after the other.
    """

    lease_s: float = 600.0
    max_failures: int = 3
    max_restarts: int = 5
    backoff_s: float = 0.1
    score_beside: bool = True

    def __post_init__(self) -> None:
        if self.lease_s <= 0 or self.backoff_s < 0:
            raise ValueError(
                f"lease_s must be > 0 and backoff_s ≥ 0: {self.lease_s=}, {self.backoff_s=}"
            )
        if self.max_failures < 1 or self.max_restarts < 0:
            raise ValueError(
                "max_failures must be ≥ 1 and max_restarts ≥ 0: "
                f"{self.max_failures=}, {self.max_restarts=}"
            )

    def pause_s(self, deaths: int) -> float:
        """Seconds to wait before an actor that died `deaths` times in a row starts again."""
        return min(self.backoff_s * 2 ** (deaths - 1), 30.0)


class Pool(abc.ABC):
    """Actors, wherever they run: a context manager.

    Every actor has two threads here that take turns at it: one hands it the next item and waits
    until that is written, while the other waits for the scores of the last one and takes the answer
    in. An actor that fails is replaced and its items handed out again. Where actors run is all that
    a subclass says.

    Items that are submitted come back from `poll` exactly once each, in the order in which they
    were accepted: as rollouts or as a refusal.
    """

    def __init__(self, size: int, config: PoolConfig | None) -> None:
        """Starts nothing yet.

        Args:
          size: how many actors to keep alive.
          config: how they are treated; defaults where None.

        Raises:
          ValueError: a negative size.
        """
        if size < 0:
            raise ValueError(f"a pool cannot have fewer than 0 actors: {size=}")
        self.size, self.config = size, config or PoolConfig()
        self._ledger: Ledger | None = None
        self._threads: list[threading.Thread] = []
        self._alive: dict[int, AbstractActor] = {}  # by the number of a seat
        self._seats = itertools.count()
        self._lock = threading.Lock()
        self._given_up: dict[str, str] = {}
        self._closed = threading.Event()

    @abc.abstractmethod
    def _hire(self, name: str) -> AbstractActor:
        """Makes the actor of a name, anew after its death; called in the actor's thread."""

    def start(self, accept: Accept, supply: Supply | None = None) -> None:
        """Starts the actors.

        Args:
          accept: makes a result durable before it is acknowledged, or says why it is refused.
          supply: gives an item to an actor for which none is queued; called from any thread, by
            one at a time. None: items are those that are submitted.

        Raises:
          RuntimeError: it was started before.
        """
        if self._ledger is not None:
            raise RuntimeError("a pool is started once; make a new one for another run")
        self._ledger = Ledger(
            accept,
            supply=supply,
            lease_s=self.config.lease_s,
            max_failures=self.config.max_failures,
        )
        for index in range(self.size):
            self._spawn(self._employ, f"actor-{index}")

    def submit(self, item: WorkItem) -> None:
        """Queues an item; never blocks."""
        self._book.submit(item)

    def poll(self, timeout_s: float) -> list[Result]:
        """Settled items, waiting up to `timeout_s` for the first, or until `wake`.

        Raises:
          NoActorsLeft: all actors were given up; names the last error.
        """
        done = self._book.poll(timeout_s)
        if not done and self.size and len(self._given_up) >= self.size and not self._alive:
            name, why = list(self._given_up.items())[-1]
            raise NoActorsLeft(
                f"all {self.size} actors failed {self.config.max_restarts + 1} times in a row and "
                f"were given up; the last error, of {name}: {why}"
            )
        return done

    def wake(self) -> None:
        """Ends the present or next wait in `poll`, from any thread; asks the supply again."""
        if self._ledger is not None:
            self._ledger.wake()

    @property
    def unread(self) -> int:
        """Settled items that `poll` has not given out yet."""
        return 0 if self._ledger is None else self._ledger.unread

    def close(self) -> None:
        """Ends all actors and waits for them; what they are writing is lost."""
        self._closed.set()
        if self._ledger is not None:
            self._ledger.close()
        with self._lock:
            alive = list(self._alive.values())
        for actor in alive:
            actor.interrupt()
        while threads := [thread for thread in self._threads if thread.is_alive()]:
            for thread in threads:
                thread.join()

    @property
    def statistics(self) -> Mapping[str, ActorStatistics]:
        """What each actor has done, by its name."""
        return {} if self._ledger is None else self._ledger.statistics

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------- internals

    @property
    def _book(self) -> Ledger:
        if self._ledger is None:
            raise RuntimeError("the pool has no actors yet: call start() first")
        return self._ledger

    def _spawn(self, target: Callable[..., None], name: str, *args: Any) -> threading.Thread:
        """A thread of a name, which its target is told first; `close` waits for it."""
        thread = threading.Thread(target=target, args=(name, *args), name=name, daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()]
            thread.start()
            self._threads.append(thread)
        return thread

    def _employ(self, name: str) -> None:
        """Keeps one actor alive until the end, or until it fails too often in a row."""
        deaths = 0
        while not self._closed.is_set():
            before = self._items(name)
            try:
                with self._hire(name) as actor:
                    self._answer(name, actor)
                return
            except Exception as error:  # an actor may fail in any way; the run goes on
                if self._closed.is_set():
                    return
                why = self._lose(name, error)
            deaths = 1 if self._items(name) > before else deaths + 1
            if deaths > self.config.max_restarts:
                _log.error("%s is given up after %d deaths in a row: %s", name, deaths, why)
                self._given_up[name] = why
                return
            self._closed.wait(self.config.pause_s(deaths))

    def _lose(self, name: str, error: Exception) -> str:
        """Books the loss of an actor and returns why it was lost."""
        why = _why(error)
        self._book.lose(name, why)
        return why

    def _items(self, name: str) -> int:
        return self.statistics.get(name, ActorStatistics()).items

    def _answer(self, name: str, actor: AbstractActor) -> None:
        """Lets an actor answer items until the pool is closed.

        Raises:
          Exception: why the actor's life ended: the first failure that is no mere interruption of
            it. What it held is handed out again.
        """
        life = _Life(actor)
        first, *others = (
            Seat(name, next(self._seats)) for _ in range(2 if self.config.score_beside else 1)
        )
        with self._lock:
            self._alive[first.number] = actor
        try:
            helpers = [self._spawn(self._serve, name, seat, life) for seat in others]
            self._serve(name, first, life)
            for helper in helpers:
                helper.join()
        finally:
            with self._lock:
                del self._alive[first.number]
        if life.failures:
            reasons = (x for x in life.failures if not isinstance(x, Interrupted))
            raise next(reasons, life.failures[0])

    def _serve(self, name: str, seat: Seat, life: "_Life") -> None:
        """Takes an actor's turns at one seat, to the end of its life or the pool's."""
        try:
            while True:
                # Only who can have it written at once takes an item.
                with life.turn, life.watched():
                    item = self._book.take(seat, ended=lambda: bool(life.failures))
                    if item is None:
                        return
                    score = life.actor.write(item)
                with life.watched():
                    self._deliver(score())
        except Exception as error:  # an actor may fail in any way; the run goes on
            if self._closed.is_set():
                return
            innocent = isinstance(error, ConnectionBroken | Interrupted)
            self._book.release(seat, _why(error), blame=not innocent)
            life.actor.interrupt()
            self._book.wake()  # the other seat need not wait for an item

    def _deliver(self, result: Result) -> None:
        """Takes a result in, again and again while it cannot be made durable."""
        pause_s = 0.1
        while not self._closed.is_set():
            try:
                self._book.give(result)
                return
            except OSError as error:
                _log.error(
                    "item %d of %s cannot be made durable and is not acknowledged: %s; "
                    "it is tried again",
                    result.item, result.actor, error,
                )  # fmt: skip
            self._closed.wait(pause_s)
            pause_s = min(2 * pause_s, 5.0)
