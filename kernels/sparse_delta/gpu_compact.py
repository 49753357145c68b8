"""Compaction on GPUs: a survey of the weights, then a search by every slot for its element."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32, UInt, UInt32

from kernels.sparse_delta.elements import ElementFormat
from kernels.sparse_delta.gpu_grid import WARPS, Grid, in_place
from kernels.sparse_delta.gpu_registers import (
    HALF_LANES,
    Registers,
    batch_of,
    class_bytes,
    class_limits,
    classes_in_registers,
    launch,
)
from kernels.sparse_delta.reference import (
    CLASS_SHIFT,
    RANK_SHIFT,
    SUBBLOCK,
    SUBBLOCKS,
    Records,
    Tile,
    classes_of,
    subblocks_of,
    tile_counts,
)

QUARTER = SUBBLOCK // 4  # elements between two stored prefixes
# Enough for all threads of a GPU several times over.
_SLOTS_AT_ONCE = 1 << 19
# That XLA:GPU keeps of a slot while it searches, by its buffers for bf16.
_WORDS_A_SLOT = 21


def compact(
    old: UInt[Array, "lead rows cols"],
    new: UInt[Array, "lead rows cols"],
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    capacity: int,
    interpret: bool = False,
) -> Records:
    """`reference.compact`: a survey of the weights, then a search by every slot for its element.

    The survey reads 2·w bits an element and writes 1 bit, 1/8 byte of prefixes and 5/64 byte of
    counts. The search reads, for each slot, the counts of its block, 32 bytes of changed bits, one
    word of each array and the up to 63 old elements that share its prefix.
    """
    before, grid = in_place(old, tile)
    after = in_place(new, tile)[0]
    survey = _survey(before, after, class_limits(thresholds, fmt), grid, fmt, interpret)
    blocks = subblocks_of(tile) // SUBBLOCKS
    return _search(survey, before, after, thresholds, grid, fmt, (blocks, capacity))


def working_bytes(elements: int, capacity: int) -> int:
    """Bytes beside operands and results of `compact`: survey, its prefixes, slots that search.

    Args:
      elements: of the box, as the grid pads it.
      capacity: slots a block.
    """
    # Counts, quarters, totals; ends, begins and prefixes of the totals, all of sub-blocks.
    words = 1 + 2 * 4 + 4 + 1 + 1 + 4
    slots = min(elements // (SUBBLOCK * SUBBLOCKS) * capacity, _SLOTS_AT_ONCE)
    return elements // 8 + elements // SUBBLOCK * 4 * words + 4 * _WORDS_A_SLOT * slots


class _Survey(NamedTuple):
    """What a pass over the weights leaves for the search, [T, S] with S as the grid pads it.

    Attributes:
      changed: bit b of word w is element 32·w + b of the sub-block.
      counts: changed elements.
      quarters: elements of each class in the earlier quarters of the sub-block, as bytes; classes
        0, 2, 4, 6 in the first word, 1, 3, 5, 7 in the second.
      totals: elements of each class in the sub-block; classes k and k + 4 are the halves of word k.
    """

    changed: UInt32[Array, "T S 8"]
    counts: Int32[Array, "T S"]
    quarters: UInt32[Array, "2 T S 4"]
    totals: UInt32[Array, "4 T S"]


def _survey(
    old: Array, new: Array, limits: Array, grid: Grid, fmt: ElementFormat, interpret: bool
) -> _Survey:
    registers = Registers(HALF_LANES, interpret)
    batch = batch_of(grid, 4 * old.dtype.itemsize)

    def sparse_delta_survey(
        old: Any, new: Any, limits: Any, changed_out: Any, counts_out: Any, *sums_out: Any
    ) -> None:
        step = lax.axis_index("0")
        groups = pl.ds(step * WARPS, WARPS)

        @pl.loop(0, grid.outer // batch)
        def _(i: Array) -> None:
            outer = pl.ds(i * batch, batch)
            here = grid.at(step // grid.quads, lax.rem(step, grid.quads), outer)
            bits = registers.load(old.at[here])
            changed = (bits != registers.load(new.at[here])).astype(jnp.uint32)
            last = changed.ndim - 1
            byte = jnp.sum(changed << registers.iota(changed.shape, last), axis=last)
            changed_out[groups, outer] = byte.astype(jnp.uint8)
            counts = jnp.sum(changed, axis=last)
            for axis in range(last - 1, 2, -1):
                counts = jnp.sum(counts, axis=axis)
            counts_out[groups, outer] = counts.astype(jnp.int32)
            classes = classes_in_registers(bits, limits, fmt, registers)
            nibbles = jnp.sum(jnp.uint32(1) << (classes * 4), axis=last)
            quarters_out, totals_out = sums_out
            for odd, counts in enumerate(class_bytes(nibbles)):
                for axis in range(last - 1, last - 4, -1):
                    counts = jnp.sum(counts, axis=axis)  # over the 8 lanes of a quarter
                quarters_out[odd, groups, outer] = registers.before_lanes(counts, (4, 3))[0]
                for high in range(2):
                    half = (counts >> (8 * high)) & jnp.uint32(0x00FF00FF)
                    total = jnp.sum(jnp.sum(half, axis=4), axis=3)
                    totals_out[2 * high + odd, groups, outer] = total

    groups = grid.tiles * grid.groups
    rows = (groups, grid.outer, grid.inner)
    changed, counts, quarters, totals = launch(
        sparse_delta_survey,
        (grid.tiles * grid.quads,),
        (
            jax.ShapeDtypeStruct((*rows, *HALF_LANES), jnp.uint8),
            jax.ShapeDtypeStruct(rows, jnp.int32),
            jax.ShapeDtypeStruct((2, *rows, *HALF_LANES[:2]), jnp.uint32),
            jax.ShapeDtypeStruct((4, *rows), jnp.uint32),
        ),
        interpret,
    )(grid.view(old, HALF_LANES), grid.view(new, HALF_LANES), limits)
    words = lax.bitcast_convert_type(changed.reshape(grid.tiles, -1, 8, 4), jnp.uint32)
    return _Survey(
        words,
        counts.reshape(grid.tiles, -1),
        quarters.reshape(2, grid.tiles, -1, 4),
        totals.reshape(4, grid.tiles, -1),
    )


def _search(
    survey: _Survey,
    old: Array,
    new: Array,
    thresholds: Array,
    grid: Grid,
    fmt: ElementFormat,
    shape: tuple[int, int],
) -> Records:
    """Fills the slots: each finds its element from the counts and the bits, and gathers it.

    Slots have a dozen words of their own while they search, so that few tiles do at once.
    """
    blocks, capacity = shape
    tiles = survey.counts.shape[0]
    counts = survey.counts.reshape(tiles, -1, SUBBLOCKS)
    ends = jnp.cumsum(counts, axis=-1, dtype=jnp.int32)
    totals = survey.totals.reshape(4, tiles, -1, SUBBLOCKS)
    earlier = jnp.cumsum(totals, axis=-1, dtype=jnp.uint32) - totals
    wide = fmt.width_bits == 32

    def search(first: Array) -> tuple[Array, ...]:
        own = lax.dynamic_slice_in_dim(ends, first, some)
        return _filled(survey, (own, ends - counts, earlier), first, old, new, thresholds, grid,
                       fmt, shape)  # fmt: skip

    some = max(1, min(tiles, _SLOTS_AT_ONCE // (blocks * capacity)))
    if some == tiles:
        kept = search(jnp.int32(0))
    else:
        # The last ones are some of those before them, too, where the numbers do not divide.
        def step(i: Array, kept: tuple[Array, ...]) -> tuple[Array, ...]:
            first = jnp.minimum(i * some, tiles - some)
            return tuple(
                lax.dynamic_update_slice_in_dim(all_, part, first, 0)
                for all_, part in zip(kept, search(first), strict=True)
            )

        nothing = (jnp.zeros((tiles, blocks, capacity), jnp.uint32),) * (2 + wide)
        kept = lax.fori_loop(0, -(-tiles // some), step, nothing)
    sums = jnp.sum(totals, axis=-1, dtype=jnp.uint32)[:, :, :blocks]  # 4 T B
    by_class = jnp.concatenate([sums & 0xFFFF, sums >> 16]).astype(jnp.int32)
    held = ends[:, :blocks, -1]
    return Records(kept[0], kept[1], kept[2] if wide else None, held, by_class.transpose(1, 0, 2))


def _filled(
    survey: _Survey,
    prefixes: tuple[Array, Array, Array],
    first: Array,
    old: Array,
    new: Array,
    thresholds: Array,
    grid: Grid,
    fmt: ElementFormat,
    shape: tuple[int, int],
) -> tuple[Array, ...]:
    """The words of the slots of some tiles from the `first`: places, values, wide new values.

    Args:
      survey: of all tiles.
      prefixes: changed elements of each block of these tiles up to and with each sub-block, before
        each sub-block of all, and elements of each class before each sub-block of all.
      first: number of a tile.
      old: the box, as the grid indexes it.
      new: the same.
      thresholds: of the classes.
      grid: of the box.
      fmt: of its elements.
      shape: blocks of a tile and slots of a block.
    """
    ends, begins, earlier = prefixes
    blocks, capacity = shape
    tiles, subblocks = survey.counts.shape
    block = jnp.arange(ends.shape[0] * ends.shape[1], dtype=jnp.int32).reshape(ends.shape[:2])
    block = (first * ends.shape[1] + block)[:, :blocks, None]
    slot = jnp.arange(capacity, dtype=jnp.int32)[None, None, :]

    def take(values: Array, index: Array) -> Array:
        return values.reshape(-1).at[index].get(mode="promise_in_bounds")

    held = ends[:, :blocks, -1]
    full = (slot < held[:, :, None]) & (held <= capacity)[:, :, None]
    passed = [slot >= ends[:, :blocks, i, None] for i in range(SUBBLOCKS - 1)]
    row = sum((one.astype(jnp.int32) for one in passed), start=jnp.zeros_like(block + slot))
    row = block * SUBBLOCKS + row  # of all sub-blocks of the box
    nth = slot - take(begins, row)
    words, nth = _word_of(nth, lambda w: take(survey.changed, row * 8 + w))
    offset = words * 32 + _nth_set_bit(take(survey.changed, row * 8 + words), nth)
    offset = offset & (SUBBLOCK - 1)  # an unused slot may run over; its result is dropped

    element = _flat_index(row, offset, grid)
    old_bits, new_bits = take(old, element), take(new, element)
    classes = classes_of(old_bits, thresholds, fmt)
    rank = take(earlier, (classes & 3) * (tiles * subblocks) + row) >> (16 * (classes >> 2))
    rank = (rank & 0xFFFF).astype(jnp.int32)
    quarter = (classes & 1) * (4 * tiles * subblocks) + row * 4 + offset // QUARTER
    rank += (take(survey.quarters, quarter) >> (8 * (classes >> 1))).astype(jnp.int32) & 0xFF
    step = jnp.arange(QUARTER, dtype=jnp.int32)[None, None, None, :]
    # Quarters are aligned in the box: tiles start at multiples of 256 elements.
    neighbours = take(old, (element & ~(QUARTER - 1))[..., None] + step)
    same = classes_of(neighbours, thresholds, fmt) == classes[..., None]
    rank += jnp.sum(same & (step < (element & (QUARTER - 1))[..., None]), -1, dtype=jnp.int32)

    place = (row % SUBBLOCKS) * SUBBLOCK + offset | rank << RANK_SHIFT | classes << CLASS_SHIFT
    old_words, new_words = old_bits.astype(jnp.uint32), new_bits.astype(jnp.uint32)
    wide = fmt.width_bits == 32
    stored = [place.astype(jnp.uint32), old_words if wide else old_words << 16 | new_words]
    return tuple(jnp.where(full, x, 0) for x in (*stored, *([new_words] if wide else [])))


def _word_of(nth: Array, word: Callable[[int], Array]) -> tuple[Array, Array]:
    """Number of the word of 8 that holds the n-th set bit, and which of its set bits that is."""
    index, ahead, passed = jnp.zeros_like(nth), jnp.zeros_like(nth), jnp.zeros_like(nth)
    for w in range(7):
        passed += lax.population_count(word(w)).astype(jnp.int32)
        index += (passed <= nth).astype(jnp.int32)
        ahead = jnp.where(passed <= nth, passed, ahead)
    return index, nth - ahead


def _nth_set_bit(word: Array, nth: Array) -> Array:
    """Position of the n-th set bit (from 0) of a word, by halving."""
    position = jnp.zeros_like(nth)
    for width in (16, 8, 4, 2, 1):
        low = lax.population_count(word & jnp.uint32((1 << width) - 1)).astype(jnp.int32)
        above = nth >= low
        nth = jnp.where(above, nth - low, nth)
        word = jnp.where(above, word >> width, word)
        position += jnp.where(above, width, 0)
    return position


def _flat_index(row: Array, offset: Array, grid: Grid) -> Array:
    """Index into the flat box of an element, from its sub-block (of all tiles) and place in it."""
    across = tile_counts(grid.extents, grid.tile)[2]
    subblocks = math.prod(grid.tile) // SUBBLOCK
    tile, part = row // subblocks, row % subblocks
    tile_row = tile // across * grid.tile[0] + part // grid.wide  # leads and rows count as one
    column = tile % across * grid.tile[1] + part % grid.wide * SUBBLOCK + offset
    return tile_row * grid.extents[2] + column
