"""The device half of `apply`: changes put where the old values say that they belong.

A payload names a changed element by the class of its old value and its rank among the tile's
elements of that class. A receiver whose weights lie on an accelerator brings no weights to the
host for that: the device counts classes (1/64 of the bytes of bf16 weights), the host finds with
the counts the sub-block of each change and its rank there, and the device adds the changes in
place:

    counts = class_count_table(np.asarray(class_counts(shard, thresholds, ...)))
    slots, dense = make_slots(counts, starts, class_, rank, change, fmt=fmt)
    shard = expand(shard, slots, thresholds, ..., donate=True)

Each works on one shard on one device; tiles are numbered in the shard's own view.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from kernels.sparse_delta import reference
from kernels.sparse_delta.backends import Backend, dispatch
from kernels.sparse_delta.elements import ElementFormat, element_format
from kernels.sparse_delta.reference import CLASSES, EMPTY_SLOT, SUBBLOCK, Slots
from kernels.sparse_delta.tiles import TileGrid, box_view


@functools.partial(jax.jit, static_argnames=("grid", "backend"))
def class_counts(
    old: Array, thresholds: Int32[Array, " 7"], *, grid: TileGrid, backend: Backend
) -> UInt32[Array, "T 2 S"]:
    """How many elements of each class every sub-block of a shard has: `reference.class_counts`.

    Args:
      old: one shard, on one device.
      thresholds: of the classes.
      grid: of the whole tensor; the shard cuts none of its tiles.
      backend: which kernels.
    """
    fmt = element_format(old.dtype)
    box = reference.bits_of(old, fmt).reshape(box_view(grid, old.shape))
    return dispatch("class_counts", backend, box, thresholds, fmt=fmt, tile=grid.tile)


def expand(
    old: Array,
    slots: Slots,
    thresholds: Int32[Array, " 7"],
    *,
    grid: TileGrid,
    backend: Backend,
    donate: bool = False,
) -> Array:
    """A shard's new values from the old ones and slots of changes: `reference.expand`.

    Args:
      old: one shard, on one device.
      slots: changes, by tiles in the order of the shard's own view (`shard_tiles`).
      thresholds: of the classes.
      grid: of the whole tensor; the shard cuts none of its tiles.
      backend: which kernels.
      donate: gives up `old`: the changes are made in its memory. Otherwise it is copied first.
    """
    run = _expand_in_place if donate else _expand
    return run(old, slots, thresholds, grid=grid, backend=backend)


def _expand_shard(
    old: Array, slots: Slots, thresholds: Array, *, grid: TileGrid, backend: Backend
) -> Array:
    fmt = element_format(old.dtype)
    box = reference.bits_of(old, fmt).reshape(box_view(grid, old.shape))
    new = dispatch("expand", backend, box, slots, thresholds, fmt=fmt, tile=grid.tile)
    new = new.reshape(old.shape)
    if old.dtype == jnp.bool_:
        return new.astype(jnp.bool_)
    return new if new.dtype == old.dtype else jax.lax.bitcast_convert_type(new, old.dtype)


_STATIC = ("grid", "backend")
_expand: Callable[..., Array] = jax.jit(_expand_shard, static_argnames=_STATIC)
_expand_in_place: Callable[..., Array] = jax.jit(
    _expand_shard, static_argnames=_STATIC, donate_argnums=0
)


def make_slots(
    counts: np.ndarray,
    starts: np.ndarray,
    class_: np.ndarray,
    rank: np.ndarray,
    change: np.ndarray,
    *,
    fmt: ElementFormat,
    max_room: int = 32,
) -> tuple[Slots, np.ndarray]:
    """Slots for `expand`, on the host, from changes that are named by class and rank in the tile.

    Args:
      counts: of the classes in every sub-block [T, S, 8], as `reference.class_count_table` gives.
      starts: changes [starts[t], starts[t + 1]) are those of tile t; T + 1 of them.
      class_: of the old value of each change.
      rank: how many earlier elements of the tile have the same class.
      change: `reference.change_of`, mod 2^w.
      fmt: of the elements.
      max_room: most slots a sub-block; every slot of a sub-block costs each of its elements a
        comparison. Tiles with a sub-block that needs more are left out.

    Returns:
      The slots, and for every tile whether it was left out and has to be brought dense.

    Raises:
      ValueError: a rank that no element of its class has.
    """
    n_tiles, n_subblocks, _ = counts.shape
    tile = np.repeat(np.arange(n_tiles), np.diff(starts))
    # Ends of the ranks of each sub-block, for each tile and class; offset so that all rise.
    ends = counts.transpose(0, 2, 1).astype(np.int64).cumsum(axis=2)
    span = n_subblocks * SUBBLOCK + 1
    row = tile * CLASSES + class_
    if np.any(rank >= ends.reshape(-1, n_subblocks)[row, -1]):
        raise ValueError("a rank is beyond the elements of its class: other old values than these")
    rising = ends.reshape(-1) + np.repeat(np.arange(n_tiles * CLASSES), n_subblocks) * span
    found = np.searchsorted(rising, row * span + rank, side="right")
    subblock = found % n_subblocks
    inside = rank - (ends - counts.transpose(0, 2, 1)).reshape(-1)[found]

    place = tile * n_subblocks + subblock
    order = np.argsort(place, kind="stable")
    sorted_place = place[order]
    slot = np.empty(len(place), np.int64)
    slot[order] = np.arange(len(place)) - np.searchsorted(sorted_place, sorted_place)
    held = np.bincount(place, minlength=n_tiles * n_subblocks).reshape(n_tiles, n_subblocks)
    dense = held.max(axis=1, initial=0) > max_room
    listed = np.flatnonzero(~dense & (held.sum(axis=1) > 0))
    # At least one entry, and slots in registers of 8 rows.
    room = max(8, -(-int(held[listed].max(initial=0)) // 8) * 8)
    tiles = listed if len(listed) else np.zeros(1, np.int64)
    words = np.full((len(tiles), room, n_subblocks), EMPTY_SLOT, np.uint32)
    entry = np.full(n_tiles, -1)
    entry[listed] = np.arange(len(listed))
    kept = entry[tile] >= 0
    at = entry[tile[kept]], slot[kept], subblock[kept]
    key = (class_.astype(np.uint32) << 8 | inside.astype(np.uint32)) << 16
    wide = fmt.width_bits == 32
    words[at] = (key if wide else key | change.astype(np.uint32))[kept]
    changes = None
    if wide:
        changes = np.zeros(words.shape, np.uint32)
        changes[at] = change[kept]
    slots = Slots(
        jnp.asarray(tiles, jnp.int32),
        jnp.int32(len(listed)),
        jnp.asarray(words),
        None if changes is None else jnp.asarray(changes),
    )
    return slots, dense
