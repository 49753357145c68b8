"""Host coder of the tiles of one box: a survey makes tables, with which tiles are coded.

A box is a C-contiguous array (lead, rows, cols) of unsigned integers: the bits of a tensor, or of
a shard of it. Its tiles are 1 × R × C, clipped at the upper ends, numbered in row-major order. Each
tile is coded on its own, in the smallest of the modes. What the bytes mean is in FORMAT.md.
"""

import enum
import functools
import itertools
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kernels.sparse_delta import frames, loops
from kernels.sparse_delta.elements import ElementFormat

SUB_BLOCK = loops.SUB_BLOCK
CLASSES = loops.CLASSES
# Bounds what a receiver has to hold for one tile; `tiles.py` keeps to it.
MAX_TILE_ELEMENTS = 1 << 20
# Output is made in chunks of this many bytes, so that little memory is held beside the result.
_CHUNK_BYTES = 4 << 20

_PLANE_SIZE = struct.Struct("<I")
_ZSTD_LEVEL = 1  # finds the weights of bytes in a plane as well as higher ones

# A survey of this many elements, or of this many changes, is enough for the tables.
_SURVEY_ELEMENTS = 4 << 20
_SURVEY_CHANGES = 1 << 14
# Of a large survey every so many-th element is counted as a member of its class.
_SAMPLED_FROM, _SAMPLED_EVERY = 1 << 18, 8

Tile = tuple[int, int]


class Mode(enum.IntEnum):
    """How a tile is coded; the numbers are the format's."""

    EMPTY = loops.EMPTY
    BLOCK_OFFSET = loops.BLOCK_OFFSET
    BITMAP = loops.BITMAP
    ENTROPY = loops.ENTROPY
    DENSE = loops.DENSE
    PLANES = loops.PLANES


REASONS = {
    loops.SHORT: "it ends early",
    loops.LONG: "it has bytes left over",
    loops.COUNTS: "its number of changes contradicts the directory",
    loops.RANGE: "a position or value is out of range",
    loops.STATE: "the coder's final state is wrong",
    loops.PADDING: "unused bits are set",
    loops.BASE: "it needs old weights and there are none",
    loops.MODE: "its mode is unknown, or not for this payload",
    loops.FRAME: "a plane of bytes is no frame of its size",
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
      shares: u16[8], what share of all changes each class is expected to have; only ratios count.
      steps: u8[8], expected steps of the Rice codes of each class's gaps.
      lengths: u8[8, 256], bits of the prefix code of each symbol of changes in each class, 0 of
        those without one; of no rows where entropy mode is not used.
    """

    fmt: ElementFormat
    thresholds: np.ndarray
    shares: np.ndarray
    steps: np.ndarray
    lengths: np.ndarray

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the loops want: codes, symbols by the next bits, shares and steps.

        u32[8, 257], a code, lowest bit first, and from bit 16 on its length, at the end that of any
        symbol; u16[8, 2048], the symbol whose code the next bits begin with, and from bit 8 on the
        length of code and raw bits; int64[8] each of the others.
        """
        codes = np.zeros((len(self.lengths), 257), np.uint32)
        symbols = np.zeros((len(self.lengths), 1 << loops.CODE_BITS), np.uint16)
        loops.prefix_codes(self.lengths, codes, symbols)
        return codes, symbols, self.shares.astype(np.int64), self.steps.astype(np.int64)

    @functools.cached_property
    def numbers(self) -> tuple:
        """What the loops know of the format and its classes; see `loops.scan`."""
        classes = np.searchsorted(self.thresholds, np.arange(256), side="right").astype(np.uint8)
        fmt, bits = self.fmt, self.fmt.bits_dtype.type
        return (
            fmt.width_bits, fmt.kind == "float", fmt.mantissa_bits, bits(fmt.magnitude_mask),
            self.thresholds, classes,
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        """The tables as FORMAT.md lays them out."""
        if not self.lengths.size:
            return bytes([0])
        out = bytearray([1])
        out += self.thresholds.tobytes() + self.shares.astype("<u2").tobytes()
        out += self.steps.tobytes()
        before = None
        for row in self.lengths:
            if before is not None and np.array_equal(row, before):
                out.append(0)
                continue
            before = row
            listed = int(np.flatnonzero(row)[-1]) + 1
            out += bytes([listed, *row[:listed].tolist()])
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
        shares = np.frombuffer(reader.bytes(2 * CLASSES), "<u2").astype(np.uint16)
        steps = np.frombuffer(reader.bytes(CLASSES), np.uint8)
        if np.any((steps > loops.MAX_STEP) & (steps != loops.ALL)):
            raise Malformed(f"steps must be 0 … {loops.MAX_STEP} or {loops.ALL}: {steps.tolist()}")
        lengths = np.zeros((CLASSES, 256), np.uint8)
        for c in range(CLASSES):
            listed = reader.byte()
            if not listed and c:
                lengths[c] = lengths[c - 1]
                continue
            row = np.frombuffer(reader.bytes(listed), np.uint8)
            lengths[c, :listed] = row
            own = row[row > 0].astype(np.int64)
            shares_of_code = (1 << loops.CODE_BITS) >> own
            if np.any(own > loops.CODE_BITS) or shares_of_code.sum() != 1 << loops.CODE_BITS:
                raise Malformed(f"lengths of class {c} are no prefix code: {row.tolist()}")
        return Tables(fmt, thresholds, shares, steps, lengths), reader.at


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


def _no_tables(fmt: ElementFormat) -> Tables:
    return Tables(
        fmt,
        np.full(CLASSES - 1, 255, np.uint8),
        np.zeros(CLASSES, np.uint16),
        np.zeros(CLASSES, np.uint8),
        np.zeros((0, 256), np.uint8),
    )


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
    members, changes, symbols = _survey(fmt, boxes, tile)
    if not changes.any():
        return _no_tables(fmt)
    if not conditional:
        # No exponent is below a threshold of 0, so all elements are of the last class.
        lone = np.zeros(CLASSES, np.int64)
        lone[-1] = members.sum()
        pooled = np.zeros((CLASSES, 256), np.int64)
        pooled[-1] = symbols.sum(axis=0)
        return tables_of_counts(fmt, np.zeros(CLASSES - 1, np.uint8), lone, pooled)
    firsts = _best_classes(members, changes, symbols)
    thresholds = np.full(CLASSES - 1, 255, np.uint8)
    thresholds[: len(firsts) - 1] = firsts[1:]
    parts = [np.add.reduceat(counts, firsts) for counts in (members, symbols)]
    # Unused classes begin at exponent 255, infinities and NaN of bf16 and f32.
    pad = CLASSES - len(firsts)
    members, symbols = (np.concatenate([p, np.zeros((pad, *p.shape[1:]), int)]) for p in parts)
    return tables_of_counts(fmt, thresholds, members, symbols)


def tables_of_counts(
    fmt: ElementFormat, thresholds: np.ndarray, members: np.ndarray, symbols: np.ndarray
) -> Tables:
    """Tables for given classes.

    Args:
      fmt: of the elements.
      thresholds: u8[7], see `Tables`.
      members: int64[8], elements of each class, changed or not.
      symbols: int64[8, 256], how often each symbol of changes occurs in each class; not at all in
        a class that is not expected to have any, which then has the codes of another.
    """
    changes = symbols.sum(axis=1)
    shares = np.ceil(changes * (65535.0 / changes.sum())).astype(np.uint16)
    mean = np.maximum(members - changes, 0) / np.maximum(changes, 1)
    steps = np.clip(np.floor(np.log2(0.9624 * mean + 0.4812)), 0, loops.MAX_STEP).astype(np.uint8)
    lengths = np.zeros((CLASSES, 256), np.uint8)
    pooled = symbols.sum(axis=0)
    for c in range(CLASSES):
        if c and not changes[c]:
            lengths[c] = lengths[c - 1]
            continue
        counts = (symbols[c] if changes[c] else pooled).copy()
        if np.count_nonzero(counts) < 2:  # a code has two symbols at least
            counts[:2] = np.maximum(counts[:2], 1)
        loops.code_lengths(counts, lengths[c])
    return Tables(fmt, thresholds, shares, steps, lengths)


def _survey(
    fmt: ElementFormat, boxes: Sequence[tuple[np.ndarray, np.ndarray]], tile: Tile
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Elements, changes and symbols of changes by exponent, of as many tiles as are enough."""
    members, changes = np.zeros((2, 256), np.int64)
    symbols = np.zeros((256, 256), np.int64)
    tiles = [n_tiles(old.shape, tile) if old.size else 0 for old, _ in boxes]
    for old, new in boxes:
        _check(old, fmt, tile)
        _check(new, fmt, tile)
    elements = sum(old.size for old, _ in boxes)
    every = _SAMPLED_EVERY if elements >= _SAMPLED_FROM else 1
    owners = np.repeat(np.arange(len(tiles)), tiles)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    numbers = _no_tables(fmt).numbers
    seen = 0
    # Tiles in an order in which any beginning is spread over all of them.
    for t in _spread(len(owners)):
        old, new = boxes[owners[t]]
        own = int(within[t])
        _, rows, cols = old.shape
        down, across = -(-rows // tile[0]), -(-cols // tile[1])
        row, col = own // across % down * tile[0], own % across * tile[1]
        height, width = min(tile[0], rows - row), min(tile[1], cols - col)
        start = (own // across // down * rows + row) * cols + col
        loops.survey(
            _flat(old), _flat(new), start, width, cols, height * width, numbers, every,
            members, changes, symbols,
        )  # fmt: skip
        seen += height * width
        if seen >= _SURVEY_ELEMENTS or changes.sum() >= _SURVEY_CHANGES:
            break
    return members, changes, symbols


def _spread(n: int) -> Iterator[int]:
    """0 … n − 1, each next one far from those before: the bits of a counter reversed."""
    bits = max(n - 1, 0).bit_length()
    for k in range(1 << bits if n else 0):
        place = int(f"{k:0{bits}b}"[::-1], 2) if bits else 0
        if place < n:
            yield place


def _best_classes(members, changes, symbols) -> list[int]:
    """First exponents of at most 8 classes that code a survey shortest.

    Dynamic programming over where classes end: cost of a class is the entropy of which of its
    elements change and to what, plus its table.
    """
    bins = _bins(members)
    edges = np.array([*bins, 256])
    n = len(bins)
    cost = np.full((n, n + 1), np.inf)
    loops.class_costs(edges, members, changes, symbols, cost)
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
      old: (lead, rows, cols) of `fmt.bits_dtype`, C-contiguous; None: all tiles are dense, or in
        planes of bytes.
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
        work = _KEPT.workspace(tile, fmt)
        out = _KEPT.chunk(_CHUNK_BYTES + tile[0] * tile[1] * fmt.width_bits // 8 + loops.SLACK)
        while first < last:
            first, used = loops.encode_tiles(
                base, flat, new.shape, tile, first, last, tables.numbers,
                tables.arrays, _frame(frame), work, out, modes, changed, sizes, sums,
            )  # fmt: skip
            chunks.append(out[:used].copy())
        return chunks, sums

    if old is None:
        return _encode_dense(flat, new.shape, fmt, tile, threads)
    done = _in_threads(encode, count, threads)
    chunks = [chunk for part, _ in done for chunk in part]
    data = chunks[0] if len(chunks) == 1 else np.concatenate([*chunks, np.empty(0, np.uint8)])
    sums = sum((s for _, s in done), np.zeros(2, np.int64)) & 0xFFFFFFFF
    return CodedTiles(modes, changed, sizes, data, _offsets(sizes), (int(sums[0]), int(sums[1])))


def _encode_dense(
    flat: np.ndarray, shape: tuple[int, ...], fmt: ElementFormat, tile: Tile, threads: int
) -> CodedTiles:
    """Every tile of a box without what was before: by planes of bytes where that is smaller."""
    elements = _elements(shape, tile)
    item = fmt.width_bits // 8

    def encode(first: int, last: int) -> list[tuple[Mode, bytes]]:
        coded = []
        for t in range(first, last):
            dense = np.empty(int(elements[t]) * item, np.uint8)
            loops.encode_dense(flat, shape, tile, t, t + 1, item, dense)
            planes = _planes(dense.reshape(-1, item))
            smaller = len(planes) < dense.size
            coded.append((Mode.PLANES, planes) if smaller else (Mode.DENSE, dense.tobytes()))
        return coded

    coded = [tile for part in _in_threads(encode, elements.size, threads) for tile in part]
    modes = np.array([mode for mode, _ in coded], np.uint8)
    sizes = np.array([len(data) for _, data in coded], np.uint32)
    data = np.frombuffer(b"".join(data for _, data in coded), np.uint8)
    return CodedTiles(modes, elements.astype(np.uint32), sizes, data, _offsets(sizes))


def _planes(elements: np.ndarray) -> bytes:
    """Elements, u8[n, w/8], by planes: exponents are few and together, mantissas are noise."""
    out = []
    for plane in elements.T:
        raw = plane.tobytes()
        packed = frames.pack(raw, _ZSTD_LEVEL)
        out.append(min(packed, raw, key=len))
    return b"".join(part for plane in out for part in (_PLANE_SIZE.pack(len(plane)), plane))


def _from_planes(stream: memoryview, elements: int, item: int) -> np.ndarray:
    """Inverse of `_planes`.

    Raises:
      frames.BadFrame: it is not.
    """
    out = np.empty((elements, item), np.uint8)
    at = 0
    for plane in out.T:
        if at + _PLANE_SIZE.size > len(stream):
            raise frames.BadFrame("end early")
        (size,) = _PLANE_SIZE.unpack_from(stream, at)
        at += _PLANE_SIZE.size
        stored = stream[at : at + size]
        at += size
        raw = stored if size == elements else frames.unpack(stored, elements)
        if len(raw) != elements:
            raise frames.BadFrame("end early")
        plane[:] = np.frombuffer(raw, np.uint8)
    if at != len(stream):
        raise frames.BadFrame("have bytes left over")
    return out.reshape(-1)


def _elements(shape: Sequence[int], tile: Tile) -> np.ndarray:
    """Elements of every tile of a box, int64."""
    _, rows, cols = shape
    t = np.arange(n_tiles(shape, tile) if all(shape) else 0)
    down, across = -(-rows // tile[0]), -(-cols // tile[1])
    height = np.minimum(tile[0], rows - t // max(across, 1) % max(down, 1) * tile[0])
    return height * np.minimum(tile[1], cols - t % max(across, 1) * tile[1])


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
      old: what the tiles were coded against, C-contiguous; None: all tiles have to be dense or in
        planes of bytes.
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
    if np.any(coded.mode == Mode.PLANES):
        coded = _dense(coded, ids, _elements(out.shape, tile)[ids], fmt.width_bits // 8, threads)
        offsets = coded.offset
    data = coded.data.view()
    data.flags.writeable = False

    def decode(first: int, last: int) -> np.ndarray:
        sums = np.zeros(2, np.int64)
        bad, reason = loops.decode_tiles(
            base, out.reshape(-1), in_place, out.shape, tile, ids, first, last,
            tables.numbers, tables.arrays, _frame(frame),
            _KEPT.workspace(tile, fmt), data,
            coded.mode, coded.nnz, offsets, coded.size, sums,
        )  # fmt: skip
        if reason != loops.OK:
            raise Malformed(f"tile {int(ids[bad])}: {REASONS[reason]}", int(ids[bad]))
        return sums

    done = _in_threads(decode, ids.size, threads)
    sums = sum(done, np.zeros(2, np.int64)) & 0xFFFFFFFF
    return int(sums[0]), int(sums[1])


def _dense(
    coded: CodedTiles, ids: np.ndarray, elements: np.ndarray, item: int, threads: int
) -> CodedTiles:
    """The same tiles, those in planes as dense ones.

    Raises:
      Malformed: planes are not of the tile's size.
    """
    split = coded.mode == Mode.PLANES
    size = np.where(split, elements * item, coded.size).astype(np.uint32)
    offset = _offsets(size)
    data = np.empty(int(size.sum(dtype=np.int64)), np.uint8)

    def unpack(first: int, last: int) -> None:
        for k in range(first, last):
            start = int(coded.offset[k])
            dense = coded.data[start : start + int(coded.size[k])]
            if split[k]:
                try:
                    dense = _from_planes(dense.data, int(elements[k]), item)
                except frames.BadFrame as error:
                    tile, reason = int(ids[k]), REASONS[loops.FRAME]
                    raise Malformed(f"tile {tile}: {reason}: they {error}", tile) from error
            data[offset[k] : offset[k] + dense.size] = dense

    _in_threads(unpack, ids.size, threads)
    mode = np.where(split, np.uint8(Mode.DENSE), coded.mode)
    return CodedTiles(mode, coded.nnz, size, data, offset)


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


def _frame(frame: DigestFrame | None) -> tuple[bool, int, int, int]:
    if frame is None:
        return False, 0, 0, 0
    return True, frame.origin, frame.lead_stride, frame.row_stride


def _workspace(tile: Tile, fmt: ElementFormat) -> tuple:
    """Scratch of one thread.

    Two tiles of elements; what `loops.scan` and `loops.place_records` want; totals of classes;
    records; gaps and codes by class; and a coded tile with what the loops want around it.
    """
    size = -(-tile[0] * tile[1] // SUB_BLOCK) * SUB_BLOCK
    return (
        np.empty(size, fmt.bits_dtype),
        np.empty(size, fmt.bits_dtype),
        (np.empty((64, CLASSES + 1), np.uint64), np.empty((64, CLASSES + 1), np.int64)),
        (
            np.empty(2 * CLASSES + 2, np.uint32),
            np.empty(CLASSES, np.uint32),
            np.empty(4 * CLASSES + 4, np.uint64),
            *np.empty((3, CLASSES), np.int64),
        ),
        np.empty(CLASSES, np.int64),
        np.empty((4, size + 8), np.uint32),
        np.empty((2, size), np.uint32),
        np.empty(tile[0] * tile[1] * fmt.width_bits // 8 + loops.SLACK, np.uint8),
    )


class _Kept(threading.local):
    """Scratch that each thread keeps from call to call: fresh memory costs a fault for each page.

    Pages of it that no tile needed were never mapped.
    """

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._workspaces: dict[int, tuple[int, tuple]] = {}

    def chunk(self, size: int) -> np.ndarray:
        """Bytes, at least `size`."""
        if self._chunk.size < size:
            self._chunk = np.empty(size, np.uint8)
        return self._chunk

    def workspace(self, tile: Tile, fmt: ElementFormat) -> tuple:
        """`_workspace` of the tile's size; only the last size of a format is kept."""
        size = tile[0] * tile[1]
        kept = self._workspaces.get(fmt.width_bits)
        if kept is None or kept[0] != size:
            kept = size, _workspace(tile, fmt)
            self._workspaces[fmt.width_bits] = kept
        return kept[1]


_KEPT = _Kept()


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
