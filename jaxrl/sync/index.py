"""The manifests of a run as one process knows them."""

import contextlib
import logging
import threading

from jaxrl.sync.errors import DamagedManifest, SyncError, WrongRun
from jaxrl.sync.manifest import Manifest, Payload, Shortcut, index_entry, index_key, read
from jaxrl.sync.stores import Store

_log = logging.getLogger(__name__)


class Index:
    """The manifests and shortcuts of a run, read from the store as they appear.

    Attributes:
      manifests: by sequence number.
      shortcuts: payloads by the id of the manifest that they lead to.
      last: highest sequence number that the store lists, readable or not; −1 where it is empty.
    """

    def __init__(self, store: Store, run: str, *, ahead: bool = False) -> None:
        """Knows nothing yet.

        Args:
          store: of the run.
          run: its identity.
          ahead: whether `refresh` asks for the manifest that should come next while it waits for
            the listing, which saves a follower a round trip.
        """
        self._store, self._run, self._ahead = store, run, ahead
        self._known: dict[str, Manifest | Shortcut] = {}
        self._complaints: dict[str, str] = {}
        self.manifests: dict[int, Manifest] = {}
        self.shortcuts: dict[str, list[Payload]] = {}
        self.last = -1

    def refresh(self) -> None:
        """Reads what is new and forgets what is gone. What is damaged is logged and left out.

        Raises:
          StoreError: the store failed.
        """
        asking = None
        if self._ahead:
            key = index_key(self._run, self.last + 1)
            asking = threading.Thread(target=self._guess, args=(key,), daemon=True)
            asking.start()
        try:
            keys = self._store.keys(f"{self._run}/index/")
        finally:
            if asking is not None:
                asking.join()
        listed = {key: entry for key in keys if (entry := index_entry(key)) is not None}
        self._known = {key: record for key, record in self._known.items() if key in listed}
        for key in listed:
            if key not in self._known:
                self._read(key)
        self._arrange()
        for key in self._forked():
            # One of two neighbours was replaced since it was read, by a learner that lost a race.
            self._known.pop(key, None)
            self._read(key)
        self._arrange()
        self.last = max((sequence for sequence, _ in listed.values()), default=-1)

    def by_id(self, identity: str | None) -> Manifest | None:
        """The manifest of an id."""
        found = (m for m in self.manifests.values() if m.id == identity)
        return next(found, None)

    def payload(self, name: str) -> Payload | None:
        """The payload whose key ends with a name, if a manifest or shortcut has it."""
        own = (p for m in self.manifests.values() for p in m.payloads)
        made = (p for payloads in self.shortcuts.values() for p in payloads)
        found = (p for p in (*own, *made) if p.key.rsplit("/", 1)[-1] == name)
        return next(found, None)

    def _guess(self, key: str) -> None:
        """Reads a manifest that may not be there; the listing tells, and of trouble, too."""
        with contextlib.suppress(SyncError):
            self._read(key)

    def _read(self, key: str) -> None:
        try:
            record = read(self._store.get(key))
            self._check(key, record)
        except KeyError:
            return  # collected since it was listed
        except (DamagedManifest, WrongRun) as error:
            if self._complaints.get(key) != str(error):
                _log.warning("manifest %s is refused: %s", key, error)
            self._complaints[key] = str(error)
            return
        self._complaints.pop(key, None)
        self._known[key] = record

    def _check(self, key: str, record: Manifest | Shortcut) -> None:
        if record.run != self._run:
            raise WrongRun(f"it is of run {record.run!r}, not of {self._run!r}")
        if isinstance(record, Manifest) and index_key(self._run, record.sequence) != key:
            raise DamagedManifest(f"it is the one of sequence number {record.sequence}")

    def _arrange(self) -> None:
        records = self._known.values()
        self.manifests = {r.sequence: r for r in records if isinstance(r, Manifest)}
        self.shortcuts = {}
        for record in records:
            if isinstance(record, Shortcut):
                self.shortcuts.setdefault(record.target, []).append(record.payload)

    def _forked(self) -> list[str]:
        """Keys of neighbours of which the second does not name the first."""
        pairs = (
            (before, after)
            for before in self.manifests.values()
            if (after := self.manifests.get(before.sequence + 1)) is not None
        )
        return [
            index_key(self._run, one.sequence)
            for before, after in pairs
            if after.previous != before.id
            for one in (before, after)
        ]
