"""The host's view of arrays: bits of boxes in, arrays out, without a copy where memory allows."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kernels.sparse_delta import loops
from kernels.sparse_delta.codec import DigestFrame
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.tiles import (
    Box,
    Part,
    Piece,
    TileGrid,
    box_view,
    choose_grid,
    parts,
    pieces,
    whole_box,
)
from kernels.sparse_delta.trees import Leaf, Sums, TreeDigest, add, named_leaves, tree_digest

# XLA's alignment of buffers: a NumPy array that has it becomes a jax.Array without a copy.
_ALIGNMENT = 64


def default_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_local(leaf: Leaf) -> bool:
    """Whether this process holds all of it."""
    sharding = getattr(leaf.value, "sharding", None)
    return sharding is None or sharding.is_fully_addressable


def held(leaf: Leaf) -> tuple[Piece, ...]:
    """The distinct boxes of a leaf that this process holds."""
    sharding = getattr(leaf.value, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return (Piece(whole_box(leaf.shape), (), True),)
    return pieces(sharding, leaf.shape)


def grid_of(leaf: Leaf, receivers: Sequence[Any] = ()) -> TileGrid:
    """The tiles of a leaf that neither its own sharding nor its receivers' cut."""
    own = getattr(leaf.value, "sharding", None)
    shardings = (*(() if own is None or len(own.device_set) == 1 else (own,)), *receivers)
    return choose_grid(leaf.shape, tuple(s.shard_shape(leaf.shape) for s in shardings))


def read_box(leaf: Leaf, box: Box) -> np.ndarray:
    """The bits of one box, C-contiguous, in the shape of the box.

    A shard of a CPU, or a NumPy array, is not copied; one that lies in several shards is.

    Raises:
      ValueError: another process holds some of it.
    """
    value = leaf.value
    if isinstance(value, jax.Array) and len(value.sharding.device_set) > 1:
        for shard in value.addressable_shards:
            if _box_of(shard.index, leaf.shape) == box:
                return _bits(np.asarray(shard.data), leaf)
        if not value.is_fully_addressable:
            raise ValueError(
                f"{leaf.name!r}: this process does not hold the box {box} of the array, whose "
                "sharding is another than its counterpart's; place both alike"
            )
    array = np.asarray(value)
    if box != whole_box(leaf.shape):
        array = array[tuple(slice(*edges) for edges in box)]
    return _bits(array, leaf)


def _box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))


def _bits(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    return contiguous.view(element_format(leaf.dtype).bits_dtype)


def part_of(bits: np.ndarray, grid: TileGrid, part: Part) -> np.ndarray:
    """The bits of a part, (lead, rows, cols), C-contiguous; a view where it is one in memory."""
    return np.ascontiguousarray(bits.reshape(box_view(grid, bits.shape))[part.cut])


def frame_of(grid: TileGrid, part: Part) -> DigestFrame:
    _, rows, cols = grid.extents
    return DigestFrame(part.origin, rows * cols, cols)


def digest_sums(leaf: Leaf, grid: TileGrid, spread: bool) -> Sums:
    """Digest sums of what this process speaks for: all of a tree that is not spread."""
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        raise TypeError(f"leaf {leaf.name!r} has a shape but no values; pass arrays")
    total = np.zeros(2, np.int64)
    for piece in held(leaf):
        if piece.owned and speaks_for(leaf, spread):
            bits = read_box(leaf, piece.box)
            for part in parts(grid, piece.box):
                total += digest_of(part_of(bits, grid, part), frame_of(grid, part))
    total &= 0xFFFFFFFF
    return int(total[0]), int(total[1])


def speaks_for(leaf: Leaf, spread: bool) -> bool:
    """Whether this process speaks for a leaf of a tree, of which it may hold a copy among many.

    Of a tree that is spread over processes, leaves that every process holds whole are the first
    one's; shards have owners of their own.
    """
    return not spread or not is_local(leaf) or jax.process_index() == 0


def is_spread(leaves: Sequence[Leaf]) -> bool:
    """Whether other processes hold some of a tree."""
    return not all(is_local(leaf) for leaf in leaves)


def digest_of(box: np.ndarray, frame: DigestFrame) -> np.ndarray:
    """Digest sums of a box (lead, rows, cols) of bits, int64[2]."""
    sums = np.zeros(2, np.int64)
    flat = box.reshape(-1)
    flat.flags.writeable = False
    _, rows, cols = box.shape
    for lead in range(box.shape[0]):
        origin = frame.origin + lead * frame.lead_stride
        loops.digest_rows(
            flat, lead * rows * cols, cols, cols, rows, origin, frame.row_stride, sums
        )
    return sums


def empty_bits(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory for the bits of an array, so aligned that JAX takes it over."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def place(leaves: Sequence[Leaf], contents: Sequence[Sequence[np.ndarray]]) -> list[Any]:
    """Arrays that lie where `leaves` do.

    Args:
      leaves: NumPy arrays stay NumPy arrays.
      contents: for each leaf, bits of every box that `held` gives, in its order and shape.
    """
    shards: list[np.ndarray] = []
    targets: list[Any] = []
    for leaf, boxes in zip(leaves, contents, strict=True):
        for piece, bits in zip(held(leaf), boxes, strict=True):
            array = bits.view(leaf.dtype)
            sharding = getattr(leaf.value, "sharding", None)
            if isinstance(leaf.value, np.ndarray):
                continue
            for device in piece.devices or (None,):
                shards.append(array)
                targets.append(_target(leaf, sharding, device))
    arrived = iter(jax.device_put(shards, targets) if shards else ())
    placed: list[Any] = []
    for leaf, boxes in zip(leaves, contents, strict=True):
        if isinstance(leaf.value, np.ndarray):
            placed.append(boxes[0].view(leaf.dtype))
        elif not held(leaf)[0].devices:
            placed.append(next(arrived))
        else:
            own = [next(arrived) for piece in held(leaf) for _ in piece.devices]
            placed.append(
                jax.make_array_from_single_device_arrays(leaf.shape, leaf.value.sharding, own)
            )
    return placed


def _target(leaf: Leaf, sharding: Any, device: Any) -> Any:
    if device is not None:
        return jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
    if sharding is None or not getattr(leaf.value, "committed", True):
        return None  # where JAX puts what nobody placed
    return sharding


def digest(tree: Any) -> TreeDigest:
    """What a tree of weights is known by; reads all of it.

    Where other processes hold some of the arrays, all processes call this together.

    Args:
      tree: pytree of arrays with 1-, 2- or 4-byte elements.

    Raises:
      TypeError: a leaf is no array of such elements; names it.
    """
    leaves, _ = named_leaves(tree, role="tree")
    spread = is_spread(leaves)
    sums = [digest_sums(leaf, grid_of(leaf), spread) for leaf in leaves]
    if spread:
        shares = multihost_utils.process_allgather(np.asarray(sums, np.uint32).reshape(-1, 2))
        sums = [add(*share) for share in np.asarray(shares).transpose(1, 0, 2).tolist()]
    return tree_digest(leaves, sums)
