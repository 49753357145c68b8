"""What a contestant is: two functions and a name; and the checks that all must pass."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np

from experiments.delta_bench.pairs import Pair

T = TypeVar("T")
Encode = Callable[[Any, Any, int], Any]
Apply = Callable[[Any, Any, int], Any]


class RoundTripError(AssertionError):
    """A codec did not give back the new weights, bit for bit."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way to send new weights to somebody who holds the old ones.

    Attributes:
      name: as tables show it.
      encode: (old, new, threads) to the payload, bytes-like.
      apply: (old, payload, threads) to the new weights, in memory of their own.
      sides: of a pair, old and new in the form that the functions take: what both ends hold
        before the clock starts.
      bits: the uint16 bits of a tensor that `apply` gives.
    """

    name: str
    encode: Encode
    apply: Apply
    sides: Callable[[Pair], tuple[Any, Any]] = lambda pair: (pair.old, pair.new)
    bits: Callable[[Any], np.ndarray] = lambda tensor: tensor

    def payload(self, pair: Pair, threads: int = 1) -> Any:
        """Encodes a pair.

        Raises:
          RoundTripError: the payload does not give back the new weights.
        """
        old, new = self.sides(pair)
        payload = self.encode(old, new, threads)
        self.check(pair, self.apply(old, payload, threads))
        return payload

    def check(self, pair: Pair, found: Any) -> None:
        """Compares rebuilt weights with the new ones, bit for bit."""
        if set(found) != set(pair.new):
            raise RoundTripError(f"{self.name} on {pair.name}: other tensors than were sent")
        for name, wanted in pair.new.items():
            bits = self.bits(found[name])
            if bits.shape != wanted.shape or not np.array_equal(bits, wanted):
                wrong = np.count_nonzero(bits != wanted) if bits.shape == wanted.shape else "all"
                raise RoundTripError(f"{self.name} on {pair.name}: {wrong} elements of {name}")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="delta-bench")


def over_tensors(function: Callable[..., T], *sides: Any, threads: int) -> dict[str, T]:
    """`function` of each tensor of the sides, by name; on a pool where `threads` is above 1."""
    names = list(sides[0])
    if threads == 1:
        return {name: function(*(side[name] for side in sides)) for name in names}
    futures = [_pool(threads).submit(function, *(side[n] for side in sides)) for n in names]
    return {name: future.result() for name, future in zip(names, futures, strict=True)}
