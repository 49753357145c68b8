"""Bodies of the TPU kernels: one tile a grid step, in chunks of `Layout.chunk` sub-blocks."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels.sparse_delta import tpu_lanes as lanes
from kernels.sparse_delta.elements import ElementFormat
from kernels.sparse_delta.reference import (
    CLASS_SHIFT,
    CLASSES,
    RANK_SHIFT,
    SUBBLOCK,
    SUBBLOCKS,
    WORD_BITS,
)
from kernels.sparse_delta.tpu_layout import LANES, Layout

CHANGED = CLASSES  # the lane of a totals array that counts changed elements


def _pack_tile(
    old: Any, new: Any, mask: Any, counts: Any, rows: Sequence[Any], own: Layout
) -> None:
    """Mask words and counts of one tile, from the words of old and new by chunk.

    `rows` is scratch for words of which every `group`-th is wanted.
    """
    group = WORD_BITS // own.streams  # rows of words whose bits share a mask word
    ones = lanes.signed((1 << own.width) - 1)

    def step(c: Any) -> None:
        marks, word = [], jnp.zeros((own.word_rows, SUBBLOCK), jnp.int32)
        for h, (before, after) in enumerate(zip(old(c), new(c), strict=True)):
            differ = before ^ after
            for j in range(own.packing):
                part = lax.shift_right_logical(differ, jnp.int32(own.width * j)) & ones
                mark = jnp.where(part != 0, 1, 0)
                marks.append(mark)
                word = word | mark << (j * own.parts + h)
        word = word << (lanes.iota(word.shape, 0) & (group - 1)) * own.streams
        start = pl.multiple_of(c * own.word_rows, own.word_rows)
        lanes.store_lanes(rows, start, lanes.merge_rows(word, group))
        sums = lanes.lane_sums(lanes.bfloat16(lanes.stack(marks)))
        counts[0, :, lanes.chunk_lanes(c, own)] = lanes.by_subblock(sums, own)[:1]

    lanes.each_chunk(own, step)
    mask[0] = lanes.unsigned(lanes.every(rows, own.subblocks // WORD_BITS, group))


def pack_kernel(old: Any, new: Any, mask: Any, counts: Any, *rows: Any, own: Layout) -> None:
    read = functools.partial(lanes.words, own=own)
    _pack_tile(functools.partial(read, old), functools.partial(read, new), mask, counts, rows, own)


def epilogue_kernel(
    master: Any, old: Any, new: Any, mask: Any, counts: Any, *rows: Any, own: Layout
) -> None:
    new[...] = master[...].astype(jnp.bfloat16)
    read = functools.partial(lanes.words, own=own)
    _pack_tile(functools.partial(read, old), functools.partial(read, new), mask, counts, rows, own)


def compact_kernel(
    limits: Any,
    old: Any,
    new: Any,
    *refs: Any,
    own: Layout,
    fmt: ElementFormat,
    capacity: int,
) -> None:
    n_words = 3 if own.width == 32 else 2
    outputs, (class_totals, counts, *found, totals) = refs[:n_words], refs[n_words:]
    found = [found[k::n_words] for k in range(n_words)]  # scratch of 128 lanes each
    group = SUBBLOCKS // own.streams  # rows of words in a block

    def step(c: Any) -> None:
        before, after = (lanes.split(lanes.words(ref, c, own), own) for ref in (old, new))
        classes = lanes.classes(before, limits, fmt)
        rank, counters = lanes.ranks(classes)
        changed = jnp.where(before != after, 1, 0)
        earlier = lanes.before(lanes.bfloat16(changed))
        own_totals = _totals(classes, counters, changed, earlier)
        sums = _block_sums(own_totals, own)
        blocks = own.chunk // SUBBLOCKS
        totals[pl.ds(c * blocks, blocks), :] = _block_totals(own_totals, own)

        distance = lanes.iota(classes.shape, 1) - earlier
        record = distance | rank << 8 | classes << 16 | 1 << 19
        values = [before, after] if own.width == 32 else [before << 16 | after]
        words = [jnp.where(changed != 0, word, 0) for word in (record, *values)]
        words = lanes.move_left(words, 8, lambda word: word & 0xFF)
        words = [lanes.resized(word, capacity) for word in words]
        words[0] = _places(words[0], sums, own)
        offset = jnp.broadcast_to(sums[:, CHANGED : CHANGED + 1], words[0].shape)
        words = lanes.move_right(words, offset, (capacity - 1).bit_length())
        start = pl.multiple_of(c * own.word_rows, own.word_rows)
        for k, word in enumerate(words):
            merged = lanes.merge_rows(lanes.merge_streams(word, own), group)
            lanes.store_lanes(found[k], start, merged)

    lanes.each_chunk(own, step)
    fits = totals[: own.blocks, CHANGED : CHANGED + 1] <= capacity
    for k, output in enumerate(outputs):
        word = lanes.every(found[k], own.blocks, group)
        output[0] = lanes.unsigned(jnp.where(jnp.broadcast_to(fits, word.shape), word, 0))
    across = totals[...].T
    class_totals[0] = across[:CLASSES, : own.blocks]
    counts[0] = across[CHANGED : CHANGED + 1, : own.blocks]


def epilogue_compact_kernel(
    limits: Any,
    master: Any,
    old: Any,
    new: Any,
    *refs: Any,
    own: Layout,
    fmt: ElementFormat,
    capacity: int,
) -> None:
    new[...] = master[...].astype(jnp.bfloat16)
    compact_kernel(limits, old, new, *refs, own=own, fmt=fmt, capacity=capacity)


def _totals(classes: Array, counters: list[Array], changed: Array, earlier: Array) -> Array:
    """Elements of class k of every row in lane k, changed ones in the next: int32 (M, 128)."""
    lane = lanes.iota((classes.shape[0], LANES), 1)
    ends = [
        jnp.broadcast_to(array[:, SUBBLOCK - 1 :], lane.shape)
        for array in (*counters, classes, changed, earlier)
    ]
    first = jnp.where(lane < 3, 0, jnp.where(lane < 6, 3, 6))
    packed = jnp.where(lane < 3, ends[0], jnp.where(lane < 6, ends[1], ends[2]))
    field = jnp.where(lane < CLASSES, lane - first, 0)
    # The counters hold what comes before the last element, which is added here: a count of 256
    # would not fit its field.
    members = lax.shift_right_logical(packed, 8 * field) & 0xFF
    members = members + jnp.where(ends[3] == lane, 1, 0)
    return jnp.where(lane < CLASSES, members, jnp.where(lane == CHANGED, ends[4] + ends[5], 0))


def _block_sums(totals: Array, own: Layout) -> Array:
    """Totals of the earlier sub-blocks of the same block."""
    shape = (own.chunk, own.chunk)
    mine, other = lanes.subblock_of_row(shape, 0, own), lanes.subblock_of_row(shape, 1, own)
    earlier = (mine >> 4 == other >> 4) & (other < mine)
    return _selected_sums(earlier, totals)


def _block_totals(totals: Array, own: Layout) -> Array:
    """Totals of each block of the chunk."""
    shape = own.chunk // SUBBLOCKS, own.chunk
    inside = lanes.subblock_of_row(shape, 1, own) >> 4 == lanes.iota(shape, 0)
    return _selected_sums(inside, totals)


def _selected_sums(chosen: Array, totals: Array) -> Array:
    """Sums of the rows of `totals` that each row of `chosen` marks."""
    marks = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
    return lanes.product(marks, lanes.bfloat16(totals)).astype(jnp.int32)


def _places(records: Array, sums: Array, own: Layout) -> Array:
    """Records as `Records.places`: offset and rank in the block, class."""
    classes = records >> 16 & 7
    rank = records >> 8 & 0xFF
    for k in range(CLASSES):
        rank = rank + jnp.where(classes == k, sums[:, k : k + 1], 0)
    lane = lanes.iota(records.shape, 1) + (records & 0xFF)
    subblock = lanes.subblock_of_row(records.shape, 0, own) & (SUBBLOCKS - 1)
    place = subblock << 8 | lane | rank << RANK_SHIFT | classes << CLASS_SHIFT
    return jnp.where(records != 0, place, 0)


def class_counts_kernel(
    limits: Any, old: Any, output: Any, *, own: Layout, fmt: ElementFormat
) -> None:
    def step(c: Any) -> None:
        bits = lanes.split(lanes.words(old, c, own), own)
        fields = lanes.fields(lanes.classes(bits, limits, fmt))
        # A field of 8 bits holds the 128 elements of half a sub-block.
        halves = [
            [lanes.lane_sums(field[:, start : start + LANES]) for field in fields]
            for start in (0, LANES)
        ]
        row = lanes.iota((CLASSES, own.chunk), 0)
        counts = jnp.zeros(row.shape, jnp.int32)
        for k in range(CLASSES):
            left, right = (half[k // lanes.FIELDS] >> 8 * (k % lanes.FIELDS) for half in halves)
            counts = jnp.where(row == k, (left & 0xFF) + (right & 0xFF), counts)
        bytes_ = jnp.minimum(lanes.by_subblock(counts, own), 255) << (row & 3) * 8
        words = lanes.unsigned(lanes.merge_rows(bytes_, 4))
        for word in range(2):
            first = CLASSES // 2 * word
            output[0, word : word + 1, lanes.chunk_lanes(c, own)] = words[first : first + 1]

    lanes.each_chunk(own, step)


def expand_kernel(
    tiles: Any,
    used: Any,
    limits: Any,
    old: Any,
    keys: Any,
    *refs: Any,
    own: Layout,
    fmt: ElementFormat,
    room: int,
) -> None:
    del tiles  # the index maps have read them
    entry = pl.program_id(0)
    wide = own.width == 32
    slots, (new, *scratch) = ((keys, refs[0]), refs[1:]) if wide else ((keys,), refs)

    def column(rows: Any, c: Any) -> Array:
        """Slots of the chunk's sub-blocks in kernel order, (M, 128)."""
        starts = [
            c * own.chunk + j * own.parts + h for h in range(own.parts) for j in range(own.packing)
        ]
        return lanes.stack([rows[pl.ds(s, own.word_rows, stride=own.streams), :] for s in starts])

    def step(c: Any) -> None:
        before = lanes.split(lanes.words(old, c, own), own)
        classes = lanes.classes(before, limits, fmt)
        key = classes << 8 | lanes.ranks(classes)[0]
        columns = [column(rows, c) for rows in scratch]
        change = jnp.zeros_like(before)
        for r in range(room):
            first, last = (part[:, r : r + 1] for part in (columns[0], columns[-1]))
            wanted = lax.shift_right_logical(first, jnp.int32(16))
            added = last if wide else last & 0xFFFF
            change = jnp.where(key == wanted, added, change)
        after = lanes.add_change(before, change, fmt)
        n, p = own.word_rows, own.packing
        start = pl.multiple_of(c * n * p, n * p)
        for h in range(own.parts):
            parts = [
                after[(h * p + j) * n : (h * p + j + 1) * n] << own.width * j for j in range(p)
            ]
            word = functools.reduce(jnp.bitwise_or, parts)
            place = pl.ds(start, n * p), pl.ds(h * SUBBLOCK, SUBBLOCK)
            new[place] = pltpu.bitcast(word, new.dtype)

    # Later entries repeat the last tile, whose result is still in the output's buffer.
    @pl.when(entry < used[0])
    def _change() -> None:
        for ref, rows in zip(slots, scratch, strict=True):
            rows[:, :room] = lanes.signed_words(ref[0]).T
        lanes.each_chunk(own, step)

    @pl.when((used[0] == 0) & (entry == 0))
    def _keep() -> None:
        new[...] = old[...]
