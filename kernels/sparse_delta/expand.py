"""The device half of `apply`: changes put where the old values say that they belong.

A payload names a changed element by the class of its old value and its rank among the tile's
elements of that class. A receiver whose weights lie on an accelerator brings no weights to the
host for that: the device counts classes (1/64 of the bytes of bf16 weights), the host finds with
the counts the sub-block of each change and its rank there (`locate`), and the device adds the
changes in place.

The functions here work on a *stack*: one array made of the shards that a process has of a tensor,
one on each of some devices, joined along the first dimension without moving a byte. So one program
serves all devices, whatever sharding the tensor has, and no other process takes part.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, UInt, UInt32

from kernels.sparse_delta import reference
from kernels.sparse_delta.backends import Backend, dispatch, operand
from kernels.sparse_delta.digest import digest_box, strides_of
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.reference import Slots, tile_counts
from kernels.sparse_delta.slices import Slice, slices
from kernels.sparse_delta.tiles import TileGrid, box_view

AXIS = "device"
"""Of the mesh of a stack."""
AnyMesh = Mesh | AbstractMesh
_EACH, _ALL = PartitionSpec(AXIS), PartitionSpec()


class Patches(NamedTuple):
    """Tiles of one size that are replaced whole, M of them for each device of a stack.

    Attributes:
      starts: lead, row and column of each in the shard's view; rising, as tiles are numbered.
      used: how many of a device's M count.
      tiles: their bits.
    """

    starts: Int32[Array, "DM 3"]
    used: Int32[Array, " D"]
    tiles: UInt[Array, "DM rows cols"]


_Range = tuple[Patches, Array, Array]
"""Patches of one device, of which those between two numbers count."""


class Edits(NamedTuple):
    """What a payload changes in a stack; no tile is in two of these.

    Attributes:
      slots: changes, and the thresholds of the classes that they are named by. The leading
        dimension of each array holds those of one device behind those of another; `used` is [D].
      patches: whole tiles.
    """

    slots: tuple[tuple[Slots, Int32[np.ndarray, " 7"]], ...]
    patches: tuple[Patches, ...]


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """Some devices of this process in a row, as stacks lie on them."""
    return Mesh(np.asarray(devices), (AXIS,))


def stack(mesh: Mesh, shards: Sequence[jax.Array]) -> jax.Array:
    """One array of equal shards, each on its own device of a mesh, where and as they are."""
    first, *rest = shards[0].shape
    shape = len(shards) * first, *rest
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, _EACH), list(shards))


def _mesh(stacked: jax.Array) -> Mesh:
    assert isinstance(stacked.sharding, NamedSharding), "as `stack` makes it"
    return cast(Mesh, stacked.sharding.mesh)


def unstack(stacked: jax.Array) -> list[jax.Array]:
    """The shards of a stack, in the order of its devices."""
    held = {shard.device: shard.data for shard in stacked.addressable_shards}
    return [held[device] for device in _mesh(stacked).devices.flat]


def class_counts(
    old: jax.Array,
    chosen: Int32[Array, " DL"] | None,
    thresholds: Int32[np.ndarray, " 7"],
    *,
    grid: TileGrid,
    backend: Backend,
) -> UInt32[Array, "DT 2 S"]:
    """How many elements of each class every sub-block has: `reference.class_counts`.

    Args:
      old: a stack of shards that cut no tile.
      chosen: L tiles of each shard, by their numbers in the shard's own view; all where None.
      thresholds: of the classes.
      grid: of the whole tensor.
      backend: which kernels.
    """
    mesh = _mesh(old)
    return _class_counts(old, chosen, thresholds, mesh=mesh, grid=grid, backend=backend)


@functools.partial(jax.jit, static_argnames=("mesh", "grid", "backend"))
def _class_counts(
    old: Array,
    chosen: Array | None,
    thresholds: Array,
    *,
    mesh: AnyMesh,
    grid: TileGrid,
    backend: Backend,
) -> Array:
    def local(shard: Array, chosen: Array | None, thresholds: Array) -> Array:
        fmt = element_format(shard.dtype)
        own = slices(shard.shape, grid, fmt.width_bits, backend)

        def count(part: Array) -> Array:
            box = _view(part, grid, backend)
            return dispatch("class_counts", backend, box, thresholds, fmt=fmt, tile=grid.tile)

        counts = own.map(count, shard)
        return counts if chosen is None else counts[chosen]

    return _on_each(local, mesh, in_specs=(_EACH, _EACH, _ALL))(old, chosen, thresholds)


def rewrite(
    old: jax.Array, edits: Edits, *, grid: TileGrid, backend: Backend, donate: bool = False
) -> Array:
    """The new values of a stack.

    Args:
      old: a stack of shards that cut no tile.
      edits: what changes.
      grid: of the whole tensor.
      backend: which kernels.
      donate: gives up `old`: the changes are made in its memory. Otherwise it is copied first.
    """
    run = rewrite_in_place if donate else _rewrite
    return run(old, edits, mesh=_mesh(old), grid=grid, backend=backend)


def _rewrite_stack(
    old: Array, edits: Edits, *, mesh: AnyMesh, grid: TileGrid, backend: Backend
) -> Array:
    local = functools.partial(_rewritten, grid=grid, backend=backend)
    return _on_each(local, mesh, in_specs=(_EACH, _specs(edits)))(old, edits)


_STATIC = "mesh", "grid", "backend"
_rewrite: Any = jax.jit(_rewrite_stack, static_argnames=_STATIC)
rewrite_in_place: Any = jax.jit(_rewrite_stack, static_argnames=_STATIC, donate_argnums=0)


def rewritten_sums(
    old: jax.Array, edits: Edits, origins: Array, *, grid: TileGrid, backend: Backend
) -> Array:
    """Digest sums of what `rewrite` gives, shard by shard; nothing of it is kept.

    Args:
      old: a stack of shards that cut no tile.
      edits: what changes.
      origins: low and high half of the row-major index of each shard's first element.
      grid: of the whole tensor.
      backend: which kernels.

    Returns:
      uint32 [D, 2].
    """
    mesh = _mesh(old)
    return _rewritten_sums(old, edits, origins, mesh=mesh, grid=grid, backend=backend)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _rewritten_sums(
    old: Array, edits: Edits, origins: Array, *, mesh: AnyMesh, grid: TileGrid, backend: Backend
) -> Array:
    def local(shard: Array, edits: Edits, origin: Array) -> Array:
        return _sums(_rewritten(shard, edits, grid=grid, backend=backend), origin, grid)

    return _on_each(local, mesh, in_specs=(_EACH, _specs(edits), _EACH))(old, edits, origins)


def shard_sums(stacked: jax.Array, origins: Array, *, grid: TileGrid) -> Array:
    """Digest sums of each shard of a stack, uint32 [D, 2]; `origins` as of `rewritten_sums`."""
    return _shard_sums(stacked, origins, mesh=_mesh(stacked), grid=grid)


@functools.partial(jax.jit, static_argnames=("mesh", "grid"))
def _shard_sums(stacked: Array, origins: Array, *, mesh: AnyMesh, grid: TileGrid) -> Array:
    def local(shard: Array, origin: Array) -> Array:
        return _sums(shard, origin, grid)

    return _on_each(local, mesh, in_specs=(_EACH, _EACH))(stacked, origins)


def rebuilt(
    old: Array,
    edits: Edits,
    origins: Array,
    *,
    mesh: AnyMesh,
    grid: TileGrid,
    backend: Backend,
) -> tuple[Array, Array, Array]:
    """All that a leaf asks of the devices, for a trace: class counts, new values, digest sums.

    Args:
      old: a stack on `mesh`, which it does not tell while it is traced.
      edits: what changes; the thresholds of the first slots are those of the counts.
      origins: as of `rewritten_sums`.
      mesh: of the stack.
      grid: of the whole tensor.
      backend: which kernels.
    """
    on: Any = {"mesh": mesh, "grid": grid}
    counts = _class_counts(old, None, edits.slots[0][1], backend=backend, **on)
    new = _rewrite_stack(old, edits, backend=backend, **on)
    return counts, new, _shard_sums(new, origins, **on)


def _on_each(local: Callable[..., Array], mesh: AnyMesh, *, in_specs: Any) -> Callable[..., Array]:
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=_EACH,
        check_vma=False,  # which pallas_call does not support
    )


def _specs(edits: Edits) -> Edits:
    """Where the arrays of edits lie: all with their devices, but for the thresholds."""
    each = jax.tree.map(lambda _: _EACH, edits)
    return each._replace(slots=tuple((slots, _ALL) for slots, _ in each.slots))


def _view(shard: Array, grid: TileGrid, backend: Backend) -> Array:
    return operand(shard, backend).reshape(box_view(grid, shard.shape))


def _rewritten(shard: Array, edits: Edits, *, grid: TileGrid, backend: Backend) -> Array:
    """One shard's new values."""
    width = element_format(shard.dtype).width_bits
    own = slices(shard.shape, grid, width, backend)
    slots = tuple((each._replace(used=each.used[0]), limits) for each, limits in edits.slots)
    patches = tuple((each, jnp.int32(0), each.used[0]) for each in edits.patches)
    if own.whole:
        return _changed(shard, slots, patches, grid=grid, backend=backend)

    def step(piece: Slice, new: Array) -> Array:
        here = tuple((piece.slots(each), limits) for each, limits in slots)
        part = piece.take(new)
        _, rows, cols = box_view(grid, part.shape)
        tiles = tuple(
            _of_slice(each, piece, grid, shard.shape)
            for each in edits.patches
            # A last slice may be less than a tile of the others.
            if each.tiles.shape[1] <= rows and each.tiles.shape[2] <= cols
        )
        part = _changed(part, here, tiles, grid=grid, backend=backend)
        return piece.put(new, part)

    return own.fold(step, shard)


def _of_slice(patches: Patches, piece: Slice, grid: TileGrid, shape: tuple[int, ...]) -> _Range:
    """The whole tiles of a slice of a shard of some shape, by their places in it."""
    lead, row, col = (patches.starts[:, axis] for axis in range(3))
    _, down, across = tile_counts(box_view(grid, shape), grid.tile)
    numbers = (lead * down + row // grid.tile[0]) * across + col // grid.tile[1]
    begin, end = piece.those(numbers, patches.used[0])
    starts = patches.starts.at[:, piece.along].add(-piece.view_start)
    return patches._replace(starts=starts), begin, end


def _changed(
    shard: Array,
    slots: Sequence[tuple[Slots, Array | np.ndarray]],
    patches: Sequence[_Range],
    *,
    grid: TileGrid,
    backend: Backend,
) -> Array:
    """New values of a shard or of a slice of it."""
    options = {"fmt": element_format(shard.dtype), "tile": grid.tile}
    box = _view(shard, grid, backend)
    for own, thresholds in slots:
        new = dispatch("expand", backend, box, own, thresholds, **options)
        # Tiles that the kernels do not take as they lie come back as bits.
        box = new if new.dtype == box.dtype else lax.bitcast_convert_type(new, box.dtype)
    for own, begin, end in patches:
        box = _patched(box, own, begin, end)
    new = box.reshape(shard.shape)
    if shard.dtype == jnp.bool_:
        return new.astype(jnp.bool_)
    return new if new.dtype == shard.dtype else lax.bitcast_convert_type(new, shard.dtype)


def _patched(box: Array, patches: Patches, begin: Array, end: Array) -> Array:
    tiles = patches.tiles
    if tiles.dtype != box.dtype:
        tiles = lax.bitcast_convert_type(tiles, box.dtype)

    def replace(i: Array, box: Array) -> Array:
        return lax.dynamic_update_slice(box, tiles[i][None], tuple(patches.starts[i]))

    return lax.fori_loop(begin, end, replace, box)


def _sums(shard: Array, origin: Array, grid: TileGrid) -> Array:
    bits = reference.bits_of(shard, element_format(shard.dtype))
    return digest_box(bits, origin[0], strides_of(grid.shape))[None]


def read_tiles(
    shard: jax.Array, starts: np.ndarray, *, grid: TileGrid, size: tuple[int, int]
) -> np.ndarray:
    """Tiles of one size of a shard, on the host: [M, rows, cols], of the shard's dtype.

    Args:
      shard: on one device.
      starts: int32[M, 3], lead, row and column of each in the shard's view.
      grid: of the whole tensor.
      size: rows and columns of each.
    """
    # A few lengths only, so that few programs are compiled.
    count = rounded(len(starts))
    padded = np.zeros((count, 3), np.int32)
    padded[: len(starts)] = starts
    tiles = _read_tiles(shard, padded, view=box_view(grid, shard.shape), size=size)
    return np.asarray(tiles)[: len(starts)]


@functools.partial(jax.jit, static_argnames=("view", "size"))
def _read_tiles(
    shard: Array, starts: Array, *, view: tuple[int, int, int], size: tuple[int, int]
) -> Array:
    box = shard.reshape(view)
    return lax.map(lambda start: lax.dynamic_slice(box, tuple(start), (1, *size))[0], starts)


def rounded(count: int) -> int:
    """The least number not below a count that has at most three binary digits before its zeros.

    >>> [rounded(n) for n in (0, 1, 7, 9, 100, 1000)]
    [1, 1, 7, 10, 112, 1024]
    """
    step = 1 << max(0, count.bit_length() - 3)
    return max(1, -(-count // step) * step)
