"""The device half on NVIDIA GPUs, in Pallas for Mosaic GPU: the bits of `reference`, in one pass.

Every kernel reads its operands from global memory straight into registers, 16 bytes a thread and
load, and keeps them there. A warp owns whole rows of 256 elements (one sub-block, 8 neighbouring
elements a lane), so that mask words build up inside a thread, and counts and prefixes are sums over
lanes, which Mosaic turns into `redux` and butterfly shuffles. Shared memory, asynchronous copies
and barriers would only add to that: nothing is read twice, and the loads of 32 rows are in flight
together.

Mosaic GPU has no prefix sum, population count, gather or scatter of registers. Instead:

- *In-thread order.* Element j of a lane is the sum over the vector axis of `where(iota == j, x,
  0)`; the compiler knows the iota and folds the sum away.
- *Prefix over lanes.* The lane axis is written as 2 × 2 × 2 × 2 × 2. At each level the sum of a
  pair (one shuffle) gives each lane its partner's total, which the upper one of the two adds.
- *Eight counters at once.* A lane has 8 elements, so counts of 8 classes fit the nibbles of one
  word; over a warp they are split into bytes (exclusive prefixes end at 248) or halves.
- *Compaction.* `compact` is two steps: a kernel that reads the weights once and leaves one bit an
  element and per-class prefixes every 64 elements, and a fusion by XLA in which each slot searches
  its element in those, since only XLA can gather. `compact_by_stores` does it in one pass with
  stores that `inline_mgpu` emits; no interpreter runs those, so it is off until a chip has.

Needs compute capability 9.0 or later (Mosaic GPU emits `elect.sync`); elsewhere use `reference`.
The digest has no kernel here: XLA makes one reduction of it that reads the weights once.

Where whole tiles cut the box into groups of 32 sub-blocks in place (`fits`), the kernels index the
box as it lies. Other boxes are first brought into tile order by XLA, which reads and writes them
once more.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.ref import freeze, new_ref
from jaxtyping import Array, Float32, Int32, UInt, UInt32

from kernels.sparse_delta.elements import ElementFormat
from kernels.sparse_delta.gpu_compact import QUARTER, compact
from kernels.sparse_delta.gpu_grid import LANES, VECTOR, WARPS, Grid, fits, in_place, out_of_place
from kernels.sparse_delta.gpu_registers import (
    HALF_LANES,
    Registers,
    batch_of,
    class_halves,
    class_limits,
    classes_in_registers,
    keys_in_registers,
    launch,
)
from kernels.sparse_delta.gpu_store import compact as compact_by_stores
from kernels.sparse_delta.reference import (
    BLOCK,
    EMPTY_SLOT,
    SUBBLOCK,
    WORD_BITS,
    Packed,
    Slots,
    Tile,
    subblocks_of,
    tile_counts,
)

__all__ = ["class_counts", "compact", "compact_by_stores", "epilogue", "expand", "pack", "traffic"]


def pack(
    old: UInt[Array, "lead rows cols"],
    new: UInt[Array, "lead rows cols"],
    *,
    tile: Tile,
    interpret: bool = False,
) -> Packed:
    """`reference.pack`: reads 2·w bits an element, writes 1 bit and 1/64 byte."""
    box, grid = in_place(old, tile)
    operands = (box, in_place(new, tile)[0])
    return _packed(_compare(operands, grid, interpret), grid, tile)


def epilogue(
    master: Float32[Array, "lead rows cols"],
    old: UInt[Array, "lead rows cols"],
    *,
    tile: Tile,
    interpret: bool = False,
) -> tuple[UInt[Array, "lead rows cols"], Packed]:
    """`reference.epilogue`: reads 6 bytes an element, writes 2, 1 bit and 1/64 byte."""
    box, grid = in_place(old, tile)
    operands = (in_place(master, tile)[0], box)
    new, *compared = _compare(operands, grid, interpret, jnp.uint16)
    return out_of_place(new, old.shape, tile), _packed(compared, grid, tile)


def _compare(
    operands: tuple[Array, Array], grid: Grid, interpret: bool, rounded: Any = None
) -> list[Array]:
    """Mask words and counts by groups; given `rounded`, the first operand rounded to bf16 first."""
    registers = Registers((LANES,), interpret)
    views = tuple(grid.view(box, (LANES,)) for box in operands)
    batch = batch_of(grid, sum(box.dtype.itemsize for box in operands))

    def sparse_delta_pack(first: Any, second: Any, *outputs: Any) -> None:
        step = lax.axis_index("0")
        mask_out, counts_out = outputs[-2:]
        group = pl.ds(step * WARPS, WARPS)

        def accumulate(i: Array, mask: Array) -> Array:
            outer = pl.ds(i * batch, batch)
            here = grid.at(step // grid.quads, lax.rem(step, grid.quads), outer)
            bits, published = registers.load(first.at[here]), registers.load(second.at[here])
            if rounded is not None:
                bits = _round_to_bf16(bits)
                outputs[0][here] = bits
            changed = (bits != published).astype(jnp.uint32)
            counts = jnp.sum(jnp.sum(changed, axis=4), axis=3)
            counts_out[group, outer] = counts.astype(jnp.int32)
            place = registers.iota(changed.shape, 1) * grid.inner + registers.iota(changed.shape, 2)
            word = jnp.sum(jnp.sum(changed << place, axis=2), axis=1)
            return mask | word << (i * (batch * grid.inner)).astype(jnp.uint32)

        empty = registers.constant(jnp.zeros((WARPS, LANES, VECTOR), jnp.uint32), (1, 2))
        mask_out[group] = lax.fori_loop(0, grid.outer // batch, accumulate, empty)

    groups = grid.tiles * grid.groups
    out_type = [
        jax.ShapeDtypeStruct((groups, LANES, VECTOR), jnp.uint32),
        jax.ShapeDtypeStruct((groups, grid.outer, grid.inner), jnp.int32),
    ]
    if rounded is not None:
        out_type.insert(0, jax.ShapeDtypeStruct(views[0].shape, rounded))
    kernel = launch(sparse_delta_pack, (grid.tiles * grid.quads,), tuple(out_type), interpret)
    return list(kernel(*views))


def _packed(compared: list[Array], grid: Grid, tile: Tile) -> Packed:
    mask, counts = compared
    subblocks = subblocks_of(tile)
    mask = mask.reshape(grid.tiles, grid.groups, SUBBLOCK)
    return Packed(mask[:, : subblocks // WORD_BITS], counts.reshape(grid.tiles, -1)[:, :subblocks])


def _round_to_bf16(values: Array) -> Array:
    """Bits of the nearest bf16, ties to even; NaNs become the quiet NaN of their sign.

    In integers, since conversions differ between chips in the NaN that they give.
    """
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    nearest = (bits + jnp.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & jnp.uint32(0x7FFFFFFF)) > jnp.uint32(0x7F800000)
    nan = ((bits >> 16) & jnp.uint32(0x8000)) | jnp.uint32(0x7FC0)
    return jnp.where(is_nan, nan, nearest).astype(jnp.uint16)


def class_counts(
    old: UInt[Array, "lead rows cols"],
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    interpret: bool = False,
) -> UInt32[Array, "T 2 S"]:
    """`reference.class_counts`: reads w bits an element, writes 1/32 byte."""
    box, grid = in_place(old, tile)
    registers = Registers((LANES,), interpret)

    batch = batch_of(grid, 4 * old.dtype.itemsize)

    def sparse_delta_class_counts(values: Any, limits: Any, out: Any) -> None:
        step = lax.axis_index("0")
        tile, quad = step // grid.quads, lax.rem(step, grid.quads)

        @pl.loop(0, grid.outer // batch)
        def _(i: Array) -> None:
            outer = pl.ds(i * batch, batch)
            bits = registers.load(values.at[grid.at(tile, quad, outer)])
            one = jnp.uint32(1) << (classes_in_registers(bits, limits, fmt, registers) * 4)
            halves = [jnp.sum(half, axis=3) for half in class_halves(jnp.sum(one, axis=4))]
            for word in range(2):
                counts = [(half >> (16 * word)) & jnp.uint32(0xFFFF) for half in halves]
                saturated = [jnp.minimum(count, jnp.uint32(255)) for count in counts]
                out[tile, word, pl.ds(quad * WARPS, WARPS), outer] = functools.reduce(
                    jnp.bitwise_or, [count << (8 * k) for k, count in enumerate(saturated)]
                )

    shape = (grid.tiles, 2, grid.groups, grid.outer, grid.inner)
    counts = launch(
        sparse_delta_class_counts,
        (grid.tiles * grid.quads,),
        jax.ShapeDtypeStruct(shape, jnp.uint32),
        interpret,
    )(grid.view(box, (LANES,)), class_limits(thresholds, fmt))
    return counts.reshape(grid.tiles, 2, -1)[:, :, : subblocks_of(tile)]


def expand(
    old: UInt[Array, "lead rows cols"],
    slots: Slots,
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    interpret: bool = False,
) -> UInt[Array, "lead rows cols"]:
    """`reference.expand`, in place when `old` is donated.

    Reads and writes w bits for each element of the fours of groups (32768 elements) that hold a
    change, and reads the slots in use. Each element is compared with as many slots as the fullest
    sub-block of its four groups has.
    """
    box, grid = in_place(old, tile)
    registers = Registers(HALF_LANES, interpret)
    batch = batch_of(grid, 8 * old.dtype.itemsize)
    group_axes = (grid.groups, grid.outer, grid.inner)

    def by_group(words: Array) -> Array:
        missing = math.prod(group_axes) - words.shape[2]
        padded = jnp.pad(
            words, ((0, 0), (0, 0), (0, missing)), constant_values=jnp.uint32(EMPTY_SLOT)
        )
        return padded.reshape(*words.shape[:2], *group_axes)

    keys = by_group(slots.keys)
    changes = () if slots.changes is None else (by_group(slots.changes),)
    depth = jnp.arange(1, keys.shape[1] + 1, dtype=jnp.int32)[None, :, None, None]
    full = keys.reshape(*keys.shape[:2], grid.quads, -1) != jnp.uint32(EMPTY_SLOT)
    entry_used = jnp.arange(keys.shape[0])[:, None] < slots.used
    used = jnp.where(entry_used, jnp.max(jnp.where(full, depth, 0), axis=(1, 3)), 0)

    def sparse_delta_expand(
        tiles: Any, used: Any, limits: Any, keys: Any, *changes_and_box: Any
    ) -> None:
        *changes, box = changes_and_box
        step = lax.axis_index("0")
        entry, quad = step // grid.quads, lax.rem(step, grid.quads)
        fullest = used[entry, quad]

        @pl.when(fullest > 0)
        def _() -> None:
            tile = tiles[entry]

            @pl.loop(0, grid.outer // batch)
            def _(i: Array) -> None:
                outer = pl.ds(i * batch, batch)
                here = grid.at(tile, quad, outer)
                bits = registers.load(box.at[here])
                key = keys_in_registers(
                    classes_in_registers(bits, limits, fmt, registers), registers
                )

                def match(slot: Array, change: Array) -> Array:
                    at = (entry, slot, pl.ds(quad * WARPS, WARPS), outer)
                    word = registers.load(keys.at[at])
                    hit = registers.spread(word & jnp.uint32(0xFFFF0000), key.shape) == key
                    added = registers.load(changes[0].at[at]) if changes else word & 0xFFFF
                    return jnp.where(hit, registers.spread(added, key.shape), change)

                none = registers.cast(jnp.zeros_like(key))
                change = lax.fori_loop(0, fullest, match, none)
                box[here] = _add_change(bits, change, fmt)

    ref = new_ref(grid.view(box, HALF_LANES), memory_space=plgpu.GMEM)
    launch(sparse_delta_expand, (keys.shape[0] * grid.quads,), (), interpret)(
        slots.tiles, used, class_limits(thresholds, fmt), keys, *changes, ref
    )
    return out_of_place(freeze(ref), old.shape, tile)


def _add_change(bits: Array, change: Array, fmt: ElementFormat) -> Array:
    """`reference.add_change`, with the change as uint32.

    In the order of the integers a change of a float is a step of its magnitude, away from zero for
    both signs; only where the sum runs into the sign bit has the value crossed zero.
    """
    mask = jnp.uint32((1 << fmt.width_bits) - 1)
    wide = bits.astype(jnp.uint32)
    moved = (wide + change) & mask
    if fmt.kind == "float":
        sign = jnp.uint32(fmt.sign_bit)
        crossed = ((moved ^ wide) & sign) != 0
        moved = jnp.where(crossed, moved ^ (mask ^ sign), moved)
    return moved.astype(bits.dtype)


def traffic(
    name: str,
    extents: tuple[int, int, int],
    *,
    fmt: ElementFormat,
    tile: Tile,
    capacity: int = 128,
    touched: int | None = None,
    room: int = 16,
) -> int:
    """Bytes that a kernel moves between the chip and its memory for a box.

    Every operand is read once and every result written once; added are the slots that the search
    of `compact` fills and what it gathers for them, and the copies that bring a box that does not
    fit (`fits`) into tile order and back.

    Args:
      name: of the entry point: pack, epilogue, compact, compact_by_stores, class_counts or expand.
      extents: lead, rows and cols of the box.
      fmt: of its elements.
      tile: R and C.
      capacity: slots a block, of the compactions.
      touched: listed tiles, of `expand`; all where None.
      room: slots a sub-block, of `expand`.
    """
    width = 2 if name == "epilogue" else fmt.width_bits // 8
    elements = math.prod(extents)
    tiles, subblocks = math.prod(tile_counts(extents, tile)), subblocks_of(tile)
    padded = elements
    if not fits(extents, tile):
        padded = tiles * SUBBLOCK * -(-subblocks // (WARPS * WORD_BITS)) * WARPS * WORD_BITS
    laid_out = 0 if padded == elements else elements + padded
    slots = padded // BLOCK * capacity
    records = slots * (12 if fmt.width_bits == 32 else 8)
    if name == "pack":
        return 2 * width * (padded + laid_out) + padded // 8 + padded // 64
    if name == "epilogue":
        return 8 * (padded + laid_out) + padded // 8 + padded // 64
    if name == "class_counts":
        return width * (padded + laid_out) + padded // 32
    if name == "compact_by_stores":
        return 2 * width * (padded + laid_out) + records + 20 * padded // BLOCK
    if name == "compact":
        surveyed = padded // 8 + padded // 64 + padded // 8 + padded // 16
        gathered = slots * (QUARTER + 1) * width
        return 2 * width * (padded + laid_out) + 2 * surveyed + gathered + records
    if name == "expand":
        listed = tiles if touched is None else touched
        words = listed * subblocks * room * (2 if fmt.width_bits == 32 else 1)
        # The keys are read once more to find the fullest sub-blocks.
        keys = 4 * (words + listed * subblocks * room)
        return 2 * width * (listed * padded // tiles + laid_out) + keys
    raise ValueError(f"no kernel of that name: {name!r}")
