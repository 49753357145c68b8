"""How the TPU kernels cut a box: tiles of one grid step, sub-blocks by rows of words, chunks."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.sparse_delta import reference
from kernels.sparse_delta.reference import SUBBLOCK, SUBBLOCKS, WORD_BITS, Tile

LANES = 128
_MAX_TILE = 1 << 18  # elements of a tile that fit the smallest VMEM (16 MiB) with their copies


@dataclass(frozen=True)
class Layout:
    """How a box is cut for the kernels.

    Attributes:
      extents: lead, rows and cols of the box.
      tile: R and C of the caller's tiles.
      matrix: whether the box is first laid out as a tile matrix.
      width: bits of an element.
    """

    extents: tuple[int, int, int]
    tile: Tile
    matrix: bool
    width: int

    @property
    def rows(self) -> int:
        """Rows of one grid step's tile."""
        return reference.subblocks_of(self.tile) if self.matrix else self.tile[0]

    @property
    def cols(self) -> int:
        return SUBBLOCK if self.matrix else self.tile[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles down, over all of lead, and across."""
        lead, down, across = reference.tile_counts(self.extents, self.tile)
        return (lead * down * across, 1) if self.matrix else (lead * down, across)

    @property
    def parts(self) -> int:
        """k: sub-blocks in a row."""
        return self.cols // SUBBLOCK

    @property
    def packing(self) -> int:
        """p: elements in a 32-bit word."""
        return 32 // self.width

    @property
    def streams(self) -> int:
        """p·k: sub-blocks that one row of words holds."""
        return self.parts * self.packing

    @property
    def subblocks(self) -> int:
        return self.rows * self.parts

    @property
    def chunk(self) -> int:
        """M: sub-blocks that are worked on at once; 128 fill the matrix unit."""
        return next(size for size in (128, 64, 32) if self._divides(size))

    def _divides(self, chunk: int) -> bool:
        # Eight rows of words, a whole vector register, at least.
        return self.subblocks % chunk == 0 and chunk % (8 * self.streams) == 0

    @property
    def chunks(self) -> int:
        return self.subblocks // self.chunk

    @property
    def word_rows(self) -> int:
        """n: rows of words in a chunk."""
        return self.chunk // self.streams

    @property
    def blocks(self) -> int:
        """B: blocks of 4096 elements in a tile."""
        return self.subblocks // SUBBLOCKS

    def fits(self) -> bool:
        """Whether the kernels can work on the tile as it lies."""
        native = 8 * self.packing  # rows of a register tile of this width
        return (
            self.cols % SUBBLOCK == 0
            and self.rows % native == 0
            and self.subblocks % WORD_BITS == 0
            and self.streams in (1, 2, 4, 8, 16)
            and any(self._divides(size) for size in (128, 64, 32))
        )


def layout(extents: tuple[int, ...], tile: Tile, width: int) -> Layout:
    """The layout of a box whose tiles are `tile`.

    Raises:
      NotImplementedError: the tile does not fit the fast memory.
    """
    lead, rows, cols = extents
    whole = rows % tile[0] == 0 and cols % tile[1] == 0
    plain = Layout((lead, rows, cols), tile, False, width)
    if math.prod(tile) > _MAX_TILE:
        raise NotImplementedError(f"tiles of at most {_MAX_TILE} elements are supported: {tile=}")
    if whole and tile[1] % SUBBLOCK == 0 and plain.fits():
        return plain
    return Layout((lead, rows, cols), tile, True, width)


def lay_out(box: Array, own: Layout) -> Array:
    """The box as the two-dimensional array that the kernels read."""
    if own.matrix:
        if not jnp.issubdtype(box.dtype, jnp.unsignedinteger):
            box = lax.bitcast_convert_type(box, f"uint{own.width}")
        return reference.tile_matrix(box, own.tile).reshape(-1, SUBBLOCK)
    return box.reshape(-1, box.shape[2])
