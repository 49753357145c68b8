"""The tiles of a tensor: boxes in global coordinates that no shard boundary cuts.

A tensor is viewed in three dimensions, (lead, rows, cols), by merging neighbouring dimensions at
two split points; tiles are boxes 1 × R × C of that view, clipped at its upper ends and numbered in
row-major order. Because tiles are defined by the tensor and not by who holds it, each trainer
process encodes the tiles that lie in its shards and each actor decodes those that it needs.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# Large enough that a tile's directory entry (about 3 bytes) is small beside its content at .1 %
# of changes, and small enough that the tiles of one matrix keep all threads busy.
TILE_ELEMENTS = 1 << 17
# 512 columns of 2 bytes are 16 cache lines in a row, and divide the usual tensor-parallel shards.
TILE_COLUMNS = 512
# Columns of an accelerator's vector register; a narrower tile wastes lanes.
_LANES = 128
# Elements whose ranks the kernels count together.
_SUBBLOCK = 256
# What it costs to lay a tensor out anew on none, one and both of TPU and GPU, in units of a quarter
# of halving its tiles.
_RELAYOUT_COSTS = 0.0, 7.5, 9.0
# No tile may be larger: bounds what a receiver has to hold for one of them.
MAX_TILE_ELEMENTS = 1 << 20

Box = tuple[tuple[int, int], ...]  # start and stop along each dimension of the tensor


@dataclass(frozen=True)
class TileGrid:
    """How one tensor is cut into tiles.

    Attributes:
      shape: of the whole tensor.
      splits: s1 ≤ s2: lead = Π shape[:s1], rows = Π shape[s1:s2], cols = Π shape[s2:].
      tile: R rows and C columns.
    """

    shape: tuple[int, ...]
    splits: tuple[int, int]
    tile: tuple[int, int]

    def __post_init__(self) -> None:
        first, second = self.splits
        rows, cols = self.tile
        if not 0 <= first <= second <= len(self.shape):
            raise ValueError(f"splits must be ordered within the shape: {self}")
        if rows < 1 or cols < 1 or rows * cols > MAX_TILE_ELEMENTS:
            raise ValueError(f"a tile has 1 to {MAX_TILE_ELEMENTS} elements: {self}")

    @functools.cached_property
    def extents(self) -> tuple[int, int, int]:
        """Lead, rows and cols of the view."""
        first, second = self.splits
        groups = (self.shape[:first], self.shape[first:second], self.shape[second:])
        lead, rows, cols = map(math.prod, groups)
        return lead, rows, cols

    @functools.cached_property
    def counts(self) -> tuple[int, int, int]:
        """Number of tiles along lead, rows and cols."""
        lead, rows, cols = self.extents
        return lead, -(-rows // self.tile[0]), -(-cols // self.tile[1])

    @property
    def n_tiles(self) -> int:
        return math.prod(self.counts)

    def places(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lead index, first row and first column of tiles, int64."""
        _, down, across = self.counts
        rest, col = np.divmod(ids, across)
        lead, row = np.divmod(rest, down)
        return lead, row * self.tile[0], col * self.tile[1]

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """Elements of tiles, int64; fewer where the grid is clipped."""
        _, row, col = self.places(ids)
        _, rows, cols = self.extents
        return np.minimum(self.tile[0], rows - row) * np.minimum(self.tile[1], cols - col)

    def origins(self, ids: np.ndarray) -> np.ndarray:
        """Row-major index in the tensor of the first element of tiles, int64."""
        lead, row, col = self.places(ids)
        _, rows, cols = self.extents
        return (lead * rows + row) * cols + col


@functools.lru_cache(maxsize=1 << 14)
def choose_grid(shape: tuple[int, ...], shard_shapes: tuple[tuple[int, ...], ...] = ()) -> TileGrid:
    """The grid of a tensor whose tiles no shard cuts.

    Preferred are tiles of about `TILE_ELEMENTS` that the kernels of accelerators read where they
    lie (`_relayouts`), even if they are up to four times smaller for that.

    Args:
      shape: of the tensor.
      shard_shapes: shapes of one shard in each sharding that matters: the trainer's and those of
        the receivers. Boundaries are taken to be at their multiples.

    >>> choose_grid((4096, 14336)).tile
    (256, 512)
    >>> choose_grid((4096, 14336), ((512, 14336), (4096, 1792))).tile  # 256 divides 1792
    (512, 256)
    >>> choose_grid((4096, 11008), ((512, 11008), (4096, 1376))).tile  # 344 does, of 1376
    (256, 344)
    """
    if 0 in shape:
        return TileGrid(shape, (0, 0), (1, 1))
    units = [math.gcd(size, *cuts) for size, *cuts in zip(shape, *shard_shapes, strict=True)]
    whole = min(TILE_ELEMENTS, math.prod(shape))
    best: tuple[float, TileGrid] | None = None
    for second in range(len(shape) + 1):
        for first in range(second + 1):
            rows, row_unit = _group(shape[first:second], units[first:second])
            cols, col_unit = _group(shape[second:], units[second:])
            splits = (0, first, second, len(shape))
            torn = sum(_torn(shape[a:b], units[a:b]) for a, b in itertools.pairwise(splits))
            for high, wide in _candidates(rows, row_unit, cols, col_unit):
                # Tiles that are too small cost most, then shards in many parts, then narrow tiles.
                # A view that is near square has the matrix's own dimensions, along which
                # receivers cut.
                cost = (
                    4.0 * math.log2(max(1.0, whole / (high * wide)))
                    + _RELAYOUT_COSTS[_relayouts(rows, cols, (high, wide))]
                    + math.log2(max(1.0, _LANES / wide))
                    + 0.25 * abs(math.log2(rows / cols))
                    + 3.0 * torn
                )
                if best is None or cost < best[0]:
                    best = cost, TileGrid(shape, (first, second), (high, wide))
    assert best is not None
    return best[1]


def _candidates(rows: int, row_unit: int, cols: int, col_unit: int) -> Iterator[tuple[int, int]]:
    """Tiles that cut no shard: those of handy columns for kernels, then a large one."""
    row_unit_or_all, col_unit_or_all = row_unit or rows, col_unit or cols
    for streams in (2, 1, 4, 8):
        wide = streams * _SUBBLOCK
        if col_unit_or_all % wide:
            continue
        for step in (_gpu_rows(streams), _tpu_rows(streams)):
            high = _largest(row_unit_or_all, step, TILE_ELEMENTS // wide)
            if high:
                yield high, wide
    wide = _fit(cols, col_unit, TILE_COLUMNS)
    high = _fit(rows, row_unit, TILE_ELEMENTS // wide)
    yield high, max(wide, _fit(cols, col_unit, TILE_ELEMENTS // high))


def _relayouts(rows: int, cols: int, tile: tuple[int, int]) -> int:
    """On how many of TPU and GPU a box has to be laid out anew for the kernels, which costs them
    two to three times the time.

    Both want whole tiles of a number of columns that is a power of two times 256, and rows in
    registers of a TPU, or in fours of groups of 32 sub-blocks for the warps of a GPU. `tpu_layout`
    and `gpu_grid` decide it for the single shard.
    """
    streams, rest = divmod(tile[1], _SUBBLOCK)
    whole = rows % tile[0] == 0 and cols % tile[1] == 0
    if rest or not whole or streams & (streams - 1):
        return 2
    on_tpu = streams <= 8 and tile[0] % _tpu_rows(streams) == 0
    on_gpu = streams <= 32 and tile[0] % _gpu_rows(streams) == 0
    return (not on_tpu) + (not on_gpu)


def _tpu_rows(streams: int) -> int:
    """What the rows of a tile of bf16 with so many sub-blocks a row are a multiple of."""
    return 32 if streams == 1 else 16


def _gpu_rows(streams: int) -> int:
    return max(16, 128 // streams)


def _largest(multiple: int, step: int, limit: int) -> int:
    """The largest divisor of a number that is a multiple of `step`, up to a limit; 0 for none."""
    if multiple % step:
        return 0
    rest = multiple // step
    return step * next((n for n in range(limit // step, 0, -1) if rest % n == 0), 0)


def _group(sizes: Sequence[int], units: Sequence[int]) -> tuple[int, int]:
    """Extent of merged dimensions and what a tile's must divide there; 0 where nothing cuts it."""
    unit = 0
    rest = 1
    for size, own in zip(reversed(sizes), reversed(units), strict=True):
        if own != size:
            unit = math.gcd(unit, own * rest)
        rest *= size
    return rest, unit


def _torn(sizes: Sequence[int], units: Sequence[int]) -> bool:
    """Whether a shard is more than one stretch of merged dimensions."""
    inner = [own != size for size, own in zip(sizes, units, strict=True) if size > 1][1:]
    return any(inner)


def _fit(extent: int, unit: int, wanted: int) -> int:
    """The largest size up to `wanted` that divides `unit`, or that is handy where it is 0."""
    wanted = max(1, min(wanted, extent))
    if unit:
        return next(size for size in range(wanted, 0, -1) if unit % size == 0)
    if wanted < extent and wanted > _LANES:
        return wanted - wanted % _LANES
    return wanted


@dataclass(frozen=True)
class Part:
    """A part of a shard that is one box of the tensor's view, without gaps.

    Attributes:
      cut: its place in the shard's own view (lead, rows, cols).
      ids: int64, numbers of its tiles in the order of its own grid of tiles 1 × R × C; None where
        it cuts a tile.
      origin: row-major index in the tensor of its first element. That index grows by rows · cols
        along lead, by cols along rows and by 1 along cols, all of the tensor's view.
    """

    cut: tuple[slice, slice, slice]
    ids: np.ndarray | None
    origin: int


@functools.lru_cache(maxsize=1 << 14)
def parts(grid: TileGrid, box: Box) -> tuple[Part, ...]:
    """A shard as boxes of the tensor's view: one, unless it splits dimensions that are merged.

    Tile numbers rise from part to part only where there is one part.
    """
    first, second = grid.splits
    groups = slice(0, first), slice(first, second), slice(second, len(grid.shape))
    runs = [_runs(grid.shape[group], box[group]) for group in groups]
    (_, rows, cols), (_, down, across) = grid.extents, grid.counts
    found = []
    for one in itertools.product(*runs):
        axes = [
            _tiles_of(begin, size, unit, extent)
            for (_, begin, size), unit, extent in zip(
                one, (1, *grid.tile), grid.extents, strict=True
            )
        ]
        ids = None
        lead, row, col = axes
        if lead is not None and row is not None and col is not None:
            ids = ((lead[:, None, None] * down + row[:, None]) * across + col).reshape(-1)
            ids.flags.writeable = False
        cut = tuple(slice(start, start + size) for start, _, size in one)
        origin = (one[0][1] * rows + one[1][1]) * cols + one[2][1]
        found.append(Part((cut[0], cut[1], cut[2]), ids, origin))
    return tuple(found)


def _runs(shape: tuple[int, ...], box: Box) -> list[tuple[int, int, int]]:
    """Stretches of merged indices that a box holds: local start, global start, length."""
    begins, run = _run_starts(shape, box)
    return [(at * run, begin, run) for at, begin in enumerate(begins.tolist())] if run else []


def _run_starts(shape: tuple[int, ...], box: Box) -> tuple[np.ndarray, int]:
    """First merged index of every stretch, and their length, which is one and the same."""
    lengths = [stop - start for start, stop in box]
    split = len(shape)
    run = 1
    while split > 0:
        split -= 1
        run *= lengths[split]
        if lengths[split] < shape[split]:
            break
    while split > 0 and lengths[split - 1] == 1:  # one index: nothing to jump over
        split -= 1
    begin = np.zeros(1, np.int64)
    for axis, (size, (start, stop)) in enumerate(zip(shape, box, strict=True)):
        inside = np.arange(start, stop) if axis < split else np.asarray([start])
        begin = (begin[:, None] * size + inside).reshape(-1)
    return begin, run


def _tiles_of(begin: int, size: int, unit: int, extent: int) -> np.ndarray | None:
    """Numbers of the tiles of `unit` indices in a stretch, or None where it cuts one."""
    if begin % unit or ((begin + size) % unit and begin + size != extent):
        return None
    return np.arange(begin // unit, -(-(begin + size) // unit))


def coverage(grid: TileGrid, boxes: Sequence[Box], ids: np.ndarray) -> np.ndarray:
    """How many elements of each tile lie in some disjoint boxes.

    Args:
      grid: of the whole tensor.
      boxes: disjoint.
      ids: tiles, int64.

    Returns:
      int64, one a tile; at most `grid.sizes(ids)`.
    """
    first, second = grid.splits
    _, down, across = grid.counts
    rest, col = np.divmod(ids, max(across, 1))
    lead, row = np.divmod(rest, max(down, 1))
    total = np.zeros(len(ids), np.int64)
    for box in boxes:
        # A box and a tile are both products over the three groups, and so is what they share.
        shared = np.ones(len(ids), np.int64)
        for group, size, index in (
            (slice(0, first), 1, lead),
            (slice(first, second), grid.tile[0], row),
            (slice(second, len(grid.shape)), grid.tile[1], col),
        ):
            shared *= _shared_along(grid.shape[group], box[group], size, index)
        total += shared
    return total


def _shared_along(shape: tuple[int, ...], box: Box, size: int, index: np.ndarray) -> np.ndarray:
    extent = math.prod(shape)
    starts, run = _run_starts(shape, box)
    if not run:
        return np.zeros(len(index), np.int64)

    def before(edge: np.ndarray) -> np.ndarray:
        """How many indices of the box lie below an edge."""
        full = np.searchsorted(starts, edge, side="right") - 1
        part = np.minimum(edge - starts[full], run)
        return np.where(full < 0, 0, full * run + part)

    begin = index * size
    return before(np.minimum(begin + size, extent)) - before(begin)


@dataclass(frozen=True)
class Piece:
    """One distinct box of a tensor, of which this process holds a copy.

    Attributes:
      box: in global coordinates.
      devices: those of this process that hold it, by rising id.
      owned: whether this process is the one that speaks for it: the device with the lowest id
        of all that hold it is here.
    """

    box: Box
    devices: tuple[Any, ...]
    owned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)


@functools.lru_cache(maxsize=1 << 14)
def pieces(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """What this process holds of a tensor, in the order of the boxes."""
    holders: dict[Box, list[Any]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        box = tuple(cut.indices(size)[:2] for cut, size in zip(index or (), shape, strict=True))
        holders.setdefault(box, []).append(device)
    found = []
    for box in sorted(holders):
        devices = sorted(holders[box], key=lambda device: device.id)
        here = tuple(d for d in devices if d.process_index == jax.process_index())
        if here:
            found.append(Piece(box, here, devices[0] is here[0]))
    return tuple(found)


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape)


def box_view(grid: TileGrid, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shard's own lead, rows and cols, at the splits of the tensor."""
    first, second = grid.splits
    return math.prod(shape[:first]), math.prod(shape[first:second]), math.prod(shape[second:])
