"""Working through a shard slice by slice, where kernels do not take it as it lies.

Kernels read whole tiles of a two-dimensional array. A shard whose view (`tiles.box_view`) is not
that array in memory has to be laid out for them, and what they made of it laid out back: copies of
it, on TPUs in tiles of registers that narrow dimensions fill by a part only, so up to 32 times its
bytes. Made of one slice after the other, they are those of one slice. A shard that lies as the
kernels want it is no slices: to take one out would be a copy, too.
"""

import math
from collections.abc import Callable
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
class Slices:
    """Equal stretches of a shard along one of its dimensions, of whole tiles in their order.

    The last one overlaps the one before it where they do not divide the dimension.

    Attributes:
      shape: of the shard.
      axis: the dimension that is cut.
      size: its indices in one slice.
      tiles: of one slice.
      total: tiles of the shard.
      along: the axis of the shard's view that is cut, by what extent, and its own.
      laid_out_bytes: of a slice as the kernels take it; 0 where the shard lies so.
    """

    shape: tuple[int, ...]
    axis: int
    size: int
    tiles: int
    total: int
    along: tuple[int, int, int]
    laid_out_bytes: int

    @property
    def count(self) -> int:
        return -(-self.total // self.tiles)

    def take(self, shard: Array, i: Array) -> Array:
        """Slice i."""
        return lax.dynamic_slice_in_dim(shard, self._start(i), self.size, self.axis)

    def put(self, shard: Array, part: Array, i: Array) -> Array:
        """The shard with another slice i."""
        return lax.dynamic_update_slice_in_dim(shard, part, self._start(i), self.axis)

    def _start(self, i: Array) -> Array:
        return jnp.minimum(i * self.size, self.shape[self.axis] - self.size)

    def map(self, run: Callable[..., Any], *shards: Array) -> Any:
        """What a function finds in every tile, when it is given one slice after the other.

        Args:
          run: from slices of the shards to a pytree of arrays whose first axis are the tiles.
          *shards: of this shape.
        """
        if self.count == 1:
            return run(*shards)

        def one(i: Array) -> Any:
            return run(*(self.take(shard, i) for shard in shards))

        def step(i: Array, found: Any) -> Any:
            return jax.tree.map(
                lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, self._tile(i), 0),
                found,
                one(i),
            )

        of_slice = jax.eval_shape(one, jax.ShapeDtypeStruct((), jnp.int32))
        nothing = jax.tree.map(lambda x: jnp.zeros((self.total, *x.shape[1:]), x.dtype), of_slice)
        return lax.fori_loop(0, self.count, step, nothing)

    def _tile(self, i: Array) -> Array:
        """Number in the shard of the first tile of slice i."""
        return jnp.minimum(i * self.tiles, self.total - self.tiles)

    def slots(self, slots: Slots, i: Array) -> Slots:
        """The changes of slice i, its tiles by their numbers in it."""
        begin, end = _those(slots.tiles // self.tiles, slots.used, i)
        entries = min(len(slots.tiles), self.tiles)
        # The unused end of the list repeats its last number.
        index = begin + jnp.arange(entries, dtype=jnp.int32)
        index = jnp.minimum(index, jnp.clip(end - 1, 0, len(slots.tiles) - 1))
        numbers = jnp.clip(slots.tiles[index] - self._tile(i), 0, self.tiles - 1)
        changes = None if slots.changes is None else slots.changes[index]
        return Slots(numbers, end - begin, slots.keys[index], changes)

    def places(
        self, starts: Int32[Array, "M 3"], used: Array, i: Array
    ) -> tuple[Int32[Array, "M 3"], Int32[Array, ""], Int32[Array, ""]]:
        """Boxes of the shard's view, in the order of its tiles, as those of slice i.

        Returns:
          Where they begin in the slice's view, and the first and end of those that lie in it.
        """
        axis, extent, whole = self.along
        begin, end = _those(starts[:, axis] // extent, used, i)
        offset = jnp.minimum(i * extent, whole - extent)
        return starts.at[:, axis].add(-offset), begin, end


def _those(
    slice_of: Int32[Array, " L"], used: Array, i: Array
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """First and end of the entries that are i, in a rising list of which `used` count."""
    counted = jnp.arange(len(slice_of)) < used
    begin = jnp.sum(counted & (slice_of < i), dtype=jnp.int32)
    return begin, begin + jnp.sum(counted & (slice_of == i), dtype=jnp.int32)


def slices(shape: tuple[int, ...], grid: TileGrid, width: int, backend: Backend) -> Slices:
    """How a shard is worked through; one slice that is all of it, where kernels take it so.

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
    whole = Slices(shape, 0, (*shape, 1)[0], total, total, (0, view[0], view[0]), laid_out)
    if total == 1 or laid_out <= _SLICE_BYTES:
        return whole
    # Tiles are numbered first along the outermost axis of the view of which there are several,
    # which is cut along the outermost dimension that it is made of.
    along = next(axis for axis in range(3) if counts[axis] > 1)
    edges = (0, *grid.splits, len(shape))
    axis = next(k for k in range(edges[along], edges[along + 1]) if shape[k] > 1)
    inner = math.prod(shape[axis + 1 : edges[along + 1]])
    unit = math.lcm((1, *grid.tile)[along], inner) // inner  # indices that are whole tiles
    units, clipped = divmod(shape[axis], unit)
    if clipped:
        return whole
    n = min(units, -(-laid_out // _SLICE_BYTES))
    here = -(-units // n)
    return Slices(
        shape=shape,
        axis=axis,
        size=here * unit,
        tiles=total // units * here,
        total=total,
        along=(along, here * unit * inner, view[along]),
        laid_out_bytes=laid_out * here // units,
    )


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
