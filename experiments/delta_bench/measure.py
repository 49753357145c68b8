"""Sizes, and interleaved timings in one process.

Speeds are in GB/s of dense bf16 weights, 10⁹ bytes: what is scanned, not what is sent. A round
runs each contestant once, in an order that turns with every round; medians are taken over rounds,
and ratios within rounds, because a shared machine drifts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from experiments.delta_bench.codec import Codec, over_tensors
from experiments.delta_bench.limits import Limits
from experiments.delta_bench.pairs import Pair

FLOOR = "NumPy comparison, copy"


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a payload weighs, headers included.

    Attributes:
      payload_bytes: of the payload.
      bits: per changed element.
      ratio: dense bf16 weights to the payload.
      over_iid, over_exponent: the excess of `bits` over the limits, as shares of them.
    """

    payload_bytes: int
    bits: float
    ratio: float
    over_iid: float
    over_exponent: float

    @classmethod
    def of(cls, payload: Any, pair: Pair, limit: Limits) -> "Size":
        """Weighs a payload."""
        size = memoryview(payload).nbytes
        bits = 8 * size / pair.changed
        return cls(
            payload_bytes=size,
            bits=bits,
            ratio=pair.dense_bytes / size,
            over_iid=bits / limit.iid - 1,
            over_exponent=bits / limit.given_exponent - 1,
        )


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over the rounds.

    Attributes:
      encode, apply: GB/s of dense weights.
      encode_cores, apply_cores: CPU time over wall time.
      encode_times, apply_times: how many times the speed of the baseline; medians of the rounds'
        ratios.
      encode_cpu_times, apply_cpu_times: the same of CPU time, which others on the machine disturb
        less.
    """

    encode: float
    apply: float
    encode_cores: float
    apply_cores: float
    encode_times: float
    apply_times: float
    encode_cpu_times: float
    apply_cpu_times: float


def floor() -> Codec:
    """Nothing but NumPy's comparison to encode, and nothing but a copy to apply; no codec."""

    def compare(old: Any, new: Any, threads: int) -> bytes:
        over_tensors(np.not_equal, old, new, threads=threads)
        return b""

    def copy(old: Any, payload: bytes, threads: int) -> dict[str, np.ndarray]:
        return over_tensors(np.copy, old, threads=threads)

    return Codec(name=FLOOR, encode=compare, apply=copy)


def speeds(
    codecs: Sequence[Codec], pair: Pair, *, baseline: str, rounds: int, threads: int
) -> dict[str, Speed]:
    """Times contestants against each other on one pair.

    Args:
      codecs: the contestants, the baseline among them.
      pair: what they send.
      baseline: name of the contestant that ratios are taken to.
      rounds: measured ones; one more is run before them.
      threads: that each may use.
    """
    payloads = {c.name: c.encode(*c.sides(pair), threads) for c in codecs}
    seen: dict[str, list[tuple[_Clock, _Clock]]] = {c.name: [] for c in codecs}
    for turn in range(rounds + 1):
        first = turn % len(codecs)
        for codec in [*codecs[first:], *codecs[:first]]:
            old, new = codec.sides(pair)
            payload = payloads[codec.name]
            encode = _clocked(lambda c=codec, o=old, n=new: c.encode(o, n, threads))
            apply = _clocked(lambda c=codec, o=old, p=payload: c.apply(o, p, threads))
            if turn:
                seen[codec.name].append((encode, apply))
    return {name: _speed(clocks, seen[baseline], pair) for name, clocks in seen.items()}


@dataclass(frozen=True, kw_only=True)
class _Clock:
    wall_s: float
    cpu_s: float


def _clocked(function: Callable[[], Any]) -> _Clock:
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    del result  # freed outside the clock, for everyone
    return _Clock(wall_s=wall, cpu_s=cpu)


def _speed(
    clocks: Sequence[tuple[_Clock, _Clock]],
    baseline: Sequence[tuple[_Clock, _Clock]],
    pair: Pair,
) -> Speed:
    values: dict[str, float] = {}
    for i, what in enumerate(("encode", "apply")):
        own = [clock[i] for clock in clocks]
        values[what] = pair.dense_bytes / median(c.wall_s for c in own) / 1e9
        values[f"{what}_cores"] = median(c.cpu_s / c.wall_s for c in own)
        pairs = [(clock, other[i]) for clock, other in zip(own, baseline, strict=True)]
        values[f"{what}_times"] = median(b.wall_s / a.wall_s for a, b in pairs)
        values[f"{what}_cpu_times"] = median(b.cpu_s / max(a.cpu_s, 1e-9) for a, b in pairs)
    return Speed(**values)
