"""Links of a given bandwidth and latency, emulated by waiting."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from jaxrl.sync.stores import Store, get_range

_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_LINK = re.compile(
    r"\s*([\d.]+)\s*([kmgt]?)(?:bit|bps|bit/s)\s*(?:,\s*([\d.]+)\s*(s|ms|us|µs)\s*)?", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way for bytes.

    Attributes:
      bits_per_s: bandwidth.
      latency_s: from a request to the first byte of its answer.

    Raises:
      ValueError: a bandwidth that is not above 0, or a latency below 0.
    """

    bits_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bits_per_s > 0 or not self.latency_s >= 0:
            raise ValueError(f"a link needs bits_per_s > 0 and latency_s ≥ 0: {self}")

    @classmethod
    def parse(cls, text: str) -> "Link":
        """A link from "bandwidth,latency"; without the latter it is 0.

        Raises:
          ValueError: the text is not of that form.

        >>> Link.parse("1gbit,20ms")
        Link(bits_per_s=1000000000.0, latency_s=0.02)
        """
        match = _LINK.fullmatch(text)
        try:
            if match is None:
                raise ValueError("no match")
            rate = float(match[1]) * _PREFIX[match[2].lower()]
            latency = float(match[3] or 0) * _TIME[(match[4] or "s").lower()]
            return cls(bits_per_s=rate, latency_s=latency)
        except ValueError as error:
            raise ValueError(
                f"a link is 'bandwidth,latency', such as 1gbit,20ms or 400gbit,5us; got {text!r}"
            ) from error

    def seconds(self, size_bytes: int) -> float:
        """Seconds from a request for so many bytes to the last of them."""
        return self.latency_s + 8 * size_bytes / self.bits_per_s


class PacedStore:
    """A store as it would be at the other end of a link.

    Requests of several threads share the bandwidth one after the other; latencies overlap.
    """

    def __init__(
        self,
        store: Store,
        link: Link,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Puts a link before a store.

        Args:
          store: the store itself.
          link: the way to it.
          clock: seconds.
          sleep: waits for seconds.
        """
        self._store, self._link = store, link
        self._clock, self._sleep = clock, sleep
        self._free_at = clock()
        self._lock = threading.Lock()

    def _wait(self, size_bytes: int) -> None:
        with self._lock:
            now = self._clock()
            transfer_s = self._link.seconds(size_bytes) - self._link.latency_s
            self._free_at = max(now, self._free_at) + transfer_s
            done = self._free_at + self._link.latency_s
        self._sleep(max(0.0, done - now))

    def put(self, key: str, data: bytes) -> None:
        self._wait(len(data))
        self._store.put(key, data)

    def get(self, key: str) -> bytes:
        data = self._store.get(key)
        self._wait(len(data))
        return data

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        data = get_range(self._store, key, start, stop)
        self._wait(len(data))
        return data

    def keys(self, prefix: str) -> list[str]:
        found = self._store.keys(prefix)
        self._wait(sum(map(len, found)))
        return found

    def delete(self, key: str) -> None:
        self._wait(0)
        self._store.delete(key)
