"""Pallas kernels for the TensorCore of a TPU; they give the bits of `reference`.

Weights come as bits, as those of `reference` do, or as bf16 and float32 themselves: what XLA would
bit-cast for a kernel it copies, so the kernels do it in registers (`backends.operand`).

One grid step takes one tile, R × C with C = 256·k, so that old and new are read once and nothing
is transposed in memory. Any other tile is first laid out as a tile matrix, which costs one more
read and write of its operands (`traffic` counts it). `tpu_layout` says how a tile is cut,
`tpu_lanes` how ranks and compaction are computed without cumsum, sort, gather or scatter, and
`tpu_bodies` has the kernels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int32, Shaped, UInt32

from kernels.sparse_delta import reference, tpu_bodies
from kernels.sparse_delta.elements import ElementFormat
from kernels.sparse_delta.reference import (
    CLASSES,
    SUBBLOCK,
    WORD_BITS,
    Packed,
    Records,
    Slots,
    Tile,
)
from kernels.sparse_delta.tpu_layout import LANES, Layout, lay_out, layout

_MAX_CAPACITY = 512

Interpret = bool | pltpu.InterpretParams


@dataclass(frozen=True)
class Call:
    """One `pallas_call`, with what it takes to run it and to count its traffic.

    Attributes:
      kernel: the body.
      own: layout of the box.
      grid: steps.
      inputs: block specification and dtype of each array operand.
      outputs: block specification, shape and dtype of each result.
      scratch: fast memory beside the blocks.
      scalars: how many scalar operands come first.
      aliases: operand to result, both counted with the scalars.
    """

    kernel: Callable[..., None]
    own: Layout
    grid: tuple[int, ...]
    inputs: tuple[tuple[pl.BlockSpec, Any], ...]
    outputs: tuple[tuple[pl.BlockSpec, jax.ShapeDtypeStruct], ...]
    scratch: tuple[Any, ...] = ()
    scalars: int = 0
    aliases: tuple[tuple[int, int], ...] = ()

    def __call__(self, *operands: Array, interpret: Interpret) -> Sequence[Array]:
        order = "parallel" if not self.aliases else "arbitrary"
        return pl.pallas_call(
            self.kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=self.scalars,
                grid=self.grid,
                in_specs=[spec for spec, _ in self.inputs],
                out_specs=[spec for spec, _ in self.outputs],
                scratch_shapes=self.scratch,
            ),
            out_shape=[shape for _, shape in self.outputs],
            input_output_aliases=dict(self.aliases),
            compiler_params=pltpu.CompilerParams(dimension_semantics=(order,) * len(self.grid)),
            interpret=interpret,
        )(*operands)

    def traffic(self) -> int:
        """Bytes between slow and fast memory: every block of every step."""
        blocks = [*self.inputs, *((spec, shape.dtype) for spec, shape in self.outputs)]
        step = 0
        for spec, dtype in blocks:
            block = [size for size in spec.block_shape or () if isinstance(size, int)]
            step += math.prod(block) * jnp.dtype(dtype).itemsize
        return math.prod(self.grid) * step


def _tile_spec(own: Layout) -> pl.BlockSpec:
    return pl.BlockSpec((own.rows, own.cols), lambda i, j, *_: (i, j))


def _result(
    own: Layout, shape: tuple[int, ...], dtype: Any = jnp.uint32
) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
    """A result of which each tile writes its own [1, *shape]."""
    down, across = own.grid
    zeros = (0,) * len(shape)
    spec = pl.BlockSpec((1, *shape), lambda i, j, *_: (i * across + j, *zeros))
    return spec, jax.ShapeDtypeStruct((down * across, *shape), dtype)


def _pack_results(own: Layout) -> tuple[tuple[pl.BlockSpec, jax.ShapeDtypeStruct], ...]:
    return (
        _result(own, (own.subblocks // WORD_BITS, SUBBLOCK)),
        _result(own, (1, own.subblocks), jnp.int32),
    )


def _pack_scratch(own: Layout) -> tuple[Any, ...]:
    return _row_scratch(own, SUBBLOCK)


def _row_scratch(own: Layout, lanes: int) -> tuple[Any, ...]:
    """Fast memory for `lanes` lanes of every row of words."""
    return (pltpu.VMEM((own.rows // own.packing, LANES), jnp.int32),) * (lanes // LANES)


def pack_call(own: Layout, fmt: ElementFormat) -> Call:
    operand = _tile_spec(own), fmt.bits_dtype
    kernel = functools.partial(tpu_bodies.pack_kernel, own=own)
    return Call(kernel, own, own.grid, (operand,) * 2, _pack_results(own), _pack_scratch(own))


def epilogue_call(own: Layout) -> Call:
    return _with_cast(
        pack_call(own, ElementFormat(16, "unsigned")),
        functools.partial(tpu_bodies.epilogue_kernel, own=own),
    )


def epilogue_compact_call(own: Layout, fmt: ElementFormat, capacity: int) -> Call:
    kernel = functools.partial(
        tpu_bodies.epilogue_compact_kernel, own=own, fmt=fmt, capacity=capacity
    )
    return _with_cast(compact_call(own, fmt, capacity), kernel)


def _with_cast(call: Call, kernel: Callable[..., None]) -> Call:
    """A call on old and new as one on float32 weights and old that writes new, too."""
    down, across = call.own.grid
    shape = jax.ShapeDtypeStruct((down * call.own.rows, across * call.own.cols), jnp.bfloat16)
    spec = _tile_spec(call.own)
    return dataclasses.replace(
        call,
        kernel=kernel,
        inputs=((spec, jnp.float32), (spec, jnp.uint16)),
        outputs=((spec, shape), *call.outputs),
    )


def compact_call(own: Layout, fmt: ElementFormat, capacity: int) -> Call:
    n_words = 3 if fmt.width_bits == 32 else 2
    block_rows = -(-own.blocks // 8) * 8
    return Call(
        functools.partial(tpu_bodies.compact_kernel, own=own, fmt=fmt, capacity=capacity),
        own,
        own.grid,
        ((_tile_spec(own), fmt.bits_dtype),) * 2,
        (
            *(_result(own, (own.blocks, capacity)),) * n_words,
            _result(own, (CLASSES, own.blocks), jnp.int32),
            _result(own, (1, own.blocks), jnp.int32),
        ),
        (
            *_row_scratch(own, capacity) * n_words,
            pltpu.VMEM((block_rows, LANES), jnp.int32),
        ),
        scalars=1,
    )


def class_counts_call(own: Layout, fmt: ElementFormat) -> Call:
    return Call(
        functools.partial(tpu_bodies.class_counts_kernel, own=own, fmt=fmt),
        own,
        own.grid,
        ((_tile_spec(own), fmt.bits_dtype),),
        (_result(own, (2, own.subblocks)),),
        scalars=1,
    )


def expand_call(
    own: Layout, fmt: ElementFormat, entries: int, room: int, dtype: Any = None
) -> Call:
    down, across = own.grid
    tile = pl.BlockSpec(
        (own.rows, own.cols),
        lambda entry, tiles, *_: (tiles[entry] // across, tiles[entry] % across),
    )
    slots = pl.BlockSpec((1, room, own.subblocks), lambda entry, *_: (entry, 0, 0)), jnp.uint32
    n_slots = 2 if fmt.width_bits == 32 else 1
    shape = jax.ShapeDtypeStruct((down * own.rows, across * own.cols), dtype or fmt.bits_dtype)
    return Call(
        functools.partial(tpu_bodies.expand_kernel, own=own, fmt=fmt, room=room),
        own,
        (entries,),
        ((tile, fmt.bits_dtype), *(slots,) * n_slots),
        ((tile, shape),),
        (pltpu.VMEM((own.subblocks, LANES), jnp.int32),) * n_slots,
        scalars=3,
        aliases=((3, 0),),
    )


# ------------------------------------------------------------------------------------- entry points


def _limits(thresholds: Array, fmt: ElementFormat) -> Array:
    """Thresholds in units of bits, so that no exponent has to be shifted out."""
    return thresholds.astype(jnp.int32) << fmt.mantissa_bits


def pack(
    old: Shaped[Array, "lead rows cols"],
    new: Shaped[Array, "lead rows cols"],
    *,
    tile: Tile,
    interpret: Interpret = False,
) -> Packed:
    """`reference.pack` in one pass.

    Raises:
      NotImplementedError: tiles that do not fit the fast memory.
    """
    fmt = ElementFormat(8 * old.dtype.itemsize, "unsigned")
    own = layout(old.shape, tile, fmt.width_bits)
    boxes = (lay_out(box, own) for box in (old, new))
    mask, counts = pack_call(own, fmt)(*boxes, interpret=interpret)
    return Packed(mask, counts[:, 0])


def epilogue(
    master: Float32[Array, "lead rows cols"],
    old: Shaped[Array, "lead rows cols"],
    *,
    tile: Tile,
    interpret: Interpret = False,
) -> tuple[Shaped[Array, "lead rows cols"], Packed]:
    """`reference.epilogue` in one pass: the difference costs the mask's bytes and reading `old`.

    Raises:
      NotImplementedError: tiles that the kernel would have to lay out first, so that nothing were
        saved.
    """
    own = _plain_layout(old.shape, tile)
    boxes = (lay_out(box, own) for box in (master, old))
    new, mask, counts = epilogue_call(own)(*boxes, interpret=interpret)
    return _bits(new, old.shape), Packed(mask, counts[:, 0])


def epilogue_compact(
    master: Float32[Array, "lead rows cols"],
    old: Shaped[Array, "lead rows cols"],
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    capacity: int,
    interpret: Interpret = False,
) -> tuple[Shaped[Array, "lead rows cols"], Records]:
    """`reference.epilogue_compact` in one pass.

    Raises:
      NotImplementedError: as `epilogue` and `compact`.
    """
    own = _plain_layout(old.shape, tile)
    _check_capacity(capacity)
    boxes = (lay_out(box, own) for box in (master, old))
    call = epilogue_compact_call(own, fmt, capacity)
    new, *results = call(_limits(thresholds, fmt), *boxes, interpret=interpret)
    return _bits(new, old.shape), _records(results, own)


def _plain_layout(extents: tuple[int, ...], tile: Tile) -> Layout:
    own = layout(extents, tile, 16)
    if own.matrix:
        raise NotImplementedError(f"tiles of 256·k columns that divide the box: {tile=}")
    return own


def _bits(new: Array, shape: tuple[int, ...]) -> Array:
    return lax.bitcast_convert_type(new, jnp.uint16).reshape(shape)


def compact(
    old: Shaped[Array, "lead rows cols"],
    new: Shaped[Array, "lead rows cols"],
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    capacity: int,
    interpret: Interpret = False,
) -> Records:
    """`reference.compact` in one pass.

    Raises:
      NotImplementedError: tiles or slots that do not fit the fast memory.
    """
    own = layout(old.shape, tile, fmt.width_bits)
    _check_capacity(capacity)
    boxes = (lay_out(box, own) for box in (old, new))
    call = compact_call(own, fmt, capacity)
    return _records(call(_limits(thresholds, fmt), *boxes, interpret=interpret), own)


def _check_capacity(capacity: int) -> None:
    if capacity > _MAX_CAPACITY or capacity % LANES:
        raise NotImplementedError(
            f"capacity must be a multiple of {LANES} up to {_MAX_CAPACITY}: {capacity=}"
        )


def _records(results: Sequence[Array], own: Layout) -> Records:
    *words, class_totals, counts = results
    new_values = words[2] if own.packing == 1 else None
    return Records(words[0], words[1], new_values, counts[:, 0], class_totals)


def class_counts(
    old: Shaped[Array, "lead rows cols"],
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    interpret: Interpret = False,
) -> UInt32[Array, "T 2 S"]:
    """`reference.class_counts` in one pass.

    Raises:
      NotImplementedError: tiles that do not fit the fast memory.
    """
    own = layout(old.shape, tile, fmt.width_bits)
    box = lay_out(old, own)
    return class_counts_call(own, fmt)(_limits(thresholds, fmt), box, interpret=interpret)[0]


def expand(
    old: Shaped[Array, "lead rows cols"],
    slots: Slots,
    thresholds: Int32[Array, " 7"],
    *,
    fmt: ElementFormat,
    tile: Tile,
    interpret: Interpret = False,
) -> Shaped[Array, "lead rows cols"]:
    """`reference.expand`, in place where `old` is donated; reads and writes listed tiles only.

    Raises:
      NotImplementedError: tiles that do not fit the fast memory.
    """
    own = layout(old.shape, tile, fmt.width_bits)
    # Slots are turned in registers of 8 rows; further ones are empty.
    missing = ((0, 0), (0, -slots.keys.shape[1] % 8), (0, 0))
    empty = jnp.uint32(reference.EMPTY_SLOT)
    words = [jnp.pad(slots.keys, missing, constant_values=empty)]
    if slots.changes is not None:
        words.append(jnp.pad(slots.changes, missing))
    entries, room, _ = words[0].shape
    box = lay_out(old, own)
    call = expand_call(own, fmt, entries, room, box.dtype)
    scalars = slots.tiles, slots.used.reshape(1), _limits(thresholds, fmt)
    (new,) = call(*scalars, box, *words, interpret=interpret)
    if own.matrix:
        return reference.untile(new, old.shape, tile)
    return new.reshape(old.shape)


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
    """Bytes that a kernel moves between slow and fast memory for a box.

    The sum over its operands and results of block size × grid steps, from the same specifications
    that the kernel is called with, and what is copied around the call: laying a box out as a tile
    matrix, and back.

    Args:
      name: of the entry point: pack, epilogue, compact, epilogue_compact, class_counts or expand.
      extents: lead, rows and cols of the box.
      fmt: of its elements.
      tile: R and C.
      capacity: slots a block, of `compact`.
      touched: listed tiles, of `expand`; all where None.
      room: slots a sub-block, of `expand`.

    Raises:
      NotImplementedError: the kernel has no form for such tiles.
      ValueError: no kernel of that name.
    """
    fused = name.startswith("epilogue")
    own = _plain_layout(extents, tile) if fused else layout(extents, tile, fmt.width_bits)
    down, across = own.grid
    n_subblocks = down * across * own.subblocks
    box = math.prod(extents) * fmt.width_bits // 8
    matrix = n_subblocks * SUBBLOCK * fmt.width_bits // 8
    laid_out = box + matrix if own.matrix else 0
    if name == "pack":
        return pack_call(own, fmt).traffic() + 2 * laid_out
    if name == "epilogue":
        return epilogue_call(own).traffic()
    if name == "compact":
        return compact_call(own, fmt, capacity).traffic() + 2 * laid_out
    if name == "epilogue_compact":
        return epilogue_compact_call(own, fmt, capacity).traffic()
    if name == "class_counts":
        return class_counts_call(own, fmt).traffic() + laid_out
    if name == "expand":
        entries = down * across if touched is None else touched
        return expand_call(own, fmt, entries, room).traffic() + 2 * laid_out
    raise ValueError(f"no kernel of that name: {name!r}")
