"""Some of the bytes of a payload, as they were read from a store that gives ranges."""

import bisect
from collections.abc import Mapping
from typing import Any

import numpy as np


class PartialPayload:
    """Ranges of a payload that are here.

    A receiver whose shards need few of the tiles fetches those only:

        partial = PartialPayload()
        while missing := needed(old, partial):
            for r in missing:
                partial.add(r.start, store.read(name, r.start, r.stop))
        new = apply(old, partial)
    """

    def __init__(self, pieces: Mapping[int, Any] | None = None) -> None:
        """Begins with some pieces.

        Args:
          pieces: bytes-like by the place of their first byte in the payload.
        """
        self._starts: list[int] = []
        self._pieces: list[np.ndarray] = []
        for start, data in (pieces or {}).items():
            self.add(start, data)

    def add(self, start: int, data: Any) -> None:
        """Takes a piece; of bytes that were here before, those from before stay.

        Args:
          start: place of its first byte in the payload.
          data: bytes-like, not changed afterwards.

        Raises:
          ValueError: a negative start.
        """
        if start < 0:
            raise ValueError(f"start counts bytes of the payload from 0, got {start}")
        piece = np.frombuffer(data, np.uint8)
        for gap in self.missing(start, start + len(piece)):
            at = bisect.bisect(self._starts, gap.start)
            self._starts.insert(at, gap.start)
            self._pieces.insert(at, piece[gap.start - start : gap.stop - start])

    def missing(self, start: int, stop: int) -> list[range]:
        """Stretches of the bytes start … stop − 1 that are not here, rising."""
        found = []
        at = max(0, bisect.bisect(self._starts, start) - 1)
        for begin, piece in zip(self._starts[at:], self._pieces[at:], strict=True):
            if begin >= stop:
                break
            if begin > start:
                found.append(range(start, begin))
            start = max(start, begin + len(piece))
        if start < stop:
            found.append(range(start, stop))
        return found

    def cut(self, start: int, stop: int) -> np.ndarray | None:
        """The bytes of a range, u8; None where one of them is not here."""
        if self.missing(start, stop):
            return None
        at = max(0, bisect.bisect(self._starts, start) - 1)
        taken = []
        for begin, piece in zip(self._starts[at:], self._pieces[at:], strict=True):
            if begin >= stop:
                break
            taken.append(piece[max(0, start - begin) : stop - begin])
        return taken[0] if len(taken) == 1 else np.concatenate([*taken, np.empty(0, np.uint8)])
