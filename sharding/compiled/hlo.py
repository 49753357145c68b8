"""What a compiled program moves between devices, read from its optimised HLO text."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sharding.tracing.dims import product

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
_COMPARE = re.compile(r" compare\((?:\S+ )?%?([\w.\-]+), (?:\S+ )?%?([\w.\-]+)\), direction=LT")
_CHANNEL = re.compile(r" channel_id=(\d+)")
_DONE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .* (?:async-done|async-collective-done)\(")
_WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")
_WINDOWS = {"ag": "all-gather", "rs": "reduce-scatter"}
_SHAPE = re.compile(r"([a-z]+[0-9a-z]*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one run of a program, on one device.

    Attributes:
      count: how many run, loops unrolled.
      bytes: of their undivided side: what a gather returns, what goes into a sum, a scatter or an
        exchange, what a permutation sends.
    """

    count: int
    bytes: int


@dataclass(frozen=True)
class Group:
    """Collectives of one kind over groups of one size.

    Attributes:
      kind: of collective.
      members: devices of a group; 0 if the module does not say.
      count: how many run, loops unrolled.
      bytes: as in `Traffic`.
    """

    kind: str
    members: int
    count: int
    bytes: int


def collectives(groups: Iterable[Group]) -> dict[str, Traffic]:
    """Kind to traffic, over groups of all sizes."""
    found: dict[str, Traffic] = {}
    for group in groups:
        held = found.get(group.kind, Traffic(0, 0))
        found[group.kind] = Traffic(held.count + group.count, held.bytes + group.bytes)
    return dict(sorted(found.items()))


def groups(text: str) -> list[Group]:
    """Counts the collectives of a compiled module.

    A product that the TPU compiler overlaps with its collective, part by part (a loop called
    `windowed_dot_general`, arXiv:2105.04663 section 4.3), counts as the gather or the scatter that
    it stands for.

    Args:
      text: `compiled.as_text()`. The bodies of loops count as often as the compiler says that
        they run, or as their condition and their counter's step tell; else once.

    Returns:
      One entry for each kind and size of group that occur. Collectives of one device are none.
    """
    computations, entry = _computations(text)
    found: dict[tuple[str, int], list[int]] = {}
    for kind, members, size, times in _walk(computations, entry, 1, ()):
        total = found.setdefault((kind, members), [0, 0])
        total[0] += times
        total[1] += times * size
    return [Group(*key, count, size) for key, (count, size) in sorted(found.items())]


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
    computations: Mapping[str, list[str]],
    name: str,
    times: int,
    above: tuple[str, ...],
    seen: dict[str, str] | None = None,
) -> Iterator[tuple[str, int, int, int]]:
    """(kind, members, bytes, how often) of every collective that a computation runs."""
    if name in above:
        return
    seen = {} if seen is None else seen
    lines = computations.get(name, ())
    parts = _windowed(computations, lines)
    for line in lines:
        op = _OP.match(line)
        channel = _CHANNEL.search(line) if op else None
        # An asynchronous collective may run in several steps, each written as the whole in a
        # computation of its own. Those that a program asks for itself, under `shard_map`, all have
        # one channel.
        if channel and seen.setdefault(channel[1], name) != name:
            continue
        if op:
            kind, shapes = op[2], [_bytes(m) for m in _SHAPE.finditer(op[1])]
            if kind == "collective-permute" and shapes[0] in parts and "dot_general" in line:
                continue  # the first part of a windowed product, on its way to the loop
            members = _group(line)
            if kind == "collective-permute" and "dot_general" in line:
                # A windowed product whose loop was unrolled: all parts but one's own are sent.
                members = _links(line)
                yield "all-gather", members, shapes[0] * members // max(members - 1, 1), times
            elif members != 1:
                yield kind, members, _size(kind, shapes, bool(op[3]), members), times
            continue
        loop = _WHILE.match(line)
        if loop:
            window = _WINDOWED.search(loop[1])
            if window:
                members, size = _ring(computations, loop[1])
                yield _WINDOWS[window[1]], members, size, times
                continue
            runs = times * _trips(computations, line, loop[1])
            yield from _walk(computations, loop[1], runs, (*above, name))
            continue
        if _DONE.match(line):
            continue  # the end of what its start has counted
        for called in _CALLED.finditer(line):
            for inner in called[1].split(", "):
                inside = inner.lstrip("%")
                yield from _walk(computations, inside, times, (*above, name), seen)


def _size(kind: str, shapes: list[int], starts: bool, group: int) -> int:
    """Bytes of a collective's undivided side."""
    if starts and kind in ("all-gather", "reduce-scatter", "all-to-all"):
        # The start of an asynchronous collective returns its operands, then its results.
        half = len(shapes) // 2
        return sum(shapes[:half]) if kind == "reduce-scatter" else sum(shapes[half : 2 * half])
    if starts and kind == "collective-permute":
        return shapes[0]
    return sum(shapes) * (group if kind == "reduce-scatter" else 1)


def _windowed(computations: Mapping[str, list[str]], lines: Iterable[str]) -> set[int]:
    """Bytes of the parts that the windowed products among some lines send round."""
    found: set[int] = set()
    for line in lines:
        loop = _WHILE.match(line)
        if loop and _WINDOWED.search(loop[1]):
            found |= {size for size, _ in _permutes(computations, loop[1])}
    return found


def _permutes(computations: Mapping[str, list[str]], name: str) -> list[tuple[int, int]]:
    """(bytes, devices of the ring) of the permutations of a computation."""
    found = []
    for line in computations.get(name, ()):
        op = _OP.match(line)
        if op and op[2] == "collective-permute":
            shape = _SHAPE.search(op[1])
            assert shape
            found.append((_bytes(shape), _links(line)))
    return found


def _links(line: str) -> int:
    """Devices of the ring that a permutation sends along; 1 if it is none."""
    pairs = re.search(r"source_target_pairs=\{(.*?\})\}", line)
    found = re.findall(r"(\d+),(\d+)", pairs[1] if pairs else "")
    links = {int(source): int(target) for source, target in found}
    if not links:
        return 1
    start = next(iter(links))
    at, length = links[start], 1
    while at != start and at in links:
        at, length = links[at], length + 1
    return length


def _ring(computations: Mapping[str, list[str]], name: str) -> tuple[int, int]:
    """Devices of a windowed product, and the bytes of all its parts together."""
    parts = _permutes(computations, name)
    return max(((length, size * length) for size, length in parts), default=(0, 0))


def _trips(computations: Mapping[str, list[str]], line: str, body: str) -> int:
    """How often a loop runs: said, or read off `counter < bound` and the counter's step."""
    said = _TRIPS.search(line)
    if said:
        return int(said[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    defined = _definitions(lines)
    root = next((text for text in lines if text.lstrip().startswith("ROOT")), "")
    test = _COMPARE.search(root)
    if not test:
        return 1
    counter = re.search(r"get-tuple-element\(.*index=(\d+)", defined.get(test[1], ""))
    bound = re.search(r" constant\((\d+)\)", defined.get(test[2], ""))
    if not (counter and bound):
        return 1
    return -(-int(bound[1]) // _step(computations.get(body, []), int(counter[1])))


def _step(lines: Iterable[str], index: int) -> int:
    """What a loop's body adds to the entry of its tuple that counts."""
    lines = list(lines)
    defined = _definitions(lines)
    root = next((text for text in lines if text.lstrip().startswith("ROOT")), "")
    entries = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
    name = entries[index] if index < len(entries) else ""
    for operand in re.findall(r"%([\w.\-]+)", defined.get(name, "").partition(" add(")[2]):
        constant = re.search(r" constant\((\d+)\)", defined.get(operand, ""))
        if constant:
            return max(1, int(constant[1]))
    return 1


def _definitions(lines: Iterable[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        name = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if name:
            found[name[1]] = line
    return found


def _bytes(shape: re.Match[str]) -> int:
    bits = _BITS.get(shape[1], 8 if shape[1].startswith("f8") else 0)
    return product(int(n) for n in shape[2].split(",") if n) * bits // 8


def _group(line: str) -> int:
    """Devices that a collective joins; 0 if it does not say.

    Written `replica_groups={{0,1},...}`, `=[groups,size]<=...`, or as axes of a mesh,
    `=mesh['a'=2,'b'=4] {'b'}`.
    """
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if not mesh:
        return 0
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
    # A part of an axis is written 'a':(before)size.
    axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
    return product(int(part) if part else sizes[name] for name, part in axes)
