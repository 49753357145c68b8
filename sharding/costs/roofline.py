"""Time of one operation on one device: products on padded tiles, passes over memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sharding.costs.local import View
from sharding.costs.machine import Machine
from sharding.programs.program import Op

# Sharpness of the change from memory-bound to compute-bound: (x^p + y^p)^(1/p).
_ROOFLINE_SHARPNESS = 3.0
# Rows of a product are padded to the sublanes of a register (8 on TPUs, and Tensor Core tiles).
_SUBLANES = 8
# Elements of 2 bytes that a tensor core's loads of 16 bytes hold.
_ALIGNED = 8
# Keys of a block of fused attention (512 in Splash and Flash attention's usual settings).
_ATTENTION_BLOCK = 512
# Kinds whose addresses depend on data.
SCATTERED = ("gather", "scatter", "sort", "route")


def op_time(view: View, op: Op, machine: Machine) -> np.ndarray:
    """Seconds of one forward execution of an operation on local sizes, (N,).

    T = (t_compute^p + t_memory^p)^(1/p), with t_compute = FLOPs on padded tiles over what the
    matrix unit reaches, and t_memory = bytes of operands and results over what memory reaches.
    """
    constants = machine.constants
    moved = view.one * 0.0
    if not op.fused and op.kind != "gather":
        for name in (*op.inputs, *op.outputs):
            moved = moved + view.bytes(name)
    elif op.kind == "gather":
        moved = 2 * view.bytes(op.outputs[0])
    memory_s = moved / (machine.hbm * constants.hbm)
    if op.kind in SCATTERED:
        memory_s = memory_s / constants.scatter
    if not op.is_matmul:
        return memory_s
    flops = op.work * _fraction(view, op) * _padded(view, op, machine)
    share = constants.attention if op.kind == "attention" else constants.matmul
    if op.kind == "grouped_dot":
        share = share * constants.grouped
    peak = machine.peak["bf16"]
    share = share * precision_gain(machine.peak, op.precision, constants)
    compute_s = flops / (peak * share)
    p = _ROOFLINE_SHARPNESS
    return (compute_s**p + memory_s**p) ** (1 / p)


def precision_gain(peaks: Mapping[str, Any], precision: str, constants: Any) -> Any:
    """How many times as fast as in bf16 the matrix unit runs.

    Wide types run at their own rate, where it is known; narrow ones reach part of what they
    promise, (nominal gain)^`low_precision`.
    """
    gain = peaks.get(precision or "bf16", peaks["bf16"]) / peaks["bf16"]
    return gain if precision == "fp32" else gain**constants.low_precision


def _fraction(view: View, op: Op) -> Any:
    """Computed share of an iteration space: blocks on the diagonal of a mask are whole.

    Causal attention over S keys in blocks of b computes (1 + b/S)/2 of the square.
    """
    if op.fraction == 1.0 or not op.contracted:
        return op.fraction
    return op.fraction * (1.0 + np.minimum(1.0, _ATTENTION_BLOCK / view.sizes[op.contracted[0]]))


def _padded(view: View, op: Op, machine: Machine) -> np.ndarray:
    """Points of an iteration space, padded as the matrix unit pads them.

    Contracted and output columns fill whole tiles; rows fill sublanes. A grouped product pads the
    rows of every expert by half a tile on average. Starting and finishing a tile costs as much as
    `fill` more of the contraction.
    """
    tile = machine.tile
    space = view.program.space(op)
    first = view.program.tensors[op.inputs[0]].dims
    second = view.program.tensors[op.inputs[1]].dims if len(op.inputs) > 1 else ()
    if op.kind == "attention":  # the head is padded; sequences are long
        width = view.sizes[space[-1]]
        return view.elements(space) * _up(width, tile / 2) / width
    rows, columns, depth, batch = view.one, view.one, view.one, view.one
    full = dict(zip(space, view.factors(space), strict=True))
    for dim in space:
        if dim in op.contracted:
            depth = depth * full[dim]
        elif dim in first and dim in second:
            batch = batch * full[dim]
        elif dim in second:
            columns = columns * full[dim]
        else:
            rows = rows * full[dim]
    if op.kind == "grouped_dot":
        experts = [d for d in second if view.program.splits.get(d) == "expert"]
        count = view.elements(experts)
        rows = rows + count * tile / 2 * (count > 1)
    else:
        rows = _up(rows, _SUBLANES)
    whole = batch * rows * _up(columns, tile / 2)
    whole = whole * (_up(depth, tile / 2) + machine.constants.fill)
    ragged = (columns % _ALIGNED > 0) | (depth % _ALIGNED > 0)
    return whole / np.where(ragged, machine.constants.unaligned, 1.0)


def _up(size: Any, step: Any) -> Any:
    return np.ceil(size / step) * step
