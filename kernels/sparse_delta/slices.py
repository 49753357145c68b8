"""Working through a shard slice by slice, where kernels do not take it as it lies.

Kernels read whole tiles of a two-dimensional array. A shard whose view (`tiles.box_view`) is not
that array in memory has to be laid out for them, and what they made of it laid out back: copies of
it, on TPUs in tiles of registers that narrow dimensions fill by a part only, so up to 32 times its
bytes. Made of one slice after the other, they are those of one slice. A shard that lies as the
kernels want it is no slices: to take one out would be a copy, too.

A slice is about 8 MiB as it is laid out, or one index of the dimension that is cut (whole tiles of
it) where that is more: only one dimension is cut, the outermost one along which tiles are numbered
first. A tensor of (2, 1024, 4096, 24) is two slices of 192 MiB on a TPU.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from kernels.sparse_delta import gpu_grid, tpu_layout
from kernels.sparse_delta.backends import Backend
from kernels.sparse_delta.reference import Slots, tile_counts
from kernels.sparse_delta.tiles import TileGrid, box_view

# As it is laid out for the kernels. Large enough that the microseconds of a step are few beside
# those that moving the slice takes, and small beside the weights of any model that serves.
_SLICE_BYTES = 1 << 23
# Of a register tile as XLA:TPU lays out arrays of any element.
_SUBLANES, _LANES = 8, 128


@dataclass(frozen=True)
class Slice:
    """One stretch of a shard.

    Attributes:
      axis: the dimension that is cut.
      start: its first index.
      size: how many.
      first_tile: number in the shard of its first tile.
      tiles: how many; they follow each other.
      along: the axis of the shard's view that is cut.
      view_start: where the slice begins along it.
    """

    axis: int
    start: int | Array
    size: int
    first_tile: int | Array
    tiles: int
    along: int
    view_start: int | Array

    def take(self, shard: Array) -> Array:
        """The slice of an array."""
        return lax.dynamic_slice_in_dim(shard, self.start, self.size, self.axis)

    def put(self, shard: Array, part: Array) -> Array:
        """The array with another slice."""
        return lax.dynamic_update_slice_in_dim(shard, part, self.start, self.axis)

    def put_tiles(self, found: Array, part: Array) -> Array:
        """What was found in all tiles, [T, ...], with what was in those of the slice."""
        return lax.dynamic_update_slice_in_dim(found, part, self.first_tile, 0)

    def those(
        self, tiles: Int32[Array, " L"], used: Array
    ) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
        """First and end of those tiles of a rising list, of which `used` count, that lie in it."""
        counted = jnp.arange(len(tiles)) < used
        begin = jnp.sum(counted & (tiles < self.first_tile), dtype=jnp.int32)
        end = jnp.sum(counted & (tiles < self.first_tile + self.tiles), dtype=jnp.int32)
        return begin, end

    def slots(self, slots: Slots) -> Slots:
        """The changes in the slice, whose tiles are numbered in it."""
        begin, end = self.those(slots.tiles, slots.used)
        entries = min(len(slots.tiles), self.tiles)
        # The unused end of the list repeats its last number.
        last = jnp.clip(end - 1, 0, len(slots.tiles) - 1)
        index = jnp.minimum(begin + jnp.arange(entries, dtype=jnp.int32), last)
        numbers = jnp.clip(slots.tiles[index] - self.first_tile, 0, self.tiles - 1)
        changes = None if slots.changes is None else slots.changes[index]
        return Slots(numbers, end - begin, slots.keys[index], changes)


@dataclass(frozen=True)
class Slices:
    """A shard as stretches of whole tiles along one of its dimensions; the last may be shorter.

    Attributes:
      shape: of the shard.
      axis: the dimension that is cut.
      size: its indices in a slice.
      tiles: of a slice.
      total: tiles of the shard.
      along: the axis of the shard's view that is cut, and by what extent.
      laid_out_bytes: of a slice as it is laid out for the kernels; 0 where the shard lies so.
    """

    shape: tuple[int, ...]
    axis: int
    size: int
    tiles: int
    total: int
    along: tuple[int, int]
    laid_out_bytes: int

    @property
    def whole(self) -> bool:
        """Whether all is one slice."""
        return self.tiles == self.total

    @property
    def working_bytes(self) -> int:
        """What compilers keep beside the shard: a slice as it is laid out, before and after."""
        return 2 * self.laid_out_bytes

    @property
    def _full(self) -> int:
        return self.shape[self.axis] // self.size if self.shape else 1

    @property
    def _rest(self) -> int:
        """Indices of the last one where it is shorter; 0 where none is."""
        return self.shape[self.axis] - self._full * self.size if self.shape else 0

    def _slice(self, i: int | Array, *, last: bool = False) -> Slice:
        axis, extent = self.along
        size = self._rest if last else self.size
        tiles = self.total - self._full * self.tiles if last else self.tiles
        return Slice(
            self.axis, i * self.size, size, i * self.tiles, tiles, axis, i * extent
        )  # fmt: skip

    def __iter__(self) -> Iterator[Slice]:
        """The slices, known while they are traced."""
        yield from map(self._slice, range(self._full))
        if self._rest:
            yield self._slice(self._full, last=True)

    def fold(self, step: Callable[[Slice, Any], Any], state: Any) -> Any:
        """Takes a pytree of arrays from slice to slice, in a loop."""
        state = lax.fori_loop(0, self._full, lambda i, own: step(self._slice(i), own), state)
        if self._rest:
            state = step(self._slice(self._full, last=True), state)
        return state

    def map(self, find: Callable[..., Any], *shards: Array) -> Any:
        """What a function finds in every tile, when it is given one slice after the other.

        Args:
          find: from slices of the shards to a pytree of arrays whose first axis are the tiles.
          *shards: of this shape.
        """
        if self.whole:
            return find(*shards)

        def one(own: Slice) -> Any:
            return find(*(own.take(shard) for shard in shards))

        def step(own: Slice, found: Any) -> Any:
            return jax.tree.map(own.put_tiles, found, one(own))

        shapes = jax.eval_shape(lambda: one(self._slice(0)))
        nothing = jax.tree.map(lambda x: jnp.zeros((self.total, *x.shape[1:]), x.dtype), shapes)
        return self.fold(step, nothing)


def slices(shape: tuple[int, ...], grid: TileGrid, width: int, backend: Backend) -> Slices:
    """How a shard is worked through; one slice that is all of it, where kernels take it so.

    Slices have about `_SLICE_BYTES` as they are laid out, but at least those of one index of the
    dimension that is cut, which is the outermost one longer than 1 of the outermost axis of the
    view that has several tiles, and of as many indices as make whole tiles.

    Args:
      shape: of the shard, which cuts no tile; not empty.
      grid: of the whole tensor.
      width: bits of an element.
      backend: which kernels.
    """
    view = box_view(grid, shape)
    counts = tile_counts(view, grid.tile)
    total = math.prod(counts)
    laid_out = _laid_out_bytes(shape, grid, width, backend)
    if total == 1 or laid_out <= _SLICE_BYTES:
        return Slices(shape, 0, (*shape, 1)[0], total, total, (0, view[0]), laid_out)
    # Tiles are numbered first along the outermost axis of the view of which there are several,
    # which is cut along the outermost dimension that it is made of.
    along = next(axis for axis in range(3) if counts[axis] > 1)
    edges = (0, *grid.splits, len(shape))
    axis = next(k for k in range(edges[along], edges[along + 1]) if shape[k] > 1)
    inner = math.prod(shape[axis + 1 : edges[along + 1]])
    unit = math.lcm((1, *grid.tile)[along], inner) // inner  # indices that are whole tiles
    units = -(-shape[axis] // unit)
    here = -(-units // min(units, -(-laid_out // _SLICE_BYTES)))
    size = min(here * unit, shape[axis])
    tiles = math.prod(tile_counts(_resized(view, along, size * inner), grid.tile))
    return Slices(
        shape, axis, size, tiles, total, (along, size * inner), laid_out * size // shape[axis]
    )


def _resized(view: tuple[int, int, int], axis: int, extent: int) -> tuple[int, ...]:
    return (*view[:axis], extent, *view[axis + 1 :])


def _laid_out_bytes(shape: tuple[int, ...], grid: TileGrid, width: int, backend: Backend) -> int:
    """Bytes of a shard as it is laid out for the kernels; 0 where they take it as it lies.

    On GPUs arrays are row-major, and so are views of them. On TPUs the last two dimensions are cut
    into register tiles of 8 rows by 128 lanes: a view is the same memory where it keeps the last
    dimension, and where the one before it fills its tiles or is merged with no other. On the way
    into the order of tiles their columns are a last dimension.
    """
    view = box_view(grid, shape)
    size = math.prod(shape) * width // 8
    if backend == "gpu":
        return 0 if gpu_grid.fits(view, grid.tile) else size
    if backend == "reference":
        return size
    if tpu_layout.layout(view, grid.tile, width).matrix:
        columns = min(grid.tile[1], view[2])
        return size * (-(-columns // _LANES) * _LANES) // columns
    rows = [n for n in shape[:-1] if n > 1]
    as_it_lies = view[2] == shape[-1] and (len(rows) < 2 or rows[-1] % _SUBLANES == 0)
    return 0 if as_it_lies else size
