"""Which rollouts a learner trains on, and in which order: each acknowledged one exactly once."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from jaxrl.actors import Journal, JournalError, Refusal, Result, RolloutChecks, WorkItem
from jaxrl.actors.validation import STALE
from jaxrl.actors.wire import result_from_wire, result_to_wire
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
        """The set as JSON values: what makes it anew."""
        return {"below": self.below, "also": sorted(self.also)}


class Intake:
    """Numbers the items, keeps their answers until they are used, and remembers over a crash.

    An item is *settled* when the learner has used its rollouts (trained on them, or put them into
    the replay, which the checkpoint holds) or has refused them. A checkpoint holds which items
    are settled; the journal holds every acknowledged answer that no checkpoint has yet, and which
    of them each update used. A learner that comes back from a checkpoint therefore repeats the
    updates that it lost with the same rollouts in the same order, reaches the versions that its
    actors already have, and goes on from there: nothing acknowledged is lost or used twice.

    `next_item`, `accept` and `flush` may be called from any thread, the rest from the learner's.
    """

    def __init__(
        self,
        checks: RolloutChecks,
        *,
        batch: int,
        seed: int,
        max_staleness: int,
        journal: Journal | None = None,
    ) -> None:
        """Begins at item 0; `recover` goes on from what was.

        Args:
          checks: what rollouts must look like.
          batch: prompts of one item.
          seed: of the order of the prompts and of all sampling.
          max_staleness: versions by which rollouts may lie behind the learner when it uses them.
          journal: keeps what is acknowledged over a crash; without one it is asked for again.
        """
        self._checks, self._batch, self._seed = checks, batch, seed
        self.max_staleness = max_staleness
        self.newest = 0
        """The newest version that actors may have."""
        self._lock = threading.Lock()  # of the books
        self._writing = threading.Lock()  # of the notes; held while the disk is waited for
        self.refused: Counter[str] = Counter()
        self._open: dict[int, WorkItem] = {}
        self._ready: deque[Result] = deque()
        self._settled = Settled()
        self._next = 0
        self._journal = journal
        self._plan: dict[int, list[int]] = {}  # updates to repeat: step → items
        self._unwritten: list[dict[str, Any]] = []
        self._found: dict[int, Result] = {}  # answers from the journal, for the plan

    # ------------------------------------------------------------------ over a crash

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON values."""
        return {"settled": self._settled.state(), "refused": dict(self.refused)}

    def recover(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Goes on from a checkpoint, or from the beginning, with what the journal has beyond it.

        Args:
          state: of the checkpoint; None where there is none.
          step: at which the learner goes on.
        """
        if state is not None:
            self._settled = Settled(**state["settled"])
            self.refused = Counter(state["refused"])
        for header, body in self._journal.records() if self._journal is not None else ():
            if "update" in header:
                if header["update"] >= step:
                    self._plan[header["update"]] = list(header["items"])
            elif header["item"] not in self._settled and header["item"] not in self._found:
                self._found[header["item"]] = result_from_wire(header, body)
        versions = (result.version for result in self._found.values())
        self.newest = max(self.newest, *versions, 0)
        self._next = self._settled.below
        if self._found:
            _log.info(
                "the journal has %d acknowledged items that the checkpoint of step %d has not; "
                "%d updates are repeated",
                len(self._found), step, len(self._plan),
            )  # fmt: skip
        if not self._plan:
            self._release_found()

    def _release_found(self) -> None:
        """What no update is known to have used waits for its turn, oldest acknowledgement first."""
        with self._lock:
            self._ready.extendleft(reversed(self._found.values()))
            self._found = {}

    def repeat(self, step: int) -> list[Result] | None:
        """Settles and returns what update `step` used before the crash; None where it is new."""
        if not self._plan:
            return None
        items = self._plan.pop(step, None)
        known = items is not None and all(item in self._found for item in items)
        results = [self._found.pop(item) for item in items or ()] if known else None
        for result in results or ():
            self._settled.add(result.item)
        if results is None:
            _log.error("the journal does not tell what update %d used; going on without", step)
            self._plan = {}
        if not self._plan:
            self._release_found()
        return results

    def note(self, step: int, results: Iterable[Result]) -> None:
        """Writes down which items a new update uses; `flush` makes it durable."""
        if self._journal is not None:
            items = [result.item for result in results]
            with self._writing:
                self._unwritten.append({"update": step, "items": items})
                self._write(durable=False)

    def flush(self) -> None:
        """Makes the past durable, so that a version that is published now can be made again."""
        if self._journal is not None:
            with self._writing:
                self._write(durable=True)

    def _write(self, *, durable: bool) -> None:
        """Writes what is noted; what the disk refuses waits for the next call."""
        assert self._journal is not None
        try:
            while self._unwritten:
                self._journal.append(self._unwritten[0], durable=False)
                del self._unwritten[0]
            if durable:
                self._journal.flush()
        except JournalError as error:
            _log.warning("a crash now may give later versions other weights: %s", error)

    def collect(self, state: Mapping[str, Any], step: int) -> None:
        """Deletes what a checkpoint holds from the journal.

        Args:
          state: of the oldest checkpoint that may be needed.
          step: of it.
        """
        if self._journal is None:
            return
        settled = Settled(**state["settled"])
        self._journal.collect(
            lambda header: (
                header["update"] >= step if "update" in header else header["item"] not in settled
            )
        )

    # --------------------------------------------------------------------- item by item

    @property
    def pending(self) -> int:
        """Items handed out or answered that are not settled."""
        return len(self._open) + len(self._ready)

    @property
    def waiting(self) -> int:
        """Items handed out and not answered."""
        return len(self._open)

    def expect(self, version: int) -> None:
        """Says that actors may have a version from now on."""
        self.newest = max(self.newest, version)

    def next_item(self, min_version: int) -> WorkItem:
        """The next item to hand out: a function of the seed and its number."""
        with self._lock:
            held = {result.item for result in self._ready} | self._open.keys() | self._found.keys()
            while self._next in self._settled or self._next in held:
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
        """Checks a result and makes it durable; called by actors' threads, one at a time.

        Raises:
          JournalError: it could not be made durable.
        """
        refusal = self._checks.refusal(self._open[result.item], result, newest=self.newest)
        if refusal is None and self._journal is not None:
            self._journal.append(*result_to_wire(result))
        return refusal

    def receive(self, results: Iterable[Result]) -> list[Refusal]:
        """Takes in what the pool has settled; returns the refusals among it."""
        refusals = []
        with self._lock:
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

        Returns:
          The results, and refusals of stale ones.
        """
        taken, refusals = [], []
        with self._lock:
            while self._ready and (at_most is None or len(taken) < at_most):
                result = self._ready.popleft()
                self._settled.add(result.item)
                if version - result.version <= self.max_staleness:
                    taken.append(result)
                else:
                    refusals.append(self._stale(result, version - result.version))
        return taken, refusals

    def _stale(self, result: Result, age: int) -> Refusal:
        detail = (
            f"item {result.item} of {result.actor} is {age} versions old, "
            f"{self.max_staleness} are allowed"
        )
        _log.warning("refused: %s", detail)
        self.refused[STALE] += 1
        return Refusal(reason=STALE, detail=detail, item=result.item, actor=result.actor)
