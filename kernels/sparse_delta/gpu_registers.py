"""What the GPU kernels are built of: register layouts, prefixes over lanes, classes, counters."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kernels.sparse_delta.elements import ElementFormat
from kernels.sparse_delta.gpu_grid import VECTOR, WARPS, Grid
from kernels.sparse_delta.reference import CLASSES

HALF_LANES = (2, 2, 2, 2, 2)
# Vectors of 16 bytes that a thread loads at a time: enough to cover the latency of the memory, few
# enough that the registers hold several warpgroups a multiprocessor.
VECTORS_IN_FLIGHT = 16


def supports(device: Any) -> bool:
    """Whether Mosaic GPU compiles for this device: NVIDIA, compute capability 9.0 or later."""
    capability = getattr(device, "compute_capability", None)
    parts = str(capability).split(".")
    return device.platform == "gpu" and parts[0].isdecimal() and int(parts[0]) >= 9


def interpreter() -> Any:
    """Value of `interpret` that runs the kernels on a CPU with a GPU's memory and threads."""
    exported = getattr(plgpu, "InterpretGPUParams", None)
    if exported is not None:
        return exported()
    # Before jax 0.11 it was not exported.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def _layout(rows: int, lanes: tuple[int, ...]) -> Any:
    """Layout of an array [4, … `rows` axes …, *lanes, 8]: warps, registers, lanes, a vector."""
    rank = 1 + rows + len(lanes) + 1
    return plgpu.Layout.TILED(
        plgpu.Tiling(((WARPS, *(1,) * rows, *lanes, VECTOR),)),
        warp_dims=(-rank,),
        lane_dims=tuple(range(-1 - len(lanes), -1)),
        vector_dim=-1,
    )


class Registers:
    """Loads and constants in this layout; the interpreter knows neither layouts nor `load`."""

    def __init__(self, lanes: tuple[int, ...], interpret: bool, rows: int = 2) -> None:
        self.layout = _layout(rows, lanes)
        self.rank = 2 + rows + len(lanes)
        self.lanes = tuple(range(self.rank - 2, rows, -1))  # axes, from the fastest up
        self.interpret = interpret

    def cast(self, x: Array) -> Array:
        """Says which registers hold x, an array [4, *rows, *lanes, 8] or its leading axes."""
        if self.interpret:
            return x
        missing = range(x.ndim, self.rank)
        return plgpu.layout_cast(x, self.layout.reduce(tuple(missing)) if missing else self.layout)

    def load(self, ref: Any) -> Array:
        if self.interpret:
            return ref[...]
        # jax 0.11 deprecates the index that 0.10 demands.
        index = inspect.signature(plgpu.load).parameters["idx"]
        args = (None,) if index.default is inspect.Parameter.empty else ()
        layout = self.layout
        if len(ref.shape) < self.rank:
            layout = layout.reduce(tuple(range(len(ref.shape), self.rank)))
        return plgpu.load(ref, *args, layout=layout, optimized=False)

    def constant(self, x: Array, reduced: tuple[int, ...]) -> Array:
        """Like `cast`, for an array that lacks the given axes."""
        return x if self.interpret else plgpu.layout_cast(x, self.layout.reduce(reduced))

    def iota(self, shape: tuple[int, ...], axis: int) -> Array:
        return self.cast(lax.broadcasted_iota(jnp.uint32, shape, axis))

    def spread(self, x: Array, shape: tuple[int, ...], axis: int | None = None) -> Array:
        """Broadcasts x along new last axes, or along one new axis."""
        kept = tuple(d for d in range(len(shape)) if d != axis)[: x.ndim]
        return self.cast(lax.broadcast_in_dim(x, shape, kept))

    def before_lanes(self, counts: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """Exclusive prefix sums over lane axes of extent 2, from the fastest up, and the sums."""
        prefix = self.cast(jnp.zeros_like(counts))
        for axis in axes:
            both = self.spread(jnp.sum(counts, axis=axis), counts.shape, axis)
            upper = self.iota(counts.shape, axis) == 1
            prefix = prefix + jnp.where(upper, both - counts, jnp.zeros_like(counts))
            counts = both
        return prefix, counts

    def before_in_lane(self, counts: Array) -> tuple[Array, Array]:
        """Exclusive prefix sums over the 8 elements of every lane, and the lanes' sums."""
        last = counts.ndim - 1
        position = self.iota(counts.shape, last)
        prefix = nothing = self.cast(jnp.zeros_like(counts))
        total = jnp.sum(jnp.where(position == 0, counts, nothing), axis=last)
        for j in range(1, VECTOR):
            prefix = jnp.where(position == j, self.spread(total, counts.shape), prefix)
            total += jnp.sum(jnp.where(position == j, counts, nothing), axis=last)
        return prefix, total


@functools.cache
def check_devices() -> None:
    """Refuses chips on which Mosaic GPU's code generator aborts the process."""
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return  # none here: compiling for a topology
    for device in devices:
        if not supports(device):
            raise NotImplementedError(
                f"Mosaic GPU needs compute capability 9.0, got {device}; use `reference`"
            )


def launch(
    body: Callable[..., None],
    grid: tuple[int, ...],
    out_type: Any,
    interpret: bool,
    semantics: Any = plgpu.LoweringSemantics.Warpgroup,
) -> Callable[..., Any]:
    """A kernel over thread blocks of one warpgroup; `grid` axes are named "0", "1", …

    Both semantics give the same code. With `Warpgroup`, the default since jax 0.11, the compiler
    searches for the layouts, which takes minutes for a kernel of thousands of operations; with
    `Lane` each result has to be cast to its layout, as `Registers` does, and nothing is searched.

    Raises:
      NotImplementedError: a GPU is here that is older than compute capability 9.0.
    """
    if not interpret:
        check_devices()
    return pl.kernel(
        body,
        out_type=out_type,
        mesh=plgpu.Mesh(grid=grid, grid_names=tuple(str(axis) for axis in range(len(grid)))),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=semantics,
            # A thread writes only what depends on what it read there, and no other thread reads
            # or writes that: barriers around loads and stores would order nothing.
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpreter() if interpret else False,
        name=body.__name__,
    )


def batch_of(grid: Grid, size_bytes: int) -> int:
    """Extent of the outer axis to load at a time, for so many bytes an element."""
    vectors = -(-size_bytes * VECTOR // 16) * grid.inner
    return math.gcd(grid.outer, 1 << max(0, (VECTORS_IN_FLIGHT // vectors).bit_length() - 1))


def class_limits(thresholds: Array, fmt: ElementFormat) -> Array:
    """What the kernels need to class an element by its magnitude m, int32 [9].

    Class ≥ k + 1 ⇔ m ≥ thresholds[k] << mantissa bits (0 … 6). Thresholds of one octave each, which
    `default_thresholds` gives, leave one clip of the exponent: then [8] is 1 and [7] the lowest.
    """
    octaves = jnp.all(thresholds[1:] == thresholds[:-1] + 1).astype(jnp.int32)
    return jnp.concatenate(
        [thresholds << fmt.mantissa_bits, thresholds[:1], octaves[None]], dtype=jnp.int32
    )


def classes_in_registers(
    bits: Array, limits: Any, fmt: ElementFormat, registers: Registers
) -> Array:
    """Class of every element as uint32; `limits` is a reference to `class_limits`."""
    magnitude = bits.astype(jnp.uint32) & jnp.uint32(fmt.magnitude_mask)

    def by_octave(magnitude: Array) -> Array:
        lowest = limits[CLASSES - 1].astype(jnp.uint32)
        above = jnp.maximum((magnitude >> fmt.mantissa_bits) + 1, lowest) - lowest
        return jnp.minimum(above, jnp.uint32(CLASSES - 1))

    def by_threshold(magnitude: Array) -> Array:
        classes = registers.cast(jnp.zeros_like(magnitude))
        for k in range(CLASSES - 1):
            classes += (magnitude >= limits[k].astype(jnp.uint32)).astype(jnp.uint32)
        return classes

    return lax.cond(limits[CLASSES] == 1, by_octave, by_threshold, magnitude)


def class_halves(nibbles: Array) -> list[Array]:
    """Counts of classes (0, 4), (1, 5), (2, 6), (3, 7) as halves of four words."""
    return [(nibbles >> (4 * i)) & jnp.uint32(0x000F000F) for i in range(4)]


def class_bytes(nibbles: Array) -> tuple[Array, Array]:
    """Counts of the even and of the odd classes as bytes, from nibbles."""
    return nibbles & jnp.uint32(0x0F0F0F0F), (nibbles >> 4) & jnp.uint32(0x0F0F0F0F)


def ranks_in_registers(
    classes: Array, in_lane: Array, even: Array, odd: Array, registers: Registers
) -> Array:
    """How many elements of its class every element has before it, from counts by class.

    Args:
      classes: of the elements.
      in_lane: counts of the earlier elements of the lane, as nibbles.
      even: of the earlier lanes, the even classes, as bytes; one word a lane.
      odd: likewise, the odd classes.
      registers: that hold them.
    """
    even, odd = (registers.spread(counts, classes.shape) for counts in (even, odd))
    before = jnp.where((classes & 1) == 1, odd, even) >> ((classes >> 1) * 8)
    return (before & jnp.uint32(0xFF)) + ((in_lane >> (classes * 4)) & jnp.uint32(0xF))


def keys_in_registers(classes: Array, registers: Registers) -> Array:
    """class << 24 | rank in the sub-block << 16 of every element."""
    in_lane, nibbles = registers.before_in_lane(jnp.uint32(1) << (classes * 4))
    even, odd = (
        registers.before_lanes(counts, registers.lanes)[0] for counts in class_bytes(nibbles)
    )
    return (classes << 24) | (ranks_in_registers(classes, in_lane, even, odd, registers) << 16)
