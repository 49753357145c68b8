"""Host coder of the tiles of one box: a survey makes tables, with which tiles are coded.

A box is a C-contiguous array (lead, rows, cols) of unsigned integers: the bits of a tensor, or of
a shard of it. Its tiles are 1 × R × C, clipped at the upper ends, numbered in row-major order. Each
tile is coded on its own, in the smallest of the modes. What the bytes mean is in FORMAT.md.
"""

import enum
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Tables:
    """What the tiles of a format share.

    Attributes:
      fmt: the element format they are for.
      thresholds: t_1 ≤ … ≤ t_7, u8: an element's class is the number of thresholds that its old
        exponent is not below.
    """

    fmt: ElementFormat
    thresholds: np.ndarray

    def to_bytes(self) -> bytes:
        return self.thresholds.tobytes()

    @staticmethod
    def from_bytes(data: memoryview | bytes, fmt: ElementFormat) -> "tuple[Tables, int]":
        """Read tables of a payload.

        Returns:
          The tables and the number of bytes read.

        Raises:
          Malformed: not what `to_bytes` writes.
        """
        view = np.frombuffer(data, np.uint8)
        if view.size < CLASSES - 1:
            raise Malformed("tables end early")
        thresholds = view[: CLASSES - 1].copy()
        if np.any(thresholds[1:] < thresholds[:-1]):
            raise Malformed(f"thresholds must not decrease, got {thresholds.tolist()}")
        return Tables(fmt, thresholds), CLASSES - 1


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
    offset: np.ndarray = field(default=None)  # type: ignore[assignment]  # set below
    digest_change: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.offset is None:
            ends = np.cumsum(self.size, dtype=np.int64)
            object.__setattr__(self, "offset", ends - self.size)


def n_tiles(shape: Sequence[int], tile: Tile) -> int:
    """Number of tiles of a box of `shape`."""
    lead, rows, cols = shape
    return lead * -(-rows // tile[0]) * -(-cols // tile[1])


def make_tables(
    fmt: ElementFormat, boxes: Sequence[tuple[np.ndarray, np.ndarray]], tile: Tile
) -> Tables:
    """Survey pairs of boxes and make the tables that code them shortest.

    Args:
      fmt: of all boxes.
      boxes: old and new, each (lead, rows, cols) of `fmt.bits_dtype`.
      tile: R and C.
    """
    return Tables(fmt, np.full(CLASSES - 1, 255, np.uint8))


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
        sums = np.zeros(4, np.int64)
        assert base is not None
        chunks = []
        work = _workspace(tile, fmt)
        while first < last:
            out = np.empty(_CHUNK_BYTES + tile[0] * tile[1] * fmt.width_bits // 8, np.uint8)
            first, used = loops.encode_tiles(
                base, flat, new.shape, tile, first, last, _numbers(fmt), _limits(tables),
                (), _frame(frame), work, out, modes, changed, sizes, sums,
            )  # fmt: skip
            chunks.append(out[:used])
        return chunks, sums

    if old is None:
        return _encode_dense(flat, new.shape, fmt, tile, count)
    done = _in_threads(encode, count, threads)
    chunks = [chunk for part, _ in done for chunk in part]
    data = chunks[0] if len(chunks) == 1 else np.concatenate([*chunks, np.empty(0, np.uint8)])
    sums = sum((s for _, s in done), np.zeros(4, np.int64)) & 0xFFFFFFFF
    return CodedTiles(modes, changed, sizes, data, digest_change=(int(sums[0]), int(sums[1])))


def _encode_dense(flat, shape, fmt, tile, count):
    rows = np.arange(count)
    across = -(-shape[2] // tile[1])
    down = -(-shape[1] // tile[0])
    height = np.minimum(tile[0], shape[1] - rows // across % down * tile[0])
    width = np.minimum(tile[1], shape[2] - rows % across * tile[1])
    elements = (height * width).astype(np.uint32)
    item = fmt.width_bits // 8
    out = np.empty(flat.size * item, np.uint8)
    loops.encode_dense(flat, shape, tile, 0, count, item, out)
    modes = np.full(count, Mode.DENSE, np.uint8)
    return CodedTiles(modes, elements, elements * np.uint32(item), out)


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
        sums = np.zeros(4, np.int64)
        bad, reason = loops.decode_tiles(
            base, out.reshape(-1), in_place, out.shape, tile, ids, first, last,
            _numbers(fmt), _limits(tables), (), _frame(frame), _workspace(tile, fmt), data,
            coded.mode, coded.nnz, offsets, coded.size, sums,
        )  # fmt: skip
        if reason != loops.OK:
            raise Malformed(f"tile {int(ids[bad])}: {REASONS[reason]}", int(ids[bad]))
        return sums

    done = _in_threads(decode, ids.size, threads)
    sums = sum(done, np.zeros(4, np.int64)) & 0xFFFFFFFF
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


def _limits(tables: Tables) -> np.ndarray:
    fmt = tables.fmt
    if fmt.kind != "float":
        limits = [0 if t == 0 else fmt.sign_bit for t in tables.thresholds.tolist()]
    else:
        limits = [min(t << fmt.mantissa_bits, fmt.sign_bit) for t in tables.thresholds.tolist()]
    return np.array(limits, fmt.bits_dtype)


def _numbers(fmt: ElementFormat):
    return fmt.width_bits, fmt.kind == "float", fmt.bits_dtype.type(fmt.magnitude_mask)


def _frame(frame: DigestFrame | None) -> tuple[bool, int, int, int]:
    return (False, 0, 0, 0) if frame is None else (True, *frame)


def _workspace(tile: Tile, fmt: ElementFormat):
    blocks = -(-tile[0] * tile[1] // SUB_BLOCK)
    size = blocks * SUB_BLOCK
    return (
        np.empty(size, fmt.bits_dtype),
        np.empty(size, fmt.bits_dtype),
        np.empty((CLASSES, blocks), np.uint16),
        np.empty(CLASSES, np.int64),
        np.empty((4, size), np.uint32),
        np.empty((2, size), np.uint8),
    )


def _in_threads(function, count: int, threads: int) -> list:
    """Results of function(first, last) over equal ranges of `count` tiles."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    parts = min(threads, count)
    edges = [count * k // max(parts, 1) for k in range(parts + 1)]
    ranges = list(zip(edges, edges[1:], strict=False))
    if parts <= 1:
        return [function(*r) for r in ranges]
    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(lambda r: function(*r), ranges))
