"""Compaction on GPUs in one pass, by stores at computed places. Off: it has not run on a chip.

`gpu_compact` surveys the weights and lets XLA's gathers find the changed elements, which moves
about half as much again. Here every changed element is stored into its slot as soon as its warp
knows the slot: the changed ones before it in the block, in earlier sub-blocks (a running count),
earlier lanes (a prefix over lanes) and earlier elements of the lane.

Pallas has no store at an index that differs between threads. `plgpu.inline_mgpu` emits one from
MLIR (`scf.if`, `memref.store`), a dozen lines that the interpreter cannot run: on a CPU the tests
run all but those. `experiments.delta_bench.device` checks and times this kernel beside the other.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector
from jaxtyping import Array, Int32, UInt

from kernels.sparse_delta.elements import ElementFormat
from kernels.sparse_delta.gpu_grid import VECTOR, WARPS, in_place
from kernels.sparse_delta.gpu_registers import (
    HALF_LANES,
    Registers,
    class_bytes,
    class_limits,
    classes_in_registers,
    launch,
    ranks_in_registers,
)
from kernels.sparse_delta.reference import (
    CLASS_SHIFT,
    RANK_SHIFT,
    SUBBLOCK,
    SUBBLOCKS,
    Records,
    Tile,
    subblocks_of,
)

ROWS_IN_FLIGHT = 4  # sub-blocks that a warp loads at a time
NO_SLOT = 0xFFFFFFFF


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
    """`reference.compact`: reads 2·w bits an element, writes the slots and 5 words a block."""
    before, grid = in_place(old, tile)
    after = in_place(new, tile)[0]
    registers = Registers(HALF_LANES, interpret, rows=0)
    wide = fmt.width_bits == 32

    def sparse_delta_store(old: Any, new: Any, limits: Any, *outputs: Any) -> None:
        *slots_out, counts_out, totals_out = outputs
        step = lax.axis_index("0")
        tile, quad = step // grid.quads, lax.rem(step, grid.quads)
        groups = pl.ds(step * WARPS, WARPS)
        element = _places(registers)

        @pl.loop(0, 2)
        def _(half: Array) -> None:
            out = tuple(slots.at[groups, half] for slots in slots_out)

            def rows(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                first = half * SUBBLOCKS + i * ROWS_IN_FLIGHT
                loaded = []
                for row in range(ROWS_IN_FLIGHT):
                    subblock = first + row
                    outer, inner = subblock // grid.inner, lax.rem(subblock, grid.inner)
                    here = grid.at(tile, quad, outer, inner)
                    loaded.append((registers.load(old.at[here]), registers.load(new.at[here])))
                for row, (bits, other) in enumerate(loaded):
                    place = element + ((i * ROWS_IN_FLIGHT + row) * SUBBLOCK).astype(jnp.uint32)
                    classes = classes_in_registers(bits, limits, fmt, registers)
                    slot, rank, carry = _advance(bits != other, classes, carry, registers)
                    words = [place | rank << RANK_SHIFT | classes << CLASS_SHIFT]
                    old_word, new_word = bits.astype(jnp.uint32), other.astype(jnp.uint32)
                    words += [old_word, new_word] if wide else [old_word << 16 | new_word]
                    _store(out, slot, words, registers)
                return carry

            none = registers.cast(jnp.zeros((WARPS, *HALF_LANES), jnp.uint32))
            count, *totals = lax.fori_loop(0, SUBBLOCKS // ROWS_IN_FLIGHT, rows, (none,) * 5)
            _store_zeros(out, count, capacity, element, registers)
            counts_out[groups, half] = _any_lane(count).astype(jnp.int32)
            for word, total in enumerate(totals):
                totals_out[word, groups, half] = _any_lane(total)

    groups = grid.tiles * grid.groups
    slots = jax.ShapeDtypeStruct((groups, 2, capacity), jnp.uint32)
    *words, counts, totals = launch(
        sparse_delta_store,
        (grid.tiles * grid.quads,),
        (
            *[slots] * (3 if wide else 2),
            jax.ShapeDtypeStruct((groups, 2), jnp.int32),
            jax.ShapeDtypeStruct((4, groups, 2), jnp.uint32),
        ),
        interpret,
        plgpu.LoweringSemantics.Lane,
    )(
        grid.view(before, HALF_LANES),
        grid.view(after, HALF_LANES),
        class_limits(thresholds, fmt),
    )
    blocks = subblocks_of(tile) // SUBBLOCKS
    places, values, *new_values = (
        word.reshape(grid.tiles, -1, capacity)[:, :blocks] for word in words
    )
    halves = totals.reshape(4, grid.tiles, -1)[:, :, :blocks]
    by_class = jnp.concatenate([halves & 0xFFFF, halves >> 16]).astype(jnp.int32)
    return Records(
        places,
        values,
        new_values[0] if wide else None,
        counts.reshape(grid.tiles, -1)[:, :blocks],
        by_class.transpose(1, 0, 2),
    )


def _places(registers: Registers) -> Array:
    """Place in its sub-block of every element of a warp."""
    shape = (WARPS, *HALF_LANES, VECTOR)
    place = registers.iota(shape, len(shape) - 1)
    for power, axis in enumerate(registers.lanes):
        place += registers.iota(shape, axis) * (VECTOR << power)
    return place


def _advance(
    changed: Array, classes: Array, carry: tuple[Array, ...], registers: Registers
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Slot (or `NO_SLOT`) and rank in the block of a row of 256, and the counts with it added.

    The carry holds, the same in all lanes, the changed elements before the row and those of each
    class: classes k and k + 4 in the halves of word k.
    """
    count, *totals = carry
    changes = changed.astype(jnp.uint32)
    slot, in_lane = registers.before_in_lane(changes)
    earlier, row_count = registers.before_lanes(in_lane, registers.lanes)
    slot += registers.spread(earlier + count, changes.shape)
    in_lane, nibbles = registers.before_in_lane(jnp.uint32(1) << (classes * 4))
    # Of 16 lanes counts still fit bytes. Sums over 32 can carry from one byte into the next, but
    # the difference of two such sums, which is a prefix, is exact.
    *fast, slowest = registers.lanes
    prefixes, row_totals = [], []
    for counts in class_bytes(nibbles):
        prefix, sixteen = registers.before_lanes(counts, tuple(fast))
        more, _ = registers.before_lanes(sixteen, (slowest,))
        prefixes.append(prefix + more)
        halves = [(sixteen >> (8 * high)) & jnp.uint32(0x00FF00FF) for high in range(2)]
        row_totals.append([registers.before_lanes(half, (slowest,))[1] for half in halves])
    even, odd = prefixes
    rank = ranks_in_registers(classes, in_lane, even, odd, registers)
    before = registers.cast(jnp.zeros_like(classes))
    for word, total in enumerate(totals):
        spread = registers.spread(total, classes.shape)
        before = jnp.where((classes & 3) == word, spread, before)
    rank += (before >> ((classes >> 2) * 16)) & jnp.uint32(0xFFFF)
    added = [row_totals[word % 2][word // 2] for word in range(4)]
    sums = [total + more for total, more in zip(totals, added, strict=True)]
    slot = jnp.where(changed, slot, jnp.full_like(slot, NO_SLOT))
    return slot, rank, (count + row_count, *sums)


def _any_lane(same: Array) -> Array:
    """[4] from an array that is the same in all lanes."""
    for axis in range(same.ndim - 1, 0, -1):
        same = jnp.max(same, axis=axis)
    return same


def _store_zeros(
    out: Sequence[Any], count: Array, capacity: int, element: Array, registers: Registers
) -> None:
    """Zeros to the slots that hold nothing: those after `count`, or all if they do not suffice."""
    spread = registers.spread(count, element.shape)
    zero = registers.cast(jnp.zeros_like(element))
    for first in range(0, capacity, SUBBLOCK):
        slot = element + jnp.uint32(first)
        empty = (slot >= spread) | (spread > jnp.uint32(capacity))
        slot = jnp.where(empty, slot, jnp.full_like(slot, NO_SLOT))
        _store(out, slot, [zero] * len(out), registers, barrier=first == 0)


def _store(
    out: Sequence[Any],
    slot: Array,
    words: Sequence[Array],
    registers: Registers,
    barrier: bool = False,
) -> None:
    """Stores words[k] of every element to out[k][warp, slot], if there is such a slot.

    `barrier` orders it after the stores that other threads have made to the same slots.
    """
    capacity = out[0].shape[1]
    if registers.interpret:
        # No two elements have one slot, so that a maximum over elements picks the one, if any.
        flat, places = slot.reshape(WARPS, -1, 1), jnp.arange(capacity, dtype=jnp.uint32)
        hit = flat == places[None, None, :]
        for ref, word in zip(out, words, strict=True):
            picked = jnp.max(jnp.where(hit, word.reshape(WARPS, -1, 1), 0), axis=1)
            ref[...] = jnp.where(jnp.any(hit, axis=1), picked, ref[...])
        return

    count = len(out)
    ref_types, layouts = (plgpu.RefType(),) * count, (registers.layout,) * count

    def store(context: Any, refs: Any, slot: Any, words: Any) -> None:
        del context
        if barrier:
            mgpu.warpgroup_barrier()
        index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
        bound = arith.constant(i32, capacity)
        threads = slot.layout.thread_idxs(slot.shape)
        for at, (warp, *_) in zip(np.ndindex(slot.registers.shape), threads, strict=True):
            for i in range(VECTOR):
                own = _lane_element(slot.registers[at], i)
                branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, own, bound))
                with ir.InsertionPoint(branch.then_block):
                    place = arith.index_castui(index, own)
                    for ref, word in zip(refs, words, strict=True):
                        memref.store(_lane_element(word.registers[at], i), ref, [warp, place])
                    scf.yield_([])

    emit = plgpu.inline_mgpu(arg_types=(ref_types, registers.layout, layouts))(store)
    emit(tuple(out), slot, tuple(words))


def _lane_element(register: Any, i: int) -> Any:
    position = ir.DenseI64ArrayAttr.get([i])
    return vector.extract(register, dynamic_position=[], static_position=position)
