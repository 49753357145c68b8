"""Payloads from a store: whole, or as much of them as one process of a sharded actor needs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl.sync.manifest import Payload
from jaxrl.sync.stores import RangeStore, Store
from kernels import sparse_delta

PROBE_BYTES = 1 << 16
"""Of a payload's first read in ranges: its header and, most often, all of its manifest."""
_JOINED_BYTES = 1 << 15
"""A gap between two ranges that is read along: a request of its own costs more."""
_NEARLY_ALL = 0.9
"""A process that needs this share of a payload fetches the whole, which has a hash."""


class BadPayload(Exception):
    """A payload that must not be used; another way may exist.

    Attributes:
      key: of the payload.
    """

    def __init__(self, key: str, reason: object) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


@dataclass(frozen=True)
class Fetched:
    """A payload, or part of one.

    Attributes:
      data: what `kernels.sparse_delta.apply` takes.
      size_bytes: read from the store.
    """

    data: bytes | sparse_delta.PartialPayload
    size_bytes: int


def fetch(store: Store, payload: Payload, *, receiver: Any = None) -> Fetched:
    """A payload as it was written.

    A whole one is held against the SHA-256 of its manifest. Parts are held against the checksums
    that the payload has of its own, by whoever applies them, and what comes of them against the
    digest of the manifest.

    Args:
      store: that has it.
      payload: what the manifest says of it.
      receiver: tree of arrays, or shapes with shardings, of which other processes hold some: only
        what this one needs is read, where the store gives ranges. None: all of it is.

    Raises:
      BadPayload: it is gone, or damaged.
      WrongModel: it is of other weights than the receiver's.
      StoreError: the store failed.
    """
    small = payload.size_bytes <= 4 * PROBE_BYTES  # one request for it costs less than two
    if receiver is None or small or not isinstance(store, RangeStore):
        return Fetched(fetch_whole(store, payload), payload.size_bytes)
    try:
        return _fetch_needed(store, payload, receiver)
    except sparse_delta.WrongModel:
        raise
    except sparse_delta.CorruptPayload as error:
        raise BadPayload(payload.key, error) from error


def _fetch_needed(store: RangeStore, payload: Payload, receiver: Any) -> Fetched:
    size = payload.size_bytes
    partial, fetched = sparse_delta.PartialPayload(), 0
    wanted = [range(PROBE_BYTES)]
    while wanted:
        for stretch in wanted:
            partial.add(stretch.start, _get_range(store, payload, stretch))
            fetched += len(stretch)
        wanted = _joined(sparse_delta.needed(receiver, partial))
        if fetched + sum(map(len, wanted)) > _NEARLY_ALL * size:
            wanted = partial.missing(0, size)
    if partial.missing(0, size):
        return Fetched(partial, fetched)
    whole = partial.cut(0, size)
    assert whole is not None
    return Fetched(_checked(payload, whole.tobytes()), fetched)


def _joined(ranges: Sequence[range]) -> list[range]:
    """Ranges that are close to each other as one.

    >>> _joined([range(0, 10), range(20, 30), range(100_000, 100_010)])
    [range(0, 30), range(100000, 100010)]
    """
    joined: list[range] = []
    for stretch in ranges:
        if joined and stretch.start - joined[-1].stop <= _JOINED_BYTES:
            joined[-1] = range(joined[-1].start, stretch.stop)
        else:
            joined.append(stretch)
    return joined


def fetch_whole(store: Store, payload: Payload) -> bytes:
    """All bytes of a payload, held against its hash.

    Raises:
      BadPayload: they are gone, or others.
      StoreError: the store failed.
    """
    try:
        data = store.get(payload.key)
    except KeyError as error:
        raise BadPayload(payload.key, "it is not in the store") from error
    return _checked(payload, data)


def _get_range(store: RangeStore, payload: Payload, stretch: range) -> bytes:
    try:
        data = store.get_range(payload.key, stretch.start, stretch.stop)
    except KeyError as error:
        raise BadPayload(payload.key, "it is not in the store") from error
    if len(data) != len(stretch):
        raise BadPayload(
            payload.key,
            f"damaged: {len(data)} bytes where bytes {stretch.start} … {stretch.stop - 1} of the "
            f"{payload.size_bytes} that were written should be",
        )
    return data


def _checked(payload: Payload, data: bytes) -> bytes:
    if len(data) != payload.size_bytes or hashlib.sha256(data).hexdigest() != payload.sha256:
        raise BadPayload(
            payload.key,
            f"damaged: {len(data)} bytes, not the {payload.size_bytes} that were written",
        )
    return data
