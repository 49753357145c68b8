"""The device half of `encode`: what changed between two trees, found and compacted where they lie.

`diff` runs under `jax.jit` and, for arrays over several devices, under `shard_map`: every device
looks at its own shards, and only the few counters behind the class thresholds are exchanged.
A `Delta` has static shapes: a block of 4096 elements has slots for `capacity` changes. A tile with
a block that needs more is taken from the dense arrays by the host half, so that any density is
exact.

On the host, `shard_records` turns slots into the sparse records that the coder takes.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32

from kernels.sparse_delta import reference
from kernels.sparse_delta.backends import Backend, dispatch, operand, platform_backend
from kernels.sparse_delta.elements import ElementFormat, element_format
from kernels.sparse_delta.reference import BLOCK, CLASS_SHIFT, RANK_SHIFT, Records
from kernels.sparse_delta.slices import slices
from kernels.sparse_delta.tiles import (
    Box,
    Piece,
    TileGrid,
    box_view,
    choose_grid,
    parts,
    pieces,
    whole_box,
)
from kernels.sparse_delta.trees import Leaf, named_leaves

# Rows and columns of each shard's view that its class thresholds are estimated from.
_SAMPLE = (64, 64)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Delta:
    """What changed between two trees, on the devices that hold them: a pytree.

    Leaves are counted in the order of `jax.tree.leaves(new)`.

    Attributes:
      old: the tree before.
      new: the tree after.
      records: of each leaf `reference.Records`; None of an empty one. Over several devices their
        first axis holds one stretch of tiles for each device in the order of the mesh, and is
        sharded over all of its axes.
      thresholds: of each leaf int32[7], the classes that its records count; None of an empty one.
      grids: of each leaf, its tiles in global coordinates.
      shardings: of each leaf; None on one device.
      capacity: slots a block.
    """

    old: Any
    new: Any
    records: tuple[Any, ...]
    thresholds: tuple[Any, ...]
    grids: tuple[TileGrid, ...] = field(metadata={"static": True})
    shardings: tuple[NamedSharding | None, ...] = field(metadata={"static": True})
    capacity: int = field(metadata={"static": True})


@dataclass(frozen=True)
class _LeafPlan:
    """What is static about one leaf: `fmt` of its elements, its `grid`, and where it lies."""

    fmt: ElementFormat
    grid: TileGrid
    sharding: NamedSharding | None

    @property
    def mesh(self) -> Mesh | AbstractMesh | None:
        return None if self.sharding is None else self.sharding.mesh


def diff(
    old: Any,
    new: Any,
    *,
    receivers: Sequence[Any] = (),
    thresholds: Mapping[str, Sequence[int]] | None = None,
    density: float = 0.01,
    shardings: Any = None,
    backend: Backend | None = None,
) -> Delta:
    """Finds what changed between two trees, and compacts it, on the devices that hold them.

    Args:
      old: pytree of arrays with 1-, 2- or 4-byte elements.
      new: the same structure, shapes, dtypes and shardings.
      receivers: trees like `new` of the shardings of those who will apply the payload, which their
        tiles respect; as `encode` takes them.
      thresholds: class thresholds by dtype name, 7 non-decreasing exponents each, such as those of
        the last payload; others are estimated from the old weights (`default_thresholds`).
      density: what share of the elements is expected to change; sets how many slots a block has.
        More changes cost size and time, never exactness.
      shardings: under `jax.jit`, where arrays do not tell: a tree like `new` of `NamedSharding`s,
        or None where a leaf is on one device. Not needed with concrete arrays.
      backend: which kernels; those of the devices' platform where None.

    Returns:
      The delta, for `finish`.

    Raises:
      TypeError: a leaf is no array of such elements, or lies over several devices otherwise than
        by a `NamedSharding`; names it.
      ValueError: the trees or a leaf of them do not match; names it.
    """
    return compare(
        old,
        new,
        receivers=receivers,
        thresholds=thresholds,
        density=density,
        shardings=shardings,
        backend=backend,
        cast=False,
    )


def compare(
    old: Any,
    new: Any,
    *,
    receivers: Sequence[Any],
    thresholds: Mapping[str, Sequence[int]] | None,
    density: float,
    shardings: Any,
    backend: Backend | None,
    cast: bool,
) -> Delta:
    """`diff`, and with `cast` of bf16 `old` and float32 `new`, which is cast in the same pass."""
    leaves, structure = named_leaves(new, role="master" if cast else "new")
    olds, old_structure = named_leaves(old, role="old")
    if structure != old_structure:
        raise ValueError(
            f"old and new must be trees of one structure: {old_structure} is not {structure}"
        )
    places = _leaf_shardings(leaves, olds, shardings, structure)
    wanted = [_flat_shardings(tree, structure) for tree in receivers]
    plans, pairs, known = {}, {}, {}
    for leaf, other in zip(leaves, olds, strict=True):
        _check_pair(leaf, other, cast)
        own = places[leaf.place]
        shards = [own, *(tree[leaf.place] for tree in wanted)]
        shapes = tuple(s.shard_shape(leaf.shape) for s in shards if s is not None)
        grid = choose_grid(leaf.shape, shapes)
        plans[leaf.place] = _LeafPlan(element_format(other.dtype), grid, own)
        pairs[leaf.place] = other.value, leaf.value
        if thresholds and other.dtype.name in thresholds:
            known[leaf.place] = tuple(thresholds[other.dtype.name])
    capacity = reference.capacity_for(density)
    found: dict[int, _Found] = {}
    # One program for each set of devices: all leaves of a mesh, or of a single device.
    for together in _groups(plans, pairs).values():
        results = _compare_group(
            tuple(pairs[i] for i in together),
            plans=tuple(plans[i] for i in together),
            known=tuple(known.get(i) for i in together),
            capacity=capacity,
            backend=backend or _backend_of(pairs[together[0]][1]),
            cast=cast,
        )
        found.update(zip(together, results, strict=True))
    everywhere = range(len(leaves))
    if cast:
        cast_leaves = [
            found[i].new if i in found else pairs[i][1].astype(jnp.bfloat16) for i in everywhere
        ]
        new = jax.tree.unflatten(structure, cast_leaves)
    return Delta(
        old,
        new,
        tuple(found[i].records if i in found else None for i in everywhere),
        tuple(found[i].thresholds if i in found else None for i in everywhere),
        tuple(plans[i].grid for i in everywhere),
        tuple(plans[i].sharding for i in everywhere),
        capacity,
    )


def _check_pair(leaf: Leaf, other: Leaf, cast: bool) -> None:
    if cast and (other.dtype, leaf.dtype) != (jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"leaf {leaf.name!r} must be bfloat16 in old and float32 in master, got "
            f"{other.dtype} and {leaf.dtype}; diff compares leaves of one dtype"
        )
    if leaf.shape != other.shape or (not cast and leaf.dtype != other.dtype):
        raise ValueError(
            f"leaf {leaf.name!r} must have one shape and dtype: {other.dtype}"
            f"{list(other.shape)} in old, {leaf.dtype}{list(leaf.shape)} in new"
        )


def _leaf_shardings(
    leaves: Sequence[Leaf], olds: Sequence[Leaf], shardings: Any, structure: Any
) -> dict[int, NamedSharding | None]:
    """The mesh and specification of each leaf over several devices, by place."""
    given = None if shardings is None else _flat_shardings(shardings, structure)
    found = {}
    for leaf, other in zip(leaves, olds, strict=True):
        if given is not None:
            found[leaf.place] = _named(given[leaf.place], leaf)
            continue
        own, before = (_named(_sharding_of(x.value), x) for x in (leaf, other))
        if own is None or before is None:
            alike = own is before
        else:
            alike = own.is_equivalent_to(before, len(leaf.shape))
        if not alike:
            raise ValueError(
                f"leaf {leaf.name!r} must lie alike in old and new: {before} in old, {own} in "
                "new; place one by the other's sharding with jax.device_put"
            )
        found[leaf.place] = own
    return found


def _flat_shardings(tree: Any, structure: Any) -> list[Any]:
    """Shardings of a tree's leaves; its leaves may be shardings, None or arrays that have one."""
    leaves, own = jax.tree.flatten(
        tree, is_leaf=lambda x: x is None or isinstance(x, jax.sharding.Sharding)
    )
    if own.num_leaves != structure.num_leaves:
        raise ValueError(f"shardings must form a tree like the arrays: {own} is not {structure}")
    return [getattr(leaf, "sharding", leaf) for leaf in leaves]


def _sharding_of(value: Any) -> jax.sharding.Sharding | None:
    return None if isinstance(value, Tracer) else getattr(value, "sharding", None)


def _named(sharding: Any, leaf: Leaf) -> NamedSharding | None:
    if sharding is None or sharding.num_devices == 1:
        return None
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"leaf {leaf.name!r} lies over several devices by a {type(sharding).__name__}; "
            "diff needs a NamedSharding: jax.device_put it onto one"
        )
    return sharding


def _groups(
    plans: Mapping[int, _LeafPlan], pairs: Mapping[int, tuple[Any, Any]]
) -> dict[Any, list[int]]:
    """Places of the leaves that one program can take, without the empty ones."""
    groups: dict[Any, list[int]] = {}
    for place, plan in sorted(plans.items()):
        if plan.grid.n_tiles and 0 not in plan.grid.shape:
            one = getattr(_sharding_of(pairs[place][1]), "device_set", None)
            groups.setdefault(plan.mesh or frozenset(one or ()), []).append(place)
    return groups


def _backend_of(value: Any) -> Backend:
    sharding = _sharding_of(value)
    platform = next(iter(sharding.device_set)).platform if sharding else jax.default_backend()
    return platform_backend(platform)


class _Found(NamedTuple):
    """What the devices found in a leaf; `new` where it was cast in the same pass, else ()."""

    records: Any
    thresholds: Any
    new: Any


@functools.partial(jax.jit, static_argnames=("plans", "known", "capacity", "backend", "cast"))
def _compare_group(
    pairs: tuple[tuple[Any, Any], ...],
    *,
    plans: tuple[_LeafPlan, ...],
    known: tuple[tuple[int, ...] | None, ...],
    capacity: int,
    backend: Backend,
    cast: bool,
) -> tuple[_Found, ...]:
    """What changed in leaves that lie on one mesh, or on one device."""
    local = functools.partial(
        _compare_local, plans=plans, known=known, capacity=capacity, backend=backend, cast=cast
    )
    mesh = plans[0].mesh
    if mesh is None:
        return local(pairs)
    specs = [plan.sharding.spec for plan in plans if plan.sharding]
    everywhere = PartitionSpec(mesh.axis_names)
    return jax.shard_map(
        functools.partial(local, axes=mesh.axis_names),
        mesh=mesh,
        in_specs=(tuple((spec, spec) for spec in specs),),
        out_specs=tuple(
            _Found(everywhere, PartitionSpec(), spec if cast else ()) for spec in specs
        ),
        check_vma=False,  # which pallas_call does not support
    )(pairs)


def _compare_local(
    pairs: tuple[tuple[Any, Any], ...],
    *,
    plans: tuple[_LeafPlan, ...],
    known: tuple[tuple[int, ...] | None, ...],
    capacity: int,
    backend: Backend,
    cast: bool,
    axes: tuple[str, ...] = (),
) -> tuple[_Found, ...]:
    """`_compare_group` on one device's shards."""
    reached = {}
    for (old, _), plan in zip(pairs, plans, strict=True):
        counts = _reached(operand(old, backend), plan.grid, plan.fmt, backend)
        reached[plan.fmt] = reached.get(plan.fmt, 0.0) + counts
    # Replicas count as often as they are; the shares that matter stay the same.
    common = {
        fmt: reference.thresholds_of_counts(jax.lax.psum(counts, axes) if axes else counts)
        for fmt, counts in reached.items()
    }
    found = []
    for (old, new), plan, given in zip(pairs, plans, known, strict=True):
        own = common[plan.fmt] if given is None else jnp.array(given, jnp.int32)
        options = {"fmt": plan.fmt, "grid": plan.grid, "capacity": capacity}
        records, cast_leaf = _compare_shard(old, new, own, **options, backend=backend, cast=cast)
        found.append(_Found(records, own, cast_leaf))
    return tuple(found)


# Layers have weights of few shapes: each is traced and lowered once.
@functools.partial(jax.jit, static_argnames=("fmt", "grid", "capacity", "backend", "cast"))
def _compare_shard(
    old: Array,
    new: Array,
    thresholds: Array,
    *,
    fmt: ElementFormat,
    grid: TileGrid,
    capacity: int,
    backend: Backend,
    cast: bool,
) -> tuple[Records, Any]:
    """Records of a shard, and `new` if it was cast."""
    options = {"fmt": fmt, "tile": grid.tile, "capacity": capacity}
    own = slices(old.shape, grid, fmt.width_bits, backend)

    def view(part: Array) -> Array:
        return operand(part, backend).reshape(box_view(grid, part.shape))

    if cast and own.whole:
        master = new.reshape(box_view(grid, new.shape))
        bits, records = dispatch(
            "epilogue_compact", backend, master, view(old), thresholds, **options
        )
        return records, jax.lax.bitcast_convert_type(bits.reshape(new.shape), jnp.bfloat16)
    # Where the kernels want shards laid out anew, there is no pass of theirs to cast in.
    new = new.astype(jnp.bfloat16) if cast else new

    def compact(old: Array, new: Array) -> Records:
        return dispatch("compact", backend, view(old), view(new), thresholds, **options)

    return own.map(compact, old, new), new if cast else ()


def _reached(
    shard: Array, grid: TileGrid, fmt: ElementFormat, backend: Backend
) -> Float32[Array, " 256"]:
    """How many elements of a shard reach each exponent, estimated from a sample of it."""
    own = slices(shard.shape, grid, fmt.width_bits, backend)
    lead, rows, cols = box_view(grid, shard.shape)
    steps = max(1, lead // 4), max(1, rows // _SAMPLE[0]), max(1, cols // _SAMPLE[1])
    # Elsewhere than on TPUs arrays are row-major, and a view of them is no copy.
    if own.whole or backend != "tpu":
        sample = _every(shard.reshape(lead, rows, cols), steps, (0, 0, 0))
    elif own.along[0] == 2:
        sample = _every_by_column(shard, grid, steps)
    else:
        samples = []
        for piece in own:
            part = piece.take(shard)
            box = part.reshape(box_view(grid, part.shape))
            # Those multiples of the steps that lie in the slice.
            begin = [0, 0, 0]
            begin[piece.along] = -int(piece.view_start) % steps[piece.along]
            if begin[piece.along] < box.shape[piece.along]:
                samples.append(_every(box, steps, begin))
        sample = jnp.concatenate(samples)
    exponent = reference.exponents(reference.bits_of(sample, fmt), fmt).reshape(-1, 1)
    bins = jnp.arange(256, dtype=jnp.int32)[None, :]
    return jnp.mean(exponent >= bins, axis=0, dtype=jnp.float32) * float(shard.size)


def _every(box: Array, steps: tuple[int, int, int], begin: Sequence[int]) -> Array:
    """Elements of a box, in a row, at every step along each axis from some indices on."""
    lead, rows, cols = (slice(first, None, step) for first, step in zip(begin, steps, strict=True))
    # One after the other: XLA:TPU would take both steps at once, with all in fast memory.
    lines = jax.lax.optimization_barrier(box[lead, rows])
    return lines[:, :, cols].reshape(-1)


def _every_by_column(shard: Array, grid: TileGrid, steps: tuple[int, int, int]) -> Array:
    """`_every` of a shard's whole view, one column after the other.

    Where tiles are numbered along columns first, all rows are in one tile, down to the one row that
    a tensor is as a vector: XLA:TPU would have a slice of it in fast memory to step through, in
    registers with one row of sixteen.
    """
    outer, inner = shard.shape[: grid.splits[1]], shard.shape[grid.splits[1] :]
    lead, rows, cols = box_view(grid, shard.shape)
    places = np.stack(np.unravel_index(np.arange(0, cols, steps[2]), inner), axis=1)

    def column(place: Array) -> Array:
        starts = [0] * len(outer) + [place[k] for k in range(len(inner))]
        taken = jax.lax.dynamic_slice(shard, starts, (*outer, *(1 for _ in inner)))
        return _every(taken.reshape(lead, rows, 1), steps, (0, 0, 0))

    return jax.lax.map(column, jnp.asarray(places, jnp.int32)).reshape(-1)


class ShardRecords(NamedTuple):
    """The sparse records of one shard, on the host, as the coder takes them.

    Attributes:
      piece: the shard, in global coordinates.
      ids: numbers of its tiles, in the order of the shard's own view.
      starts: records [starts[t], starts[t + 1]) are those of tile t.
      position: within the tile.
      class_: of the old value.
      rank: how many earlier elements of the tile have the same class.
      old: bits before.
      new: bits after.
      totals: int64[T, 8], elements of each class in each tile, changed or not.
      dense: tiles that did not fit their slots; they have no records here and have to be coded
        from the arrays.
    """

    piece: Piece
    ids: np.ndarray
    starts: np.ndarray
    position: np.ndarray
    class_: np.ndarray
    rank: np.ndarray
    old: np.ndarray
    new: np.ndarray
    totals: np.ndarray
    dense: np.ndarray


def shard_records(delta: Delta, place: int) -> Iterator[ShardRecords]:
    """The records of those shards of a leaf that this process speaks for.

    Args:
      delta: of concrete arrays.
      place: of the leaf among `jax.tree.leaves(delta.new)`.
    """
    records, grid = delta.records[place], delta.grids[place]
    if records is None:
        return
    fmt = element_format(jax.tree.leaves(delta.new)[place].dtype)
    sharding = delta.shardings[place]
    thresholds = np.asarray(delta.thresholds[place])
    if sharding is None:
        whole = Piece(whole_box(grid.shape), (), True)
        yield _shard(whole, grid, fmt, records, thresholds)
        return
    held = {shard.device: index for index, shard in enumerate(records.places.addressable_shards)}
    for piece in pieces(sharding, grid.shape):
        if piece.owned:
            index = held[piece.devices[0]]
            own = jax.tree.map(lambda x, index=index: x.addressable_shards[index].data, records)
            yield _shard(piece, grid, fmt, own, thresholds)


def _shard(
    piece: Piece, grid: TileGrid, fmt: ElementFormat, records: Records, thresholds: np.ndarray
) -> ShardRecords:
    counts = np.asarray(records.counts)
    capacity = records.places.shape[-1]
    fullest = int(counts.max(initial=0, where=counts <= capacity))
    # Slots that no block uses stay on the device; a step of 32 makes few different programs.
    width = min(capacity, -(-fullest // 32) * 32)
    dense = np.any(counts > width, axis=1)
    used = (np.arange(width) < counts[..., None]) & ~dense[:, None, None]
    tile, block, _ = np.nonzero(used)

    def fetch(words: Array) -> np.ndarray:
        return np.asarray(words[..., :width])[used]

    place, value = fetch(records.places), fetch(records.values)
    class_ = (place >> CLASS_SHIFT).astype(np.uint8)
    # Elements of each class in the blocks of the tile before this one.
    members = np.asarray(records.class_counts).astype(np.uint32)
    before = np.cumsum(members, axis=2, dtype=np.uint32) - members
    bits = fmt.bits_dtype
    new_values = records.new_values
    ids = shard_tiles(grid, piece.box)
    totals = members.sum(axis=2, dtype=np.int64)
    # The padding of a tile was counted as zeros, whose exponent is the lowest.
    padding = members.shape[2] * BLOCK - grid.sizes(ids)
    totals[:, np.count_nonzero(thresholds <= 0)] -= padding
    return ShardRecords(
        piece=piece,
        ids=ids,
        starts=np.concatenate([[0], np.cumsum(used.sum((1, 2)))]),
        position=(block * BLOCK + (place & (BLOCK - 1))).astype(np.uint32),
        class_=class_,
        rank=(place >> RANK_SHIFT & (BLOCK - 1)) + before[tile, class_, block],
        old=(value >> 16 if new_values is None else value).astype(bits),
        new=(value & 0xFFFF if new_values is None else fetch(new_values)).astype(bits),
        totals=totals,
        dense=dense,
    )


def shard_tiles(grid: TileGrid, box: Box) -> np.ndarray:
    """Numbers of a shard's tiles, int64, in the order of the shard's own view.

    The shard must cut no tile, which holds for a grid that was chosen with its sharding.
    """
    extents = box_view(grid, tuple(stop - start for start, stop in box))
    counts = reference.tile_counts(extents, grid.tile)
    ids = np.full(counts, -1, np.int64)
    for part in parts(grid, box):
        assert part.ids is not None, "the grid was chosen so that no shard cuts a tile"
        where = tuple(
            slice(cut.start // size, -(-cut.stop // size))
            for cut, size in zip(part.cut, (1, *grid.tile), strict=True)
        )
        ids[where] = part.ids.reshape(ids[where].shape)
    return ids.reshape(-1)
