"""One delta in place of many, for subscribers that stayed behind."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

from jaxrl.sync.fetching import BadPayload, fetch_whole
from jaxrl.sync.index import Index
from jaxrl.sync.manifest import Manifest, Shortcut, entry_of, index_key, seal
from jaxrl.sync.rebuild import rebuild
from jaxrl.sync.routes import Step, route
from jaxrl.sync.stores import Store
from kernels import sparse_delta

_log = logging.getLogger(__name__)


class Shortener:
    """Squashes the deltas between where a subscriber is and the newest version.

    The deltas are those that the store still has. The weights that the first of them applies to
    are rebuilt from there, too, on the host, and kept for the next time; who has no subscriber
    behind pays nothing.
    """

    def __init__(self, store: Store, run: str, *, after: int) -> None:
        """Prepares to shorten.

        Args:
          store: of the run.
          run: its identity.
          after: deltas that are worth a shortcut; 0: none ever are.
        """
        self._store, self._run, self._after = store, run, after
        self._mirror: tuple[str, Any, sparse_delta.TreeDigest] | None = None

    def shorten(
        self,
        index: Index,
        positions: Collection[int],
        template: Any,
        receivers: Sequence[Any] | None,
    ) -> None:
        """Makes at most one shortcut, for whoever has the most deltas to apply.

        Args:
          index: of the run, refreshed.
          positions: sequence numbers of the publications that living subscribers serve.
          template: NumPy arrays of the shapes and dtypes of the weights; values do not matter.
          receivers: shardings of the subscribers.

        Raises:
          StoreError: the store failed.
        """
        goal = index.manifests.get(index.last)
        if not self._after or goal is None:
            return
        ways = {position: self._deltas(index, position, goal) for position in positions}
        behind = {position: steps for position, steps in ways.items() if len(steps) >= self._after}
        if not behind:
            self._mirror = None  # a model's worth of memory, of no use now
            return
        position = max(behind, key=lambda p: len(behind[p]))
        try:
            self._make(index, index.manifests[position], behind[position], template, receivers)
        except (BadPayload, sparse_delta.CorruptPayload) as error:
            _log.warning("no shortcut to version %d: %s", goal.version, error)

    def _deltas(self, index: Index, position: int, goal: Manifest) -> list[Step]:
        """The steps ahead of a subscriber; none where an anchor is among them."""
        own = index.manifests.get(position)
        if own is None:
            return []
        steps = route(index.manifests.values(), goal.id, have=own.id, shortcuts=index.shortcuts)
        return [] if not steps or steps[0].payload.kind == "anchor" else steps

    def _make(
        self,
        index: Index,
        start: Manifest,
        steps: Sequence[Step],
        template: Any,
        receivers: Sequence[Any] | None,
    ) -> None:
        if not self._rebuild(index, start, template):
            return
        assert self._mirror is not None
        payloads = [fetch_whole(self._store, step.payload) for step in steps]
        _, weights, digest = self._mirror
        squashed = sparse_delta.squash(weights, *payloads, base_digest=digest, receivers=receivers)
        goal = steps[-1].target
        if len(squashed) >= sum(map(len, payloads)):
            return
        entry = entry_of(self._run, goal.sequence, "squash", squashed, start.id)
        self._store.put(entry.key, squashed)
        record = Shortcut(run=self._run, target=goal.id, payload=entry)
        self._store.put(index_key(self._run, goal.sequence, start.sequence), seal(record)[1])

    def _rebuild(self, index: Index, goal: Manifest, template: Any) -> bool:
        """Brings the mirror to a publication; whether the store still has the way."""
        have, weights, known = self._mirror or (None, template, None)
        steps = route(index.manifests.values(), goal.id, have=have, shortcuts=index.shortcuts)
        if steps is None:
            return False
        payloads = [fetch_whole(self._store, step.payload) for step in steps]
        weights, known = rebuild(weights, known, steps, payloads)
        assert known is not None, "a way that begins nowhere begins with an anchor"
        self._mirror = goal.id, weights, known
        return True
