"""Where the changes of a tile belong, on a host that has not the tile's old values.

The stream of a tile names a changed element by its position, or by the class of its old value and
its rank in the tile's elements of that class. For the latter the counts of the classes in every
sub-block, which the device that holds the values sends (1/64 of the bytes of bf16), are enough to
tell the sub-block and the rank there; by these `reference.expand` finds the element.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kernels.sparse_delta import codec, loops
from kernels.sparse_delta.elements import ElementFormat
from kernels.sparse_delta.reference import CLASSES, EMPTY_SLOT, subblocks_of

# Thresholds of one class that all elements are of: a rank in it is an offset in the sub-block.
LONE = (0,) * (CLASSES - 1)
# Registers of a TPU have eight rows, in which its kernels turn slots.
_ROOM_STEP = 8


@dataclass(frozen=True)
class Located:
    """The changes of some tiles, by sub-block.

    Attributes:
      starts: int64[T + 1]; those of tile t are [starts[t], starts[t + 1]).
      places: u32, sub-block << 11 | class << 8 | rank among the sub-block's elements of the class.
      changes: u32, `reference.change_of` modulo 2^32.
      fullest: int64[T], changes of the sub-block that has most.
    """

    starts: np.ndarray
    places: np.ndarray
    changes: np.ndarray
    fullest: np.ndarray


def names_positions(modes: np.ndarray, tables: codec.Tables) -> np.ndarray:
    """Whether tiles name positions, so that `LONE` thresholds place their changes, bool[T]."""
    if _lone(tables):
        return np.ones(len(modes), bool)
    return (modes == codec.Mode.BLOCK_OFFSET) | (modes == codec.Mode.BITMAP)


def _lone(tables: codec.Tables) -> bool:
    _, _, shift, mask, _, classes = tables.numbers
    return loops.lone_class(mask, shift, classes) >= 0


def locate(
    coded: codec.CodedTiles,
    elements: np.ndarray,
    packed: np.ndarray | None,
    tables: codec.Tables,
    *,
    tile: codec.Tile,
    threads: int,
) -> Located:
    """Reads tiles of the modes that hold changes.

    Args:
      coded: the tiles; `mode`, `nnz`, `size`, `offset` and `data` may be anything.
      elements: int64[T], of each tile.
      packed: u32[T, 2, S], `reference.class_counts` of each tile by the tables' thresholds; None
        where all tiles name positions.
      tables: of the coder.
      tile: R and C of the grid.
      threads: how many work at once.

    Raises:
      codec.Malformed: a stream is bad; its `tile` is an index into `coded`.
    """
    fmt = tables.fmt
    offsets = np.asarray(coded.offset, np.int64)
    outside = (offsets < 0) | (offsets + coded.size > coded.data.size)
    if outside.any():
        raise codec.Malformed("its stream is outside the data", int(np.argmax(outside)))
    count = len(elements)
    # What the directory says is checked where the stream is read; here it bounds the memory.
    starts = np.concatenate([[0], np.cumsum(np.minimum(coded.nnz, elements), dtype=np.int64)])
    places, changes = np.empty((2, int(starts[-1])), np.uint32)
    fullest = np.zeros(count, np.int64)
    if packed is None:
        packed = np.zeros((0, 2, 0), np.uint32)
    lowest = int(np.count_nonzero(tables.thresholds <= 0))
    data = coded.data.view()
    data.flags.writeable = False

    def work(first: int, last: int) -> None:
        bad, reason = loops.locate_tiles(
            first, last, elements, packed, lowest, tables.numbers, tables.arrays,
            _scratch(tile, fmt), data, coded.mode, coded.nnz, offsets, coded.size,
            starts, places, changes, fullest,
        )  # fmt: skip
        if reason != loops.OK:
            raise codec.Malformed(codec.REASONS[reason], int(bad))

    _in_threads(work, count, threads)
    return Located(starts, places, changes, fullest)


def _scratch(tile: codec.Tile, fmt: ElementFormat) -> tuple[np.ndarray, ...]:
    size = tile[0] * tile[1]
    blocks = subblocks_of(tile)
    return (
        np.empty((4, size + 8), np.uint32),
        np.empty(size * fmt.width_bits // 8 + 24, np.uint8),
        np.empty((CLASSES, blocks), np.int64),
        np.empty(CLASSES, np.int64),
        np.empty(CLASSES, np.int64),
        np.empty(blocks, np.int64),
    )


def room_for(fullest: np.ndarray) -> int:
    """Slots a sub-block that hold so many changes."""
    return max(_ROOM_STEP, -(-int(fullest.max(initial=0)) // _ROOM_STEP) * _ROOM_STEP)


def fill(
    located: Located,
    chosen: np.ndarray,
    *,
    entries: int,
    room: int,
    tile: codec.Tile,
    fmt: ElementFormat,
    threads: int,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Slots of some tiles as `reference.Slots` has them: `keys` and `changes`.

    Args:
      located: the changes.
      chosen: int64, indices of the tiles, one an entry.
      entries: how many to make; those beyond `chosen` are empty.
      room: slots a sub-block, enough for the fullest of the chosen.
      tile: R and C of the grid.
      fmt: of the elements.
      threads: how many work at once.
    """
    shape = entries, room, subblocks_of(tile)
    wide = fmt.width_bits == 32
    words = np.full(shape, EMPTY_SLOT, np.uint32)
    extra = np.zeros(shape if wide else (0, 0, 0), np.uint32)
    chosen = np.asarray(chosen, np.int64)

    def work(first: int, last: int) -> None:
        held = np.empty(shape[2], np.int64)
        loops.fill_slots(
            first, last, chosen, located.starts, located.places, located.changes, wide, held,
            words, extra,
        )  # fmt: skip

    _in_threads(work, len(chosen), threads)
    return words, extra if wide else None


def _in_threads(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Calls work(first, last) for equal stretches of `count` items."""
    parts = min(threads, count)
    edges: Sequence[int] = [count * k // max(parts, 1) for k in range(parts + 1)]
    if parts <= 1:
        work(0, count)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))
