"""Compaction on the SparseCore of a TPU, whose stores compress: `reference.compact` again.

A vector subcore has what the TensorCore lacks: stores that squeeze masked lanes together, running
counts of equal values, and gather and scatter in its own memory. Each subcore takes blocks of 4096
elements in turn, one register at a time, and the TensorCore is free meanwhile.

Off by default: no interpreter runs such a kernel on a CPU, so it has been compiled for its target
and never executed. Use `tpu.compact` until this one has been compared with it on a chip:

    records = sparsecore.compact(old, new, thresholds, fmt=fmt, tile=tile, capacity=128)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
from jaxtyping import Array, Int32, UInt

from kernels.sparse_delta import reference
from kernels.sparse_delta.elements import ElementFormat
from kernels.sparse_delta.reference import (
    BLOCK,
    CLASS_SHIFT,
    CLASSES,
    RANK_SHIFT,
    Records,
    Tile,
)

# Where a block's counters stand: its classes, then the changed elements.
_CHANGED = CLASSES
_COUNTERS = 16  # one granule of a copy, 64 bytes


def compact(
    old: UInt[Array, "lead rows cols"],
    new: UInt[Array, "lead rows cols"],
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    capacity: int,
) -> Records:
    """`reference.compact` on the SparseCores of the device; never executed yet, see above.

    Raises:
      NotImplementedError: the device has no SparseCore, or elements have not 16 bits.
    """
    if fmt.width_bits != 16:
        raise NotImplementedError(f"elements of 16 bits only, got {fmt.width_bits}")
    info = pltpu.get_tpu_info().sparse_core
    if info is None:
        raise NotImplementedError("this device has no SparseCore")
    words = [_as_words(reference.tile_matrix(box, tile)) for box in (old, new)]
    n_blocks = words[0].size * 2 // BLOCK
    lanes = info.num_lanes
    shapes = (n_blocks * capacity, n_blocks * capacity, n_blocks * _COUNTERS)
    run = pl.kernel(
        functools.partial(_kernel, n_blocks=n_blocks, capacity=capacity, fmt=fmt, lanes=lanes),
        out_type=tuple(jax.ShapeDtypeStruct((size,), jnp.int32) for size in shapes),
        mesh=plsc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore"),
        scratch_types=[
            *(pltpu.VMEM((BLOCK // 2,), jnp.int32),) * 2,
            # A compressed store touches a whole register from where it begins.
            *(pltpu.VMEM((BLOCK + lanes,), jnp.int32),) * 2,
            pltpu.VMEM((_COUNTERS,), jnp.int32),
            pltpu.VMEM((_COUNTERS,), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(needs_layout_passes=False),
    )
    limits = jnp.pad(thresholds << fmt.mantissa_bits, (0, _COUNTERS - CLASSES + 1))
    found: Any = run(limits, *words)
    places, values, counters = found
    counters = counters.reshape(-1, reference.subblocks_of(tile) * 256 // BLOCK, _COUNTERS)
    counts = counters[..., _CHANGED]
    # A block that does not fit has filled its slots with its first records.
    fits = (counts <= capacity)[..., None]
    slots = [
        jnp.where(fits, lax.bitcast_convert_type(part, jnp.uint32).reshape(*counts.shape, -1), 0)
        for part in (places, values)
    ]
    class_counts = counters[..., :CLASSES].transpose(0, 2, 1)
    return Records(slots[0], slots[1], None, counts, class_counts)


def _as_words(matrix: Array) -> Array:
    """Elements in tile order, two to a word, the earlier one in the low half."""
    return lax.bitcast_convert_type(matrix.reshape(-1, 2), jnp.int32)


def _kernel(
    limits_hbm: Any,
    old_hbm: Any,
    new_hbm: Any,
    places_hbm: Any,
    values_hbm: Any,
    counters_hbm: Any,
    old: Any,
    new: Any,
    places: Any,
    values: Any,
    counters: Any,
    limits: Any,
    *,
    n_blocks: int,
    capacity: int,
    fmt: ElementFormat,
    lanes: int,
) -> None:
    pltpu.sync_copy(limits_hbm, limits)
    cores, subcores = lax.axis_size("core"), lax.axis_size("subcore")
    worker = lax.axis_index("core") * subcores + lax.axis_index("subcore")
    lane = lax.iota(jnp.int32, lanes)
    zeros = jnp.zeros((lanes,), jnp.int32)
    half_words = BLOCK // 2

    def element(ref: Any, start: Array) -> Array:
        """One register of elements in their order, from words that hold two each."""
        pair = plsc.load_gather(ref, [(start + lane) >> 1])
        return lax.shift_right_logical(pair, (lane & 1) * 16) & 0xFFFF

    def class_of(bits: Array) -> Array:
        magnitude = bits & fmt.magnitude_mask
        classes = zeros
        for k in range(CLASSES - 1):
            limit = plsc.load_gather(limits, [zeros + k])
            classes = classes + jnp.where(magnitude >= limit, 1, 0)
        return classes

    def block(turn: Array, _: None) -> None:
        number = worker + turn * cores * subcores
        for source, target in ((old_hbm, old), (new_hbm, new)):
            pltpu.sync_copy(source.at[pl.ds(number * half_words, half_words)], target)
        for start in range(0, _COUNTERS, lanes):
            counters[pl.ds(start, lanes)] = zeros
        for start in range(0, capacity, lanes):
            places[pl.ds(start, lanes)] = zeros
            values[pl.ds(start, lanes)] = zeros

        def step(i: Array, found: Array) -> Array:
            start = i * lanes
            before, after = element(old, start), element(new, start)
            classes = class_of(before)
            # Occurrences count the element itself; at the last one of a class they are its total.
            occurrence, last = plsc.scan_count(classes)
            earlier = plsc.load_gather(counters, [classes])
            plsc.addupdate_scatter(counters, [classes], occurrence, mask=last)
            rank = earlier + occurrence - 1
            changed = before != after
            place = (start + lane) | rank << RANK_SHIFT | classes << CLASS_SHIFT
            for slots, word in ((places, place), (values, before << 16 | after)):
                plsc.store_compressed(slots.at[pl.ds(found, lanes)], word, mask=changed)
            return found + plsc.all_reduce_population_count(changed)[0]

        found = lax.fori_loop(0, BLOCK // lanes, step, jnp.int32(0))
        plsc.store_scatter(counters, [zeros + _CHANGED], zeros + found, mask=lane == 0)
        slots = pl.ds(number * capacity, capacity)
        pltpu.sync_copy(places.at[pl.ds(0, capacity)], places_hbm.at[slots])
        pltpu.sync_copy(values.at[pl.ds(0, capacity)], values_hbm.at[slots])
        pltpu.sync_copy(counters, counters_hbm.at[pl.ds(number * _COUNTERS, _COUNTERS)])

    workers = cores * subcores
    mine = (n_blocks - worker + workers - 1) // workers
    lax.fori_loop(0, mine, block, None)
