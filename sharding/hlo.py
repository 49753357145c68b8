"""What a compiled program moves between devices, read from its optimised HLO text."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sharding.dims import product

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OP = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(")
_WHILE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .* while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{\s*"n":\s*"?(\d+)"?')
_CALLED = re.compile(
    r"(?:calls|to_apply|async_execution_thread|branch_computations|true_computation"
    r"|false_computation)=\{?%?([\w.\-]+(?:, %?[\w.\-]+)*)\}?"
)
_SHAPE = re.compile(r"([a-z]+[0-9a-z]*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one run of a program, on one device.

    Attributes:
      count: how many run, loops unrolled.
      bytes: of their results; of a reduce-scatter, of what goes in.
    """

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Traffic]:
    """Counts the collectives of a compiled module.

    Args:
      text: `compiled.as_text()`. The bodies of loops count as often as the compiler says that
        they run; a loop of which it does not say, once.

    Returns:
      Kind to traffic, for kinds that occur.
    """
    computations, entry = _computations(text)
    found: dict[str, list[int]] = {}
    for kind, size, times in _walk(computations, entry, 1, ()):
        total = found.setdefault(kind, [0, 0])
        total[0] += times
        total[1] += times * size
    return {kind: Traffic(count, size) for kind, (count, size) in sorted(found.items())}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif name:
            found[name].append(line)
    if not entry:
        raise ValueError(f"no HLO module: no ENTRY computation in {text[:60]!r}")
    return found, entry


def _walk(
    computations: Mapping[str, list[str]], name: str, times: int, above: tuple[str, ...]
) -> Iterator[tuple[str, int, int]]:
    """(kind, bytes, how often) of every collective that a computation runs."""
    if name in above:
        return
    for line in computations.get(name, ()):
        op = _OP.match(line)
        if op:
            shapes = [_bytes(m) for m in _SHAPE.finditer(op[1])]
            # The start of an asynchronous collective returns its operands, its results, and flags.
            size = max(shapes, default=0) if op[3] else sum(shapes)
            if op[2] == "reduce-scatter" and not op[3]:
                size *= _group(line)
            yield op[2], size, times
            continue
        loop = _WHILE.match(line)
        if loop:
            trips = _TRIPS.search(line)
            runs = times * (int(trips[1]) if trips else 1)
            yield from _walk(computations, loop[1], runs, (*above, name))
            continue
        for called in _CALLED.finditer(line):
            for inner in called[1].split(", "):
                yield from _walk(computations, inner.lstrip("%"), times, (*above, name))


def _bytes(shape: re.Match[str]) -> int:
    bits = _BITS.get(shape[1], 8 if shape[1].startswith("f8") else 0)
    return product(int(n) for n in shape[2].split(",") if n) * bits // 8


def _group(line: str) -> int:
    """Devices that a collective joins: `replica_groups={{0,1},...}` or `=[groups,size]<=...`."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(listed[1].split(",")) if listed else 1
