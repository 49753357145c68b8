"""The publisher's dealings with the store: what is there, what to write, what to remove."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl.sync.acks import Acks
from jaxrl.sync.collection import collect, floor
from jaxrl.sync.config import SyncConfig
from jaxrl.sync.errors import Superseded, SyncError
from jaxrl.sync.fetching import BadPayload, fetch_whole
from jaxrl.sync.index import Index
from jaxrl.sync.manifest import Kind, Manifest, entry_of, index_key, seal
from jaxrl.sync.shortcuts import Shortener
from jaxrl.sync.stores import Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class State:
    """What the store says before a publication.

    Attributes:
      landed: id of the manifest of a publication that had failed and is there all the same.
      newest: the newest manifest that can be read.
      since_anchor: publications since the last anchor, the next one counted; 0: there is none.
      chain_bytes: of the deltas since.
      repair: a payload that a subscriber needs is damaged; an anchor leads past it.
    """

    landed: str | None
    newest: Manifest | None
    since_anchor: int
    chain_bytes: int
    repair: bool


class Chain:
    """The manifests of one run as their only writer sees them."""

    def __init__(self, store: Store, run: str, config: SyncConfig) -> None:
        self._store, self._run, self._config = store, run, config
        self._index = Index(store, run)
        self._acks = Acks(store, run, expiry_s=config.ack_expiry_s)
        self._shortener = Shortener(store, run, after=config.shortcut_after)
        self._own: Manifest | None = None
        self._attempts: dict[int, Manifest] = {}
        self._damaged: dict[str, list[str]] = {}  # complaints that are just, by payload

    def open(self) -> State:
        """Compares with the store what this publisher believes to be there.

        Raises:
          Superseded: another publisher has published since.
          StoreError: the store failed.
        """
        self._index.refresh()
        landed = None
        for manifest in self._attempts.values():
            if self._index.by_id(manifest.id) is not None:
                landed, self._own = manifest.id, manifest
        self._refuse_others()
        if self._own is not None and self._own.sequence not in self._index.manifests:
            _log.warning("the manifest of version %d was lost: wrote it again", self._own.version)
            self._store.put(index_key(self._run, self._own.sequence), seal(self._own)[1])
            self._index.refresh()
        newest = self._index.manifests.get(max(self._index.manifests, default=-1))
        return State(
            landed=landed, newest=newest, repair=bool(self._damaged), **self._since_anchor()
        )

    def _refuse_others(self) -> None:
        if self._own is None:
            return
        mine = {self._own.sequence: self._own} | self._attempts
        for sequence, found in self._index.manifests.items():
            own = mine.get(sequence)
            if own.id != found.id if own is not None else sequence > self._own.sequence:
                raise Superseded(
                    f"publication {sequence} of run {self._run!r} is of another publisher, this "
                    f"one's last is {self._own.sequence}; two learners must not share a run_id"
                )

    def _since_anchor(self) -> dict[str, int]:
        chain_bytes = 0
        newest_first = sorted(self._index.manifests.items(), reverse=True)
        for since, (_, manifest) in enumerate(newest_first, 1):
            sizes = {payload.kind: payload.size_bytes for payload in manifest.payloads}
            if "anchor" in sizes:
                return {"since_anchor": since, "chain_bytes": chain_bytes}
            chain_bytes += sizes["delta"]
        return {"since_anchor": 0, "chain_bytes": chain_bytes}

    def draft(
        self,
        version: int,
        *,
        digest: str,
        base: str | None,
        payloads: Mapping[Kind, bytes],
    ) -> Manifest:
        """The manifest of a version, of which nothing is written yet.

        Args:
          version: what the learner calls it.
          digest: of its weights.
          base: id of the manifest that its delta applies to.
          payloads: by kind.
        """
        newest = self._index.manifests.get(max(self._index.manifests, default=-1))
        # The number of a publication that failed is not used again: it may arrive yet.
        sequence = max(self._index.last, *self._attempts, -1) + 1
        entries = tuple(
            entry_of(self._run, sequence, kind, data, None if kind == "anchor" else base)
            for kind, data in payloads.items()
        )
        return Manifest(
            run=self._run,
            sequence=sequence,
            version=version,
            previous=None if newest is None else newest.id,
            digest=digest,
            quantise=self._config.quantise,
            kept=self._config.kept,
            payloads=entries,
        )

    def write(self, manifest: Manifest, payloads: Mapping[Kind, bytes]) -> None:
        """Writes payloads, then the manifest: with that the version is published.

        Raises:
          StoreError: the store failed; `open` will tell whether the manifest is there.
        """
        for entry in manifest.payloads:
            self._store.put(entry.key, payloads[entry.kind])
        self._attempts[manifest.sequence] = manifest
        self._store.put(index_key(self._run, manifest.sequence), seal(manifest)[1])
        self._own, self._attempts = manifest, {}
        if any(entry.kind == "anchor" for entry in manifest.payloads):
            self._settle_complaints()

    def damaged(self) -> bool:
        """Whether a payload of which a subscriber complained is not what was written.

        Raises:
          StoreError: the store failed.
        """
        self._index.refresh()
        self._acks.live()
        self._check_complaints()
        return bool(self._damaged)

    def _check_complaints(self) -> None:
        """Reads what subscribers could not use: it may have been damaged on its way to them."""
        for name, keys in self._acks.complaints.items():
            if name in self._damaged:
                self._damaged[name] = keys
                continue
            payload = self._index.payload(name)
            try:
                if payload is not None and not self._is_passed(name):
                    fetch_whole(self._store, payload)
            except BadPayload as error:
                _log.warning("%s; an anchor will lead past it", error)
                self._damaged[name] = keys
            else:
                self._remove(keys)

    def _is_passed(self, name: str) -> bool:
        """Whether there is an anchor of a later publication than a payload's."""
        own = int(name.partition("-")[0])
        later = (m.payloads for s, m in self._index.manifests.items() if s > own)
        return any(payload.kind == "anchor" for payloads in later for payload in payloads)

    def _settle_complaints(self) -> None:
        settled, self._damaged = self._damaged, {}
        try:
            for keys in settled.values():
                self._remove(keys)
        except SyncError as error:
            _log.warning("complaints that were settled stay in the store: %s", error)

    def _remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._store.delete(key)

    def tidy(self, template: Any, receivers: Sequence[Any] | None) -> None:
        """Helps who stayed behind, and removes what nobody needs; problems are logged.

        Args:
          template: NumPy arrays of the shapes and dtypes of the weights.
          receivers: shardings of the subscribers.
        """
        try:
            self._index.refresh()
            positions = set(self._acks.live().values())
            self._check_complaints()
            self._shortener.shorten(self._index, positions, template, receivers)
            lowest = floor(self._index, positions, keep_anchors=self._config.keep_anchors)
            if any(sequence < lowest for sequence in self._index.manifests):
                collect(self._store, self._run, self._index, lowest)
        except SyncError as error:
            _log.warning("old versions of run %s stay in the store: %s", self._run, error)
