"""Where versions travel: blobs under keys, behind one small interface."""

import re
import threading
from typing import Protocol, runtime_checkable

from jaxrl.sync.errors import NotInStore

_KEY = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_LONGEST_KEY = 512


@runtime_checkable
class Store(Protocol):
    """Blobs under keys. What is put is there whole or not at all, also after a crash.

    Keys are parts of letters, digits, "." , "_" and "-", joined by "/". A key that was put may be
    put again, which replaces the blob. Methods may be called from several threads.
    """

    def put(self, key: str, data: bytes) -> None:
        """Writes a blob.

        Raises:
          StoreFull: no room for it; what was there before still is.
          StoreError: the store failed; the blob is there whole or not at all.
        """
        ...

    def get(self, key: str) -> bytes:
        """Reads a blob.

        Raises:
          KeyError: there is none.
          StoreError: the store failed.
        """
        ...

    def keys(self, prefix: str) -> list[str]:
        """Keys that begin with a prefix, which is empty or ends with "/", in rising order.

        Raises:
          StoreError: the store failed.
        """
        ...

    def delete(self, key: str) -> None:
        """Removes a blob; one that is not there is no error.

        Raises:
          StoreError: the store failed.
        """
        ...


@runtime_checkable
class RangeStore(Store, Protocol):
    """A store that reads parts of blobs, as all of this package do.

    From one that does not, subscribers of many processes fetch each payload whole in each of them.
    """

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Reads bytes start … stop − 1 of a blob; fewer where it ends before.

        Raises:
          KeyError: there is none.
          StoreError: the store failed.
        """
        ...


def get_range(store: Store, key: str, start: int, stop: int) -> bytes:
    """Bytes start … stop − 1 of a blob, from any store; see `RangeStore.get_range`."""
    if isinstance(store, RangeStore):
        return store.get_range(key, start, stop)
    return store.get(key)[start:stop]


def checked_key(key: str) -> str:
    """The key, if it is one.

    Raises:
      ValueError: it is empty, too long, or would leave the store's folder.
    """
    parts = key.split("/")
    if not _KEY.fullmatch(key) or len(key) > _LONGEST_KEY or {".", ".."} & set(parts):
        raise ValueError(
            f"a key is at most {_LONGEST_KEY} letters, digits, '.', '_', '-' in parts joined by "
            f"'/', none of them '.' or '..': got {key!r}"
        )
    return key


def checked_prefix(prefix: str) -> str:
    """The prefix of keys, if it is one.

    Raises:
      ValueError: it is neither empty nor a key followed by "/".
    """
    if prefix:
        if not prefix.endswith("/"):
            raise ValueError(f"a prefix of keys is empty or ends with '/', got {prefix!r}")
        checked_key(prefix[:-1])
    return prefix


class MemoryStore:
    """A store in this process: for actors that are threads, and for tests.

    >>> store = MemoryStore()
    >>> store.put("run/a", b"1")
    >>> store.get("run/a"), store.keys("run/")
    (b'1', ['run/a'])
    """

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._blobs[checked_key(key)] = bytes(data)

    def get(self, key: str) -> bytes:
        with self._lock:
            try:
                return self._blobs[checked_key(key)]
            except KeyError:
                raise NotInStore(f"no blob {key!r} in memory") from None

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return self.get(key)[start:stop]

    def keys(self, prefix: str) -> list[str]:
        checked_prefix(prefix)
        with self._lock:
            return sorted(key for key in self._blobs if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._lock:
            self._blobs.pop(checked_key(key), None)
