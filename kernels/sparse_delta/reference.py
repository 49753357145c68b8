"""What the device half computes, in plain jnp: every kernel gives the bits of these functions.

A tensor shard comes as a box of its canonical view, `(lead, rows, cols)`, read as unsigned bits.
Its tiles are boxes 1 × R × C, numbered row-major, clipped at the upper ends. The order of elements
within a tile is row-major over the clipped tile; 256 consecutive elements are a *sub-block* and 16
sub-blocks a *block* of 4096. The `tile_matrix` makes that order explicit as `[T, S, 256]`: element
e of tile t stands at `[t, e // 256, e % 256]`, zeros follow the last element, and S is a multiple
of 32. A kernel need not build it: where C is 256·k, sub-block s of a tile is the part s % k of its
row s // k.

Elements are compared as bits, so −0.0, NaN payloads and infinities are ordinary values.
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt, UInt32

from kernels.sparse_delta.elements import ElementFormat

SUBBLOCK = 256  # a rank within a sub-block fits 8 bits
BLOCK = 4096  # an offset within a block fits 12 bits
SUBBLOCKS = BLOCK // SUBBLOCK
CLASSES = 8  # a class fits 3 bits
WORD_BITS = 32  # sub-blocks that share a mask word

# Fields of the first word of a record; see `Records`.
CLASS_SHIFT, RANK_SHIFT = 24, 12
# Key of a slot that holds no change: no (class, rank) has it, for keys end at 2047.
EMPTY_SLOT = 0xFFFFFFFF

Tile = tuple[int, int]


class Packed(NamedTuple):
    """Which elements changed.

    Attributes:
      mask: word [t, w, l] has bit b set where element l of sub-block 32·w + b of tile t changed.
        Bits run along sub-blocks, so packing is a shift and an OR of whole rows: no lane moves.
      counts: changed elements of each sub-block.
    """

    mask: UInt32[Array, "T S/32 256"]
    counts: Int32[Array, "T S"]


class Records(NamedTuple):
    """The changed elements of each block of 4096, in their order, in slots of fixed number.

    Attributes:
      places: offset in the block (bits 0–11), rank in the block (bits 12–23: how many earlier
        elements of the block have the same class), class (bits 24–26).
      values: the old bits; those of 16-bit elements in the high half with the new in the low.
        8-bit elements lie like 16-bit ones.
      new_values: the new bits of 32-bit elements, None for narrower ones.
      counts: changed elements of each block. Greater than the capacity means that the block did
        not fit; its slots are zero, and the tile has to be sent from the dense arrays.
      class_counts: elements of each class in each block, changed or not; the last block of a tile
        counts its padding too, as zeros.

    Slots after `counts` are zero.
    """

    places: UInt32[Array, "T B capacity"]
    values: UInt32[Array, "T B capacity"]
    new_values: UInt32[Array, "T B capacity"] | None
    counts: Int32[Array, "T B"]
    class_counts: Int32[Array, "T 8 B"]


class Slots(NamedTuple):
    """Changes for `expand`: up to C for every sub-block of the L tiles that are touched.

    Attributes:
      tiles: numbers of the touched tiles, strictly rising; the unused end of the list repeats the
        last number, and its slots are ignored.
      used: how many entries of `tiles` count.
      keys: key << 16, with key = class << 8 | rank, where the rank counts the earlier elements of
        the sub-block with the same class; elements of 8 and 16 bits carry the change, mod 2^16,
        in the low half. `EMPTY_SLOT` where there is none. The order within a sub-block is free.
      changes: of 32-bit elements, mod 2^32; None for narrower ones.
    """

    tiles: Int32[Array, " L"]
    used: Int32[Array, ""]
    keys: UInt32[Array, "L C S"]
    changes: UInt32[Array, "L C S"] | None = None


def subblocks_of(tile: Tile) -> int:
    """S: sub-blocks of a tile, rounded up to whole mask words."""
    return -(-math.prod(tile) // (SUBBLOCK * WORD_BITS)) * WORD_BITS


def tile_counts(extents: tuple[int, ...], tile: Tile) -> tuple[int, int, int]:
    """Tiles along lead, rows and cols of a box."""
    lead, rows, cols = extents
    return lead, -(-rows // tile[0]), -(-cols // tile[1])


def tile_matrix(box: Array, tile: Tile) -> Array:
    """A box (lead, rows, cols) with its elements in tile order, [T, S, 256], zero-padded."""
    size = subblocks_of(tile) * SUBBLOCK
    lead, down, across = tile_counts(box.shape, tile)

    def part(rows: slice, cols: slice, high: int, wide: int) -> Array:
        piece = box[:, rows, cols]
        _, n_rows, n_cols = piece.shape
        piece = piece.reshape(lead, n_rows // high, high, n_cols // wide, wide)
        piece = piece.transpose(0, 1, 3, 2, 4).reshape(
            lead, n_rows // high, n_cols // wide, high * wide
        )
        return jnp.pad(piece, ((0, 0), (0, 0), (0, 0), (0, size - high * wide)))

    strips = [
        jnp.concatenate(
            [part(rows, cols, high, wide) for cols, wide in _cuts(box.shape[2], tile[1])], 2
        )
        for rows, high in _cuts(box.shape[1], tile[0])
    ]
    return jnp.concatenate(strips, 1).reshape(lead * down * across, -1, SUBBLOCK)


def untile(matrix: Array, extents: tuple[int, ...], tile: Tile) -> Array:
    """The box (lead, rows, cols) of a tile matrix: inverse of `tile_matrix`."""
    lead, down, across = tile_counts(extents, tile)
    grid = matrix.reshape(lead, down, across, -1)
    strips = []
    for rows, high in _cuts(extents[1], tile[0]):
        parts = []
        for cols, wide in _cuts(extents[2], tile[1]):
            part = grid[
                :,
                rows.start // tile[0] : -(-rows.stop // tile[0]),
                cols.start // tile[1] : -(-cols.stop // tile[1]),
                : high * wide,
            ]
            _, n_down, n_across, _ = part.shape
            part = part.reshape(lead, n_down, n_across, high, wide).transpose(0, 1, 3, 2, 4)
            parts.append(part.reshape(lead, n_down * high, n_across * wide))
        strips.append(jnp.concatenate(parts, 2))
    return jnp.concatenate(strips, 1)


def _cuts(extent: int, size: int) -> list[tuple[slice, int]]:
    """Stretches of an axis with tiles of one size: the whole ones, then the clipped one."""
    whole = extent - extent % size
    cuts = [(slice(0, whole), size)] if whole else []
    return [*cuts, (slice(whole, extent), extent - whole)] if whole < extent else cuts


def bits_of(array: Array, fmt: ElementFormat) -> Array:
    """The elements' bits as unsigned integers of their width."""
    dtype = jnp.dtype(fmt.bits_dtype)
    if array.dtype == jnp.bool_:
        return array.astype(dtype)  # a bool has no other bits than 0 and 1
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)


def exponents(bits: UInt[Array, "..."], fmt: ElementFormat) -> Int32[Array, "..."]:
    """Biased exponents 0 … 255; 0 of integers."""
    if fmt.kind != "float":
        return jnp.zeros(bits.shape, jnp.int32)
    magnitude = bits.astype(jnp.uint32) & jnp.uint32(fmt.magnitude_mask)
    return (magnitude >> fmt.mantissa_bits).astype(jnp.int32)


def classes_of(
    bits: UInt[Array, "..."], thresholds: Int32[Array, " 7"], fmt: ElementFormat
) -> Int32[Array, "..."]:
    """Class 0 … 7 of every element: how many of the rising thresholds its exponent reaches."""
    exponent = exponents(bits, fmt)
    return sum(
        ((exponent >= thresholds[k]).astype(jnp.int32) for k in range(CLASSES - 1)),
        start=jnp.zeros(bits.shape, jnp.int32),
    )


def order(bits: UInt[Array, "..."], fmt: ElementFormat) -> UInt[Array, "..."]:
    """Bits to integers in which neighbouring values are neighbours; see `elements.order`."""
    sign = jnp.asarray(fmt.sign_bit, bits.dtype)
    if fmt.kind == "unsigned":
        return bits
    if fmt.kind == "signed":
        return bits ^ sign
    return jnp.where(bits & sign != 0, ~bits, bits ^ sign)


def unorder(ordered: UInt[Array, "..."], fmt: ElementFormat) -> UInt[Array, "..."]:
    """Inverse of `order`."""
    if fmt.kind != "float":
        return order(ordered, fmt)
    sign = jnp.asarray(fmt.sign_bit, ordered.dtype)
    return jnp.where(ordered & sign != 0, ordered ^ sign, ~ordered)


def change_of(
    old: UInt[Array, "..."], new: UInt[Array, "..."], fmt: ElementFormat
) -> UInt[Array, "..."]:
    """order(new) − order(old) mod 2^w, negated for negative floats: positive is away from zero."""
    step = order(new, fmt) - order(old, fmt)
    return jnp.where(_is_negative(old, fmt), -step, step)


def add_change(
    old: UInt[Array, "..."], change: UInt[Array, "..."], fmt: ElementFormat
) -> UInt[Array, "..."]:
    """The new bits, from the old ones and `change_of` them."""
    step = jnp.where(_is_negative(old, fmt), -change, change)
    return unorder(order(old, fmt) + step, fmt)


def _is_negative(bits: Array, fmt: ElementFormat) -> Array:
    if fmt.kind != "float":
        return jnp.zeros(bits.shape, bool)
    return bits & jnp.asarray(fmt.sign_bit, bits.dtype) != 0


def default_thresholds(sample: UInt[Array, "..."], fmt: ElementFormat) -> Int32[Array, " 7"]:
    """Class thresholds for a tensor of which `sample` holds some old elements.

    One class an octave, downwards from the exponent that a quarter of the elements reach. At a
    given step of the optimiser the share of changed elements halves with every octave upwards,
    while (for any density that is smooth at zero) the number of elements doubles, so that octaves
    hold about equally many changes and none deserves a finer cut than another.
    """
    exponent = exponents(sample, fmt).reshape(-1)
    bins = jnp.arange(256, dtype=jnp.int32)
    reached = jnp.sum(exponent[:, None] >= bins[None, :], axis=0, dtype=jnp.float32)
    return thresholds_of_counts(reached)


def thresholds_of_counts(reached: Float32[Array, " 256"]) -> Int32[Array, " 7"]:
    """`default_thresholds` from how many elements of the sample reach each exponent."""
    top = jnp.sum(4 * reached >= reached[0], dtype=jnp.int32) - 1
    return jnp.clip(top - jnp.arange(CLASSES - 2, -1, -1, dtype=jnp.int32), 0, 255)


def pack(
    old: UInt[Array, "lead rows cols"], new: UInt[Array, "lead rows cols"], *, tile: Tile
) -> Packed:
    """K1: which elements of a box changed, one bit each, and how many in each sub-block.

    Args:
      old: bits of the old values.
      new: bits of the new values, of the same dtype.
      tile: R and C.
    """
    changed = tile_matrix(old, tile) != tile_matrix(new, tile)
    return _pack_changed(changed)


def _pack_changed(changed: Array) -> Packed:
    grouped = changed.reshape(changed.shape[0], -1, WORD_BITS, SUBBLOCK).astype(jnp.uint32)
    bit = jnp.arange(WORD_BITS, dtype=jnp.uint32)[None, None, :, None]
    mask = jnp.sum(grouped << bit, axis=2, dtype=jnp.uint32)
    return Packed(mask, jnp.sum(changed, axis=2, dtype=jnp.int32))


def unpack_mask(mask: UInt32[Array, "T W 256"]) -> Array:
    """Bool [T, 32·W, 256] from the packed words: inverse of the packing."""
    bit = jnp.arange(WORD_BITS, dtype=jnp.uint32)[None, None, :, None]
    return ((mask[:, :, None, :] >> bit) & 1).astype(bool).reshape(mask.shape[0], -1, SUBBLOCK)


def class_counts(
    old: UInt[Array, "lead rows cols"],
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
) -> UInt32[Array, "T 2 S"]:
    """How many elements of each class every sub-block has, as saturated bytes.

    Class k is byte k % 4 of word k // 4. The counts of a sub-block sum to 256 (padding counts as
    zeros), so that a byte of 255 means 256 where the others are 0; see `class_count_table`.
    """
    member = _one_hot(classes_of(tile_matrix(old, tile), thresholds, fmt))
    counts = jnp.minimum(jnp.sum(member, axis=2, dtype=jnp.uint32), 255)  # T S 8
    shift = 8 * jnp.arange(4, dtype=jnp.uint32)[None, None, None, :]
    words = jnp.sum(counts.reshape(*counts.shape[:2], 2, 4) << shift, axis=3, dtype=jnp.uint32)
    return words.transpose(0, 2, 1)


def class_count_table(packed: np.ndarray) -> np.ndarray:
    """Host form of `class_counts`: uint16 [T, S, 8] from uint32 [T, 2, S]."""
    words = np.ascontiguousarray(packed.transpose(0, 2, 1)).astype("<u4", copy=False)
    table = words.view(np.uint8).astype(np.uint16)
    table[(table == 255) & (table.sum(2, keepdims=True) == 255)] = 256
    return table


def _one_hot(classes: Array) -> Array:
    return classes[..., None] == jnp.arange(CLASSES).reshape((1,) * classes.ndim + (CLASSES,))


def _ranks(classes: Array) -> Array:
    """How many earlier elements along the last axis have the same class."""
    member = _one_hot(classes)
    before = jnp.cumsum(member, axis=-2, dtype=jnp.int32) - member
    return jnp.sum(jnp.where(member, before, 0), axis=-1, dtype=jnp.int32)


def compact(
    old: UInt[Array, "lead rows cols"],
    new: UInt[Array, "lead rows cols"],
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    capacity: int,
) -> Records:
    """K2: the changed elements of a box as records, block by block.

    Args:
      old: bits of the old values.
      new: bits of the new values, of the same dtype.
      thresholds: of the classes, non-decreasing.
      fmt: how to read the bits.
      tile: R and C.
      capacity: slots a block; a multiple of 128 that `capacity_for` gives.
    """
    before, after = (tile_matrix(box, tile) for box in (old, new))
    before, after = (m.reshape(m.shape[0], -1, BLOCK) for m in (before, after))
    changed = before != after
    classes = classes_of(before, thresholds, fmt)
    offset = jnp.arange(BLOCK, dtype=jnp.int32)[None, None, :]
    place = offset | _ranks(classes) << RANK_SHIFT | classes << CLASS_SHIFT
    # A changed element goes to the slot that is numbered by the changed ones before it; all
    # others, and all of a block that does not fit, go to a slot past the end, which is dropped.
    slot = jnp.cumsum(changed, axis=2, dtype=jnp.int32) - 1
    counts = jnp.sum(changed, axis=2, dtype=jnp.int32)
    slot = jnp.where(changed & (counts <= capacity)[..., None], slot, capacity)
    store = functools.partial(_store, slot=slot, capacity=capacity)
    old_words, new_words = before.astype(jnp.uint32), after.astype(jnp.uint32)
    wide = fmt.width_bits == 32
    return Records(
        store(place.astype(jnp.uint32)),
        store(old_words if wide else old_words << 16 | new_words),
        store(new_words) if wide else None,
        counts,
        jnp.sum(_one_hot(classes), axis=2, dtype=jnp.int32).transpose(0, 2, 1),
    )


def _store(words: Array, slot: Array, capacity: int) -> Array:
    tiles, blocks, _ = words.shape
    flat = slot + (capacity + 1) * jnp.arange(tiles * blocks).reshape(tiles, blocks, 1)
    out = (
        jnp.zeros(tiles * blocks * (capacity + 1), jnp.uint32)
        .at[flat.reshape(-1)]
        .max(words.reshape(-1))
    )
    return out.reshape(tiles, blocks, capacity + 1)[:, :, :capacity]


def capacity_for(density: float) -> int:
    """Slots a block for changes that hit elements independently with probability `density`.

    Mean plus six standard deviations plus 8 (the tail of the binomial is then below 1e-8), rounded
    up to 128, the lanes of a vector register. 128 is enough up to 1.6 %.

    >>> capacity_for(0.01), capacity_for(0.05)
    (128, 384)
    """
    mean = BLOCK * density
    wanted = min(BLOCK, mean + 6 * math.sqrt(mean) + 8)
    return -(-math.ceil(wanted) // 128) * 128


def expand(
    old: UInt[Array, "lead rows cols"],
    slots: Slots,
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
) -> UInt[Array, "lead rows cols"]:
    """The new bits of a box: adds to each element the change whose key its class and rank match.

    Kernels do this in place in the donated `old` and leave tiles alone that are not listed.

    Args:
      old: bits of the old values.
      slots: the changes.
      thresholds: of the classes, non-decreasing.
      fmt: how to read the bits.
      tile: R and C.
    """
    matrix = tile_matrix(old, tile)
    before = matrix[slots.tiles]
    classes = classes_of(before, thresholds, fmt)
    key = (classes << 8 | _ranks(classes)).astype(jnp.uint32)
    used = jnp.arange(slots.tiles.shape[0]) < slots.used
    change = jnp.zeros(before.shape, jnp.uint32)
    for c in range(slots.keys.shape[1]):
        word = slots.keys[:, c, :, None]
        hit = (word >> 16 == key) & used[:, None, None]
        added = word & 0xFFFF if slots.changes is None else slots.changes[:, c, :, None]
        change = jnp.where(hit, added, change)
    after = add_change(before, change.astype(before.dtype), fmt)
    # Adding instead of setting: the repeated entries at the end of the list add nothing.
    return untile(matrix.at[slots.tiles].add(after - before), old.shape, tile)


def epilogue(
    master: Float32[Array, "lead rows cols"],
    old: UInt[Array, "lead rows cols"],
    *,
    tile: Tile,
) -> tuple[UInt[Array, "lead rows cols"], Packed]:
    """The bf16 bits of float32 master weights (rounded to nearest even) and what changed in them.

    Args:
      master: the optimiser's weights.
      old: bits of the bf16 weights that were published last.
      tile: R and C.
    """
    new = lax.bitcast_convert_type(master.astype(jnp.bfloat16), jnp.uint16)
    return new, pack(old, new, tile=tile)


def epilogue_compact(
    master: Float32[Array, "lead rows cols"],
    old: UInt[Array, "lead rows cols"],
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    capacity: int,
) -> tuple[UInt[Array, "lead rows cols"], Records]:
    """As `epilogue`, with the changed elements as records instead of the mask.

    Args:
      master: the optimiser's weights.
      old: bits of the bf16 weights that were published last.
      thresholds: of the classes, non-decreasing.
      fmt: of bf16.
      tile: R and C.
      capacity: slots a block.
    """
    new = lax.bitcast_convert_type(master.astype(jnp.bfloat16), jnp.uint16)
    return new, compact(old, new, thresholds, fmt=fmt, tile=tile, capacity=capacity)
