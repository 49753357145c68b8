"""How the GPU kernels index a box: groups of 32 sub-blocks, four to a thread block, in place."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels.sparse_delta.reference import (
    SUBBLOCK,
    WORD_BITS,
    Tile,
    subblocks_of,
    tile_counts,
    tile_matrix,
    untile,
)

WARPS, LANES, VECTOR = 4, 32, 8  # of a warpgroup, of a warp, elements a lane
MAX_ELEMENTS = 1 << 31  # offsets into a box are 32 bits


def fits(extents: tuple[int, ...], tile: Tile) -> bool:
    """Whether the kernels can index the box in place.

    Whole tiles of 256·k columns, k a power of two up to 32, and of a number of rows that gives each
    of the four warps whole groups of 32 sub-blocks.
    """
    wide = tile[1] // SUBBLOCK
    if tile[1] % SUBBLOCK or wide == 0 or WORD_BITS % wide:
        return False
    whole = extents[1] % tile[0] == 0 and extents[2] % tile[1] == 0
    return whole and tile[0] % (WARPS * WORD_BITS // wide) == 0


@dataclasses.dataclass(frozen=True)
class Grid:
    """A box of whole tiles as groups of 32 sub-blocks; a thread block takes four groups at a time.

    The 32 sub-blocks of a group are two axes (outer, inner), neither of which has extent 1, for
    Mosaic's layout inference does not follow such axes.

    Attributes:
      extents: (lead, rows, cols).
      tile: (R, C), with `fits(extents, tile)`.
    """

    extents: tuple[int, ...]
    tile: Tile

    @property
    def wide(self) -> int:
        """Sub-blocks in a row of a tile."""
        return self.tile[1] // SUBBLOCK

    @property
    def high(self) -> int:
        """Rows of a group."""
        return WORD_BITS // self.wide

    @property
    def outer(self) -> int:
        return min(max(self.high, 2), WORD_BITS // 2)

    @property
    def inner(self) -> int:
        return WORD_BITS // self.outer

    @property
    def groups(self) -> int:
        """Groups of a tile."""
        return self.tile[0] // self.high

    @property
    def quads(self) -> int:
        """Fours of groups in a tile."""
        return self.groups // WARPS

    @property
    def tiles(self) -> int:
        return math.prod(tile_counts(self.extents, self.tile))

    def view(self, box: Array, lanes: tuple[int, ...]) -> Array:
        """The box with its groups, sub-blocks and lanes as axes; moves nothing."""
        lead, rows, cols = self.extents
        across = cols // self.tile[1]
        rest = (*lanes, VECTOR)
        if self.wide == 1:
            split = (self.outer, self.inner, across)
        elif self.high == 1:
            split = (across, self.outer, self.inner)
        else:
            split = (self.high, across, self.wide)
        return box.reshape(lead, rows // self.high, *split, *rest)

    def at(self, tile: Any, quad: Any, outer: Any, inner: Any = slice(None)) -> tuple[Any, ...]:
        """Index of sub-blocks of four groups in a `view`: [4, outer, inner, *lanes, 8]."""
        _, down, across = tile_counts(self.extents, self.tile)
        groups = pl.ds(lax.rem(tile // across, down) * self.groups + quad * WARPS, WARPS)
        lead, column = tile // (across * down), lax.rem(tile, across)
        if self.wide == 1:
            return lead, groups, outer, inner, column
        if self.high == 1:
            return lead, groups, column, outer, inner
        return lead, groups, outer, column, inner


def in_place(box: Array, tile: Tile) -> tuple[Array, Grid]:
    """A box that the kernels can index, with the same tiles: this one, or one in tile order.

    In the latter a tile is a column of sub-blocks, zero-padded to whole fours of groups.

    Raises:
      NotImplementedError: a box of 2^31 elements or more.
    """
    if box.size >= MAX_ELEMENTS:
        raise NotImplementedError(
            f"a box has fewer than 2^31 elements, got shape {box.shape}; call once for each part"
        )
    if fits(box.shape, tile):
        return box, Grid(box.shape, tile)
    matrix = tile_matrix(box, tile)
    missing = -matrix.shape[1] % (WARPS * WORD_BITS)
    matrix = jnp.pad(matrix, ((0, 0), (0, missing), (0, 0)))
    rows = matrix.reshape(1, -1, SUBBLOCK)
    return rows, Grid(rows.shape, (matrix.shape[1], SUBBLOCK))


def out_of_place(rows: Array, extents: tuple[int, ...], tile: Tile) -> Array:
    """Inverse of `in_place`."""
    if fits(extents, tile):
        return rows.reshape(extents)
    matrix = rows.reshape(math.prod(tile_counts(extents, tile)), -1, SUBBLOCK)
    return untile(matrix[:, : subblocks_of(tile)], extents, tile)
