"""The host's view of arrays: bits of boxes in, arrays out, without a copy where memory allows."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kernels.sparse_delta import loops, reference
from kernels.sparse_delta.codec import DigestFrame
from kernels.sparse_delta.digest import digest_box, split_index, strides_of
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
_PIECE_BYTES = 32 << 20


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


def shard_of(leaf: Leaf, piece: Piece) -> Any:
    """One copy of a box that this process holds: a NumPy view, or the array of an accelerator."""
    value = leaf.value
    if isinstance(value, jax.Array) and piece.devices:
        value = next(s.data for s in value.addressable_shards if s.device == piece.devices[0])
    if isinstance(value, jax.Array) and next(iter(value.devices())).platform != "cpu":
        return value
    return np.asarray(value)


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
    total: Sums = (0, 0)
    for piece in held(leaf):
        if not (piece.owned and speaks_for(leaf, spread)):
            continue
        shard = shard_of(leaf, piece)
        if isinstance(shard, jax.Array):
            total = add(total, device_sums(shard, leaf, piece.box))
            continue
        bits = read_box(leaf, piece.box)
        for part in parts(grid, piece.box):
            grown = digest_of(part_of(bits, grid, part), frame_of(grid, part))
            total = add(total, (int(grown[0]), int(grown[1])))
    return total


def device_sums(shard: jax.Array, leaf: Leaf, box: Box) -> Sums:
    """Digest sums of a box of a leaf, made where it lies."""
    strides = strides_of(leaf.shape)
    start = sum(edges[0] * stride for edges, stride in zip(box, strides, strict=True))
    origin = np.asarray(split_index(start), np.uint32)
    found = np.asarray(_device_sums(shard, origin, strides=strides))
    return int(found[0]), int(found[1])


@functools.partial(jax.jit, static_argnames="strides")
def _device_sums(shard: jax.Array, origin: jax.Array, *, strides: tuple[int, ...]) -> jax.Array:
    bits = reference.bits_of(shard, element_format(shard.dtype))
    return digest_box(bits, origin, strides)


def speaks_for(leaf: Leaf, spread: bool) -> bool:
    """Whether this process speaks for a leaf of a tree, of which it may hold a copy among many.

    Of a tree that is spread over processes, leaves that every process holds whole are the first
    one's; shards have owners of their own.
    """
    return not spread or not is_local(leaf) or jax.process_index() == 0


def on_accelerators(leaves: Sequence[Leaf]) -> bool:
    """Whether all arrays of a tree lie on devices other than CPUs, so that `diff` can take them."""
    shardings = [getattr(leaf.value, "sharding", None) for leaf in leaves]
    return bool(leaves) and all(
        s is not None
        and next(iter(s.device_set)).platform != "cpu"
        and (len(s.device_set) == 1 or isinstance(s, jax.sharding.NamedSharding))
        for s in shardings
    )


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


class Arena:
    """Memory for the bits of many arrays, so aligned that JAX takes it over.

    Small arrays lie together in pieces large enough for huge pages: mapping 4 KiB at a time takes
    longer than filling them. A piece is given back when its last array is.
    """

    def __init__(self, size_bytes: int) -> None:
        """Makes none yet; `size_bytes` is what all arrays together take."""
        self._left = size_bytes
        self._piece = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with anything in it."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        padded = -(-size // _ALIGNMENT) * _ALIGNMENT
        if padded > self._piece.size:
            piece = max(padded, min(self._left, _PIECE_BYTES))
            memory = np.empty(piece + _ALIGNMENT, np.uint8)
            start = -memory.ctypes.data % _ALIGNMENT
            self._piece = memory[start : start + piece]
        taken, self._piece = self._piece[:size], self._piece[padded:]
        self._left -= padded
        return taken.view(dtype).reshape(shape)


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


def digest_tree(tree: Any) -> TreeDigest:
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
