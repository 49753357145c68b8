"""What subscribers tell the publisher: where they are, and which payload came out damaged.

    RUN/acks/NAME/BEAT-SEQUENCE         a sign of life: nothing is removed that NAME needs
    RUN/acks/NAME/damaged-PAYLOAD       a complaint, until the publisher has seen to it

The names of the blobs say all, so that one listing reads all of them.
"""

import re
import time
from collections.abc import Callable

from jaxrl.sync.manifest import Payload
from jaxrl.sync.stores import Store

_ACK = re.compile(r".*/acks/([^/]+)/(\d{14})-(\d{12})")
_COMPLAINT = re.compile(r".*/acks/[^/]+/damaged-([^/]+)")


class Acker:
    """The subscriber's end: says which publication serves."""

    def __init__(self, store: Store, run: str, name: str, *, every_s: float) -> None:
        """Prepares to acknowledge.

        Args:
          store: of the run.
          run: its identity.
          name: of the subscriber.
          every_s: seconds between signs of life while the publication stays the same.
        """
        self._store, self._every_s = store, every_s
        self._folder = f"{run}/acks/{name}/"
        self._key: str | None = None
        self._last: tuple[int, float] | None = None

    def send(self, sequence: int) -> None:
        """Acknowledges a publication, unless that was done just now.

        Raises:
          StoreError: the store failed.
        """
        now = time.monotonic()
        if self._last and self._last[0] == sequence and now - self._last[1] < self._every_s:
            return
        older = [self._key] if self._key is not None else self._before()
        # Milliseconds since 1970 only order the acks of one name; no clocks are compared.
        beat = time.time_ns() // 1_000_000
        key = f"{self._folder}{beat:014d}-{sequence:012d}"
        self._store.put(key, b"")
        for other in older:
            if other != key:
                self._store.delete(other)
        self._key, self._last = key, (sequence, now)

    def _before(self) -> list[str]:
        """Acks of this name that an earlier process left."""
        return [key for key in self._store.keys(self._folder) if _ACK.fullmatch(key)]

    def complain(self, payload: Payload) -> None:
        """Tells the publisher that a payload is not what its manifest says.

        Raises:
          StoreError: the store failed.
        """
        self._store.put(f"{self._folder}damaged-{payload.key.rsplit('/', 1)[-1]}", b"")


class Acks:
    """The publisher's end: who is alive, and where.

    Life is judged by the publisher's own clock, from when it first saw an ack: the clocks of other
    machines may be wrong.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        *,
        expiry_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares to listen.

        Args:
          store: of the run.
          run: its identity.
          expiry_s: a subscriber whose ack has not changed for so long counts as dead.
          clock: seconds that never go back.
        """
        self._store, self._run = store, run
        self._expiry_s, self._clock = expiry_s, clock
        self._seen: dict[str, tuple[str, float]] = {}
        self.complaints: dict[str, list[str]] = {}
        """Keys of the complaints that the last `live` found, by the last part of the payload's."""

    def live(self) -> dict[str, int]:
        """Sequence number of the publication that each living subscriber serves; removes dead acks.

        Raises:
          StoreError: the store failed.
        """
        now, newest, complaints = self._clock(), {}, {}
        for key in self._store.keys(f"{self._run}/acks/"):
            match = _ACK.fullmatch(key)
            if match:
                newest[match[1]] = key, int(match[3])  # listings rise, and so do beats
            elif complaint := _COMPLAINT.fullmatch(key):
                complaints.setdefault(complaint[1], []).append(key)
        self.complaints = complaints
        seen = {
            name: (key, self._seen[name][1] if self._seen.get(name, ("",))[0] == key else now)
            for name, (key, _) in newest.items()
        }
        dead = {name for name, (_, since) in seen.items() if now - since > self._expiry_s}
        for name in dead:
            self._store.delete(newest[name][0])
        self._seen = {name: entry for name, entry in seen.items() if name not in dead}
        return {name: newest[name][1] for name in self._seen}
