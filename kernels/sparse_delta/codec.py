"""Host coder of the tiles of one box: a survey makes tables, with which tiles are coded.

A box is a C-contiguous array (lead, rows, cols) of unsigned integers: the bits of a tensor, or of
a shard of it. Its tiles are 1 × R × C, clipped at the upper ends, numbered in row-major order. Each
tile is coded on its own, in the smallest of the modes. What the bytes mean is in FORMAT.md.
"""

import enum
import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kernels.sparse_delta import loops
from kernels.sparse_delta.elements import ElementFormat

SUB_BLOCK = loops.SUB_BLOCK
CLASSES = loops.CLASSES
# Bounds what a receiver has to hold for one tile; `tiles.py` keeps to it.
MAX_TILE_ELEMENTS = 1 << 20
# Output is made in chunks of this many bytes, so that little memory is held beside the result.
_CHUNK_BYTES = 4 << 20

_PROBABILITIES = 1 << loops.PROBABILITY_BITS
# A survey of this many elements leaves the tables within .01 bits of the best at 1 % of changes.
_SURVEY_ELEMENTS = 4 << 20
# One set of frequencies takes fewer; at 1 % of changes twice as many would save .02 bits a change.
_LONE_SURVEY_ELEMENTS = 1 << 19

Tile = tuple[int, int]


class Mode(enum.IntEnum):
    """How a tile is coded; the numbers are the format's."""

    EMPTY = loops.EMPTY
    BLOCK_OFFSET = loops.BLOCK_OFFSET
    BITMAP = loops.BITMAP
    ENTROPY = loops.ENTROPY
    DENSE = loops.DENSE


REASONS = {
    loops.SHORT: "it ends early",
    loops.LONG: "it has bytes left over",
    loops.COUNTS: "its number of changes contradicts the directory",
    loops.RANGE: "a position or value is out of range",
    loops.STATE: "the coder's final state is wrong",
    loops.PADDING: "unused bits are set",
    loops.BASE: "it needs old weights and there are none",
    loops.MODE: "its mode is unknown",
}


class Malformed(Exception):
    """A stream that no encoder made.

    Attributes:
      tile: number of the tile within its box, or None where the tables are bad.
    """

    def __init__(self, message: str, tile: int | None = None) -> None:
        super().__init__(message)
        self.tile = tile


class DigestFrame(NamedTuple):
    """Where a box lies in its tensor, for the digest.

    Attributes:
      origin: row-major index in the tensor of the box's first element.
      lead_stride: by how much that index grows along the box's first dimension.
      row_stride: the same along the second; it grows by 1 along the third.
    """

    origin: int
    lead_stride: int
    row_stride: int


@dataclass(frozen=True, eq=False)
class Tables:
    """What the tiles of a format share.

    Attributes:
      fmt: the element format they are for.
      thresholds: u8[7], t_1 ≤ … ≤ t_7: an element's class is the number of thresholds that its old
        exponent is not below.
      weights: u16[8], what share of each class's elements is expected to change; only ratios count.
      frequencies: u16[8, 256], of the symbols of changes in each class, each row of sum 4096 with
        that of the escape at least 1; of no rows where entropy mode is not used.
    """

    fmt: ElementFormat
    thresholds: np.ndarray
    weights: np.ndarray
    frequencies: np.ndarray

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Frequencies and their sums of values and gaps, weights, symbols by slot of both."""
        values, value_symbols = _slots(self.frequencies)
        gaps, gap_symbols = _gap_slots()
        return values, gaps, self.weights.astype(np.int64), value_symbols, gap_symbols

    @functools.cached_property
    def numbers(self) -> tuple:
        """What the loops know of the format and its classes; see `loops.scan`."""
        return _numbers(self.fmt, self.thresholds)

    def to_bytes(self) -> bytes:
        """The tables as FORMAT.md lays them out."""
        if not self.frequencies.size:
            return bytes([0])
        out = bytearray([1])
        out += self.thresholds.tobytes() + self.weights.astype("<u2").tobytes()
        before = None
        for row in self.frequencies:
            same = before is not None and np.array_equal(row, before)
            listed = (
                [] if same else row[: int(np.flatnonzero(row[: loops.ESCAPE])[-1]) + 1].tolist()
            )
            before = row
            out.append(len(listed))
            k = 0
            while k < len(listed):
                out += _varint(listed[k])
                k += 1
                if listed[k - 1] == 0:
                    run = next(n for n, f in enumerate(listed[k:]) if f)
                    out.append(run)
                    k += run
        return bytes(out)

    @staticmethod
    def from_bytes(data: memoryview | bytes, fmt: ElementFormat) -> "tuple[Tables, int]":
        """Read tables of a payload.

        Returns:
          The tables and the number of bytes read.

        Raises:
          Malformed: not what `to_bytes` writes.
        """
        reader = _Reader(data)
        kind = reader.byte()
        if kind == 0:
            return _no_tables(fmt), reader.at
        if kind != 1:
            raise Malformed(f"tables of kind {kind} are unknown")
        thresholds = np.frombuffer(reader.bytes(CLASSES - 1), np.uint8)
        if np.any(thresholds[1:] < thresholds[:-1]):
            raise Malformed(f"thresholds must not decrease, got {thresholds.tolist()}")
        weights = np.frombuffer(reader.bytes(2 * CLASSES), "<u2").astype(np.uint16)
        frequencies = np.zeros((CLASSES, 256), np.uint16)
        for c in range(CLASSES):
            listed = reader.byte()
            if not listed and c:
                frequencies[c] = frequencies[c - 1]
                continue
            k = 0
            while k < listed:
                value = reader.varint()
                if value >= _PROBABILITIES:
                    raise Malformed(f"a frequency must be below {_PROBABILITIES}, got {value}")
                frequencies[c, k] = value
                k += 1 if value else 1 + reader.byte()
            total = int(frequencies[c].sum())
            if k != listed or listed > loops.ESCAPE or not 0 < total < _PROBABILITIES:
                raise Malformed(f"frequencies of class {c} are no table: {total=}, {listed=}")
            frequencies[c, loops.ESCAPE] = _PROBABILITIES - total
        return Tables(fmt, thresholds, weights, frequencies), reader.at


class _Reader:
    """Bytes of untrusted tables, one after the other."""

    def __init__(self, data: memoryview | bytes) -> None:
        self.data = memoryview(data)
        self.at = 0

    def bytes(self, n: int) -> bytes:
        if self.at + n > len(self.data):
            raise Malformed("tables end early")
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    def byte(self) -> int:
        return self.bytes(1)[0]

    def varint(self) -> int:
        low = self.byte()
        return low if low < 128 else low - 128 + 128 * self.byte()


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])


def _no_tables(fmt: ElementFormat) -> Tables:
    return Tables(
        fmt,
        np.full(CLASSES - 1, 255, np.uint8),
        np.zeros(CLASSES, np.uint16),
        np.zeros((0, 256), np.uint16),
    )


def _slots(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries of symbols, u32[n, 256], and the symbol of each slot, u8[n, 4096].

    An entry is the symbol's frequency, and in the upper half the sum of those before.
    """
    counts = frequencies.astype(np.uint32)
    sums = np.cumsum(counts, axis=1, dtype=np.uint32) - counts
    symbols = np.zeros((len(counts), _PROBABILITIES), np.uint8)
    for row, own in zip(symbols, counts, strict=True):
        row[:] = np.repeat(np.arange(256), own)
    return counts | sums << np.uint32(16), symbols


@functools.cache
def _gap_slots() -> tuple[np.ndarray, np.ndarray]:
    return _slots(gap_frequencies())


@functools.cache
def gap_frequencies() -> np.ndarray:
    """Frequencies of the symbols of gaps, u16[57, 256], fixed by the format.

    Row ℓ is for gaps that are geometrically distributed with mean μ = 2^((ℓ − 16)/2 + 1/4), the
    middle of those that `loops.gap_level` puts there: P(gap ≥ g) = q^g, q = μ/(1 + μ).

    Computed in integers, in units of 2^−64, so that every machine gets the same.
    """
    one = 1 << 64
    rows = np.zeros((loops.GAP_LEVELS, 256), np.uint16)
    starts = [_token_start(t) for t in range(4 * (loops.GAP_BITS - 1) + 1)]
    for level, row in enumerate(rows):
        exponent, half = divmod(level - 16, 2)
        # 2^(1/4) and 2^(3/4) in units of 2^-32; then μ in units of 2^-40, exact for μ ≥ 2^-8.
        mean = (7223245206 if half else 5107605667) << (exponent + 8)
        ratio = mean * one // ((1 << 40) + mean)
        tail = [_power(ratio, start) for start in starts]
        shares = [a - b for a, b in itertools.pairwise(tail)]
        counts = [(share * _PROBABILITIES + one // 2) >> 64 for share in shares]
        missed = tail[-1] + sum(s for s, n in zip(shares, counts, strict=True) if n == 0)
        escape = 1 + (missed * _PROBABILITIES >> 64)
        counts[counts.index(max(counts))] += _PROBABILITIES - escape - sum(counts)
        row[: len(counts)] = counts
        row[loops.ESCAPE] = escape
    return rows


def _power(base: int, exponent: int) -> int:
    """base^exponent in units of 2^−64, rounded down at each step, lowest bits first."""
    result = 1 << 64
    while exponent:
        if exponent & 1:
            result = result * base >> 64
        base = base * base >> 64
        exponent >>= 1
    return result


def _token_start(token: int) -> int:
    return token if token < 4 else (4 + token % 4) << (token // 4 - 1)


@dataclass(frozen=True)
class CodedTiles:
    """Coded tiles of one box.

    Attributes:
      mode: u8[T], `Mode`.
      nnz: u32[T], changed elements of each tile; all of them where there was no old box.
      size: u32[T], bytes of each tile's stream.
      offset: int64[T], where it starts in `data`.
      data: u8, streams in order of the tiles, one behind the other.
      digest_change: by how much the two sums of the tensor's digest grow, modulo 2^32; 0 where no
        frame was given.
    """

    mode: np.ndarray
    nnz: np.ndarray
    size: np.ndarray
    data: np.ndarray
    offset: np.ndarray
    digest_change: tuple[int, int] = (0, 0)


def n_tiles(shape: Sequence[int], tile: Tile) -> int:
    """Number of tiles of a box of `shape`."""
    lead, rows, cols = shape
    return lead * -(-rows // tile[0]) * -(-cols // tile[1])


def make_tables(
    fmt: ElementFormat,
    boxes: Sequence[tuple[np.ndarray, np.ndarray]],
    tile: Tile,
    conditional: bool = True,
) -> Tables:
    """Survey pairs of boxes and make the tables that code them shortest.

    Args:
      fmt: of all boxes.
      boxes: old and new, each (lead, rows, cols) of `fmt.bits_dtype`.
      tile: R and C.
      conditional: on the old exponent; if not, all elements are of one class, which takes more
        bits and less time.
    """
    at_most = _SURVEY_ELEMENTS if conditional else _LONE_SURVEY_ELEMENTS
    members, changes, symbols = _survey(fmt, boxes, tile, at_most)
    if not changes.any():
        return _no_tables(fmt)
    if not conditional:
        # No exponent is below a threshold of 0, so all elements are of the last class.
        lone = np.zeros(CLASSES, np.int64)
        lone[-1] = members.sum()
        pooled = np.broadcast_to(symbols.sum(axis=0), (CLASSES, 256))
        return tables_of_counts(fmt, np.zeros(CLASSES - 1, np.uint8), lone, pooled)
    firsts = _best_classes(members, changes, symbols)
    thresholds = np.full(CLASSES - 1, 255, np.uint8)
    thresholds[: len(firsts) - 1] = firsts[1:]
    # Unused classes begin at exponent 255, infinities and NaN of bf16 and f32, with the last one's
    # statistics.
    parts = [np.add.reduceat(counts, firsts) for counts in (members, symbols)]
    pad = CLASSES - len(firsts)
    members, symbols = (np.concatenate([p, np.repeat(p[-1:], pad, 0)]) for p in parts)
    return tables_of_counts(fmt, thresholds, members, symbols)


def tables_of_counts(
    fmt: ElementFormat, thresholds: np.ndarray, members: np.ndarray, symbols: np.ndarray
) -> Tables:
    """Tables for given classes.

    Args:
      fmt: of the elements.
      thresholds: u8[7], see `Tables`.
      members: int64[8], elements of each class, changed or not.
      symbols: int64[8, 256], how often each symbol of changes occurs in each class.
    """
    changes = symbols.sum(axis=1)
    weights = np.clip(changes * 65535.0 / np.maximum(members, 1), 1, 65535).astype(np.uint16)
    return Tables(fmt, thresholds, weights, _quantise(symbols))


def _survey(fmt, boxes, tile, at_most):
    members, changes = np.zeros((2, 256), np.int64)
    symbols = np.zeros((256, 256), np.int64)
    # Every `stride`-th tile of all boxes, so that each tensor has its share.
    total = sum(old.size for old, _ in boxes)
    stride = max(1, total // at_most)
    seen = 0
    for old, new in boxes:
        _check(old, fmt, tile)
        _check(new, fmt, tile)
        if not old.size:
            continue
        lead, rows, cols = old.shape
        down, across = -(-rows // tile[0]), -(-cols // tile[1])
        a, b = _flat(old), _flat(new)
        for t in range(-seen % stride, lead * down * across, stride):
            row, col = t // across % down * tile[0], t % across * tile[1]
            height, width = min(tile[0], rows - row), min(tile[1], cols - col)
            start = (t // across // down * rows + row) * cols + col
            loops.survey(
                a, b, start, width, cols, height * width, _numbers(fmt, _no_tables(fmt).thresholds),
                members, changes, symbols,
            )  # fmt: skip
        seen += lead * down * across
    return members, changes, symbols


def _best_classes(members, changes, symbols) -> list[int]:
    """First exponents of at most 8 classes that code a survey shortest.

    Dynamic programming over where classes end: cost of a class is the entropy of which of its
    elements change and to what, plus its table.
    """
    bins = _bins(members)
    edges = np.array([*bins, 256])
    sums = [
        np.concatenate([np.zeros_like(c[:1]), np.cumsum(c, axis=0)])[edges]
        for c in (members, changes, symbols)
    ]
    n = len(bins)
    cost = np.full((n, n + 1), np.inf)
    for i in range(n):
        m, k, s = (c[i + 1 :] - c[i] for c in sums)
        listed = np.count_nonzero(s, axis=1)
        cost[i, i + 1 :] = _entropy(k, m - k) + _entropy(*s.T) + 8.0 * listed
    best = cost[0].copy()
    came = [np.zeros(n + 1, np.int64)]
    for _ in range(CLASSES - 1):
        through = best[:n, None] + cost
        before = np.argmin(through, axis=0)
        fewer = through[before, np.arange(n + 1)] >= best
        came.append(np.where(fewer, -1, before))
        best = np.where(fewer, best, through[before, np.arange(n + 1)])
    firsts = []
    end = n
    for step in reversed(came):
        if step[end] >= 0:
            end = int(step[end])
            firsts.append(int(edges[end]))
        if end == 0:
            break
    return firsts[::-1]


def _bins(members: np.ndarray) -> list[int]:
    """Exponents at which a class may begin: each has at least 1/2^12 of the elements before."""
    floor = members.sum() / 4096
    bins = [0]
    held = 0
    for exponent, count in enumerate(members.tolist()):
        if held > floor and count:
            bins.append(exponent)
            held = 0
        held += count
    return bins


def _entropy(*counts: np.ndarray) -> np.ndarray:
    """Bits that code a sequence with these counts of each symbol, Σ n log2(N / n)."""
    stacked = np.stack(counts).astype(np.float64)
    total = stacked.sum(axis=0)
    return xlogy(total) - xlogy(stacked).sum(axis=0)


def xlogy(x: np.ndarray) -> np.ndarray:
    return x * np.log2(np.maximum(x, 1))


def _quantise(symbols: np.ndarray) -> np.ndarray:
    """Frequencies of sum 4096 for each class; symbols too rare for one share the escape."""
    frequencies = np.zeros((CLASSES, 256), np.uint16)
    pooled = symbols.sum(axis=0)
    for c, own in enumerate(symbols):
        # What a class has not shown it may still do: a little of what all of them did.
        counts = own + pooled / pooled.sum()
        share = counts / counts.sum() * (_PROBABILITIES - 1)
        row = np.floor(share + 0.5).astype(np.int64)
        row[loops.ESCAPE] = 1 + int(share[row == 0].sum())
        row[np.argmax(row[: loops.ESCAPE])] += _PROBABILITIES - row.sum()
        frequencies[c] = row
    return frequencies


def encode_box(
    old: np.ndarray | None,
    new: np.ndarray,
    fmt: ElementFormat,
    tile: Tile,
    tables: Tables,
    threads: int = 1,
    frame: DigestFrame | None = None,
) -> CodedTiles:
    """Code every tile of a box in its smallest mode.

    Args:
      old: (lead, rows, cols) of `fmt.bits_dtype`, C-contiguous; None: all tiles are dense.
      new: the same shape.
      fmt: of the elements.
      tile: R and C, at most 2^20 elements.
      tables: from `make_tables`.
      threads: how many work at once.
      frame: where the box lies in its tensor; given, the digest's change is summed up.
    """
    _check(new, fmt, tile)
    if old is not None:
        _check(old, fmt, tile)
        if old.shape != new.shape:
            raise ValueError(f"old and new must have one shape, got {old.shape} and {new.shape}")
    count = n_tiles(new.shape, tile) if new.size else 0
    modes = np.zeros(count, np.uint8)
    changed = np.zeros(count, np.uint32)
    sizes = np.zeros(count, np.uint32)
    flat = _flat(new)
    base = None if old is None else _flat(old)

    def encode(first: int, last: int) -> tuple[list[np.ndarray], np.ndarray]:
        sums = np.zeros(2, np.int64)
        assert base is not None
        chunks = []
        work = _workspace(tile, fmt)
        while first < last:
            out = np.empty(
                _CHUNK_BYTES + tile[0] * tile[1] * fmt.width_bits // 8 + loops.SLACK, np.uint8
            )
            first, used = loops.encode_tiles(
                base, flat, new.shape, tile, first, last, _numbers(fmt, tables.thresholds),
                tables.arrays, _frame(frame), work, out, modes, changed, sizes, sums,
            )  # fmt: skip
            chunks.append(out[:used])
        return chunks, sums

    if old is None:
        return _encode_dense(flat, new.shape, fmt, tile)
    done = _in_threads(encode, count, threads)
    chunks = [chunk for part, _ in done for chunk in part]
    data = chunks[0] if len(chunks) == 1 else np.concatenate([*chunks, np.empty(0, np.uint8)])
    sums = sum((s for _, s in done), np.zeros(2, np.int64)) & 0xFFFFFFFF
    return CodedTiles(modes, changed, sizes, data, _offsets(sizes), (int(sums[0]), int(sums[1])))


def _encode_dense(flat: np.ndarray, shape: tuple[int, ...], fmt: ElementFormat, tile: Tile):
    """Every tile of a box as it is."""
    _, rows, cols = shape
    t = np.arange(n_tiles(shape, tile) if flat.size else 0)
    down, across = -(-rows // tile[0]), -(-cols // tile[1])
    height = np.minimum(tile[0], rows - t // across % down * tile[0])
    elements = (height * np.minimum(tile[1], cols - t % across * tile[1])).astype(np.uint32)
    sizes = elements * np.uint32(fmt.width_bits // 8)
    out = np.empty(flat.nbytes, np.uint8)
    loops.encode_dense(flat, shape, tile, 0, t.size, fmt.width_bits // 8, out)
    modes = np.full(t.size, Mode.DENSE, np.uint8)
    return CodedTiles(modes, elements, sizes, out, _offsets(sizes))


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes, dtype=np.int64) - sizes


def decode_box(
    old: np.ndarray | None,
    out: np.ndarray,
    coded: CodedTiles,
    fmt: ElementFormat,
    tile: Tile,
    tables: Tables,
    tile_ids: np.ndarray,
    threads: int = 1,
    frame: DigestFrame | None = None,
) -> tuple[int, int]:
    """Decode tiles of a box.

    Args:
      old: what the tiles were coded against, C-contiguous; None: all tiles have to be dense.
      out: the same shape, C-contiguous; every listed tile is written whole, empty ones too, and
        nothing else. May be `old` itself.
      coded: the tiles; `mode`, `nnz`, `size`, `offset` and `data` may be anything.
      fmt: of the elements.
      tile: R and C, at most 2^20 elements.
      tables: as for `encode_box`.
      tile_ids: int64[T], which tile of the box each one is, none twice.
      threads: how many work at once.
      frame: where the box lies in its tensor; given, the digest's change is summed up, or the
        digest itself where there is no old box.

    Returns:
      By how much the two sums of the digest grow, modulo 2^32; 0 where no frame was given.

    Raises:
      Malformed: a stream is bad; its tile is as it was, others may be written.
    """
    _check(out, fmt, tile)
    ids = np.asarray(tile_ids, np.int64)
    count = n_tiles(out.shape, tile) if out.size else 0
    if ids.size and not (ids.min() >= 0 and ids.max() < count):
        raise ValueError(f"tile_ids must be within the box's {count} tiles")
    offsets = np.asarray(coded.offset, np.int64)
    ends = offsets + coded.size
    outside = (offsets < 0) | (ends > coded.data.size)
    if outside.any():
        bad = int(ids[np.argmax(outside)])
        raise Malformed(f"tile {bad}: its stream is outside the data", bad)
    base = _flat(out[:0]) if old is None else _flat(old)
    if old is not None:
        _check(old, fmt, tile)
        if old.shape != out.shape:
            raise ValueError(f"old and out must have one shape, got {old.shape} and {out.shape}")
    in_place = old is not None and old.ctypes.data == out.ctypes.data
    if not in_place and old is not None and np.may_share_memory(old, out):
        raise ValueError("out must be old itself or share no memory with it")
    data = coded.data.view()
    data.flags.writeable = False

    def decode(first: int, last: int) -> np.ndarray:
        sums = np.zeros(2, np.int64)
        bad, reason = loops.decode_tiles(
            base, out.reshape(-1), in_place, out.shape, tile, ids, first, last,
            _numbers(fmt, tables.thresholds), tables.arrays, _frame(frame),
            _workspace(tile, fmt), data,
            coded.mode, coded.nnz, offsets, coded.size, sums,
        )  # fmt: skip
        if reason != loops.OK:
            raise Malformed(f"tile {int(ids[bad])}: {REASONS[reason]}", int(ids[bad]))
        return sums

    done = _in_threads(decode, ids.size, threads)
    sums = sum(done, np.zeros(2, np.int64)) & 0xFFFFFFFF
    return int(sums[0]), int(sums[1])


def _check(box: np.ndarray, fmt: ElementFormat, tile: Tile) -> None:
    if box.ndim != 3 or box.dtype != fmt.bits_dtype or not box.flags.c_contiguous:
        raise ValueError(
            f"a box is a C-contiguous (lead, rows, cols) array of {fmt.bits_dtype}, "
            f"got {box.dtype}{list(box.shape)}; use `elements.as_bits` and `reshape`"
        )
    if not (tile[0] >= 1 and tile[1] >= 1 and tile[0] * tile[1] <= MAX_TILE_ELEMENTS):
        raise ValueError(f"a tile must have 1 to {MAX_TILE_ELEMENTS} elements, got {tile}")


def _flat(box: np.ndarray) -> np.ndarray:
    # Read-only always: numba compiles once more for each combination of writeable arguments.
    flat = box.reshape(-1)
    flat.flags.writeable = False
    return flat


def _numbers(fmt: ElementFormat, thresholds: np.ndarray) -> tuple:
    """What the loops know of a format and its classes; see `loops.scan`."""
    bits = fmt.bits_dtype.type
    shifted = thresholds.astype(np.int64) << fmt.mantissa_bits
    limits = np.concatenate([[0], np.minimum(shifted, fmt.sign_bit)]).astype(bits)
    classes = np.searchsorted(thresholds, np.arange(256), side="right").astype(np.uint8)
    return (
        fmt.width_bits, fmt.kind == "float", fmt.mantissa_bits, bits(fmt.magnitude_mask), limits,
        classes,
    )  # fmt: skip


def _frame(frame: DigestFrame | None) -> tuple[bool, int, int, int]:
    if frame is None:
        return False, 0, 0, 0
    return True, frame.origin, frame.lead_stride, frame.row_stride


def _workspace(tile: Tile, fmt: ElementFormat) -> tuple:
    """Scratch of one thread.

    Two tiles of elements; `reached` and `starts` of sub-blocks, totals of classes; records; symbols
    and order of the changed; and a coded tile with what `loops.read_entropy` wants around it.
    """
    blocks = -(-tile[0] * tile[1] // SUB_BLOCK)
    size = blocks * SUB_BLOCK
    return (
        np.empty(size, fmt.bits_dtype),
        np.empty(size, fmt.bits_dtype),
        np.empty((blocks + 1, CLASSES), np.uint32),
        np.empty(blocks, np.int64),
        np.empty(CLASSES, np.int64),
        np.empty((4, size + 8), np.uint32),
        np.empty((2, size), np.uint8),
        np.empty(size, np.uint32),
        np.empty(tile[0] * tile[1] * fmt.width_bits // 8 + 24, np.uint8),
    )


def _in_threads(function, count: int, threads: int) -> list:
    """Results of function(first, last) over equal ranges of `count` tiles."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    parts = min(threads, count)
    edges = [count * k // max(parts, 1) for k in range(parts + 1)]
    ranges = list(itertools.pairwise(edges))
    if parts <= 1:
        return [function(*r) for r in ranges]
    others = [_pool(threads - 1).submit(function, *r) for r in ranges[1:]]
    try:
        done = [function(*ranges[0])]
    finally:
        wait(others)  # they write into arrays that an error here would let go of
    return [*done, *(other.result() for other in others)]


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Kept from call to call: making threads takes longer than coding a small tensor."""
    return ThreadPoolExecutor(workers, thread_name_prefix="sparse_delta")


# A child process has the pools but none of their threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
