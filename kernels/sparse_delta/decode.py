"""From a payload and the old tree to the new one: `apply`, all of it or nothing."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kernels.sparse_delta import codec, host, parse
from kernels.sparse_delta.elements import ElementFormat, element_format
from kernels.sparse_delta.errors import (
    CorruptPayload,
    Damaged,
    Incomplete,
    UnknownFormat,
    WrongBase,
    WrongModel,
    WrongTarget,
)
from kernels.sparse_delta.parse import Limits, Payload
from kernels.sparse_delta.tiles import Box, TileGrid, box_view, parts, whole_box
from kernels.sparse_delta.trees import Leaf, Sums, TreeDigest, add, named_leaves, tree_digest
from kernels.sparse_delta.wire import ANCHOR, Manifest, Tiles

_REFUSALS = (
    Damaged, Incomplete, UnknownFormat, WrongBase, WrongModel, WrongTarget, CorruptPayload,
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """The tiles of one tensor in a payload, by rising number.

    Attributes:
      tiles: their directory.
      starts: first byte of each in the payload.
      buckets: the bucket of each.
      tables: index of the coder's tables of each.
    """

    tiles: Tiles
    starts: np.ndarray
    buckets: np.ndarray
    tables: np.ndarray


def apply(
    old: Any,
    payload: Any,
    base_digest: TreeDigest | None = None,
    donate: bool = False,
    threads: int | None = None,
) -> Any:
    """Rebuilds the new weights from the old ones, bit for bit.

    Everything is checked before anything is returned: each byte of the payload by its checksums,
    `old` by its digest, and the result by the digest of what the sender had. `old` is not touched.

    Where other processes hold some of the arrays, all processes call this together; then either
    all return or all raise.

    Args:
      old: pytree of arrays as they were when the payload was made; the sharding may be another.
        For an anchor only shapes, dtypes and shardings matter, and leaves may be
        `jax.ShapeDtypeStruct`.
      payload: bytes-like, from `encode`, `merge` or `squash`.
      base_digest: of `old`: `inspect(payload).target_digest` of the payload that made it, or
        `digest(old)`. It is trusted, and saves reading all of `old`.
      donate: gives up `old`: its jax.Arrays that changed are deleted once the new ones stand.
      threads: how many work at once; as many as there are cores where None.

    Returns:
      A tree like `old`, each leaf where that of `old` lies. Leaves without a change are the same
      objects.

    Raises:
      CorruptPayload: a subclass says why the payload is refused.
      TypeError: a leaf is no array; names it.
      ValueError: the payload's tiles lie across several processes here.
    """
    leaves, structure = named_leaves(old, role="old")
    limits = Limits(
        tensors=len(leaves),
        names=sum(len(leaf.name.encode()) for leaf in leaves),
        dims=sum(len(leaf.shape) for leaf in leaves),
        elements=sum(math.prod(leaf.shape) for leaf in leaves),
    )
    threads = host.default_threads() if threads is None else threads
    spread = not all(host.is_local(leaf) for leaf in leaves)

    def attempt() -> _Decoded:
        parsed = parse.read(payload, limits=limits)
        check_model(parsed.manifest, leaves)
        parsed.verify()
        bases = base_sums(leaves, parsed.manifest, base_digest, spread)
        if not spread:
            _check_base(parsed.manifest, leaves, bases, base_digest)
        contents, sums = _decode_all(parsed, leaves, bases, threads)
        return _Decoded(parsed.manifest, contents, bases, sums)

    done = together(attempt, len(leaves)) if spread else attempt()
    if spread:
        _check_base(done.manifest, leaves, done.bases, base_digest)
    _check_target(done.manifest, leaves, done.sums)
    changed = [index for index, content in enumerate(done.contents) if content is not None]
    arrays: list[Any] = [leaf.value for leaf in leaves]
    placed = host.place(
        [leaves[index] for index in changed], [done.contents[index] or [] for index in changed]
    )
    for index, array in zip(changed, placed, strict=True):
        arrays[index] = array
    if donate:
        kept = {id(array) for array in arrays}
        for leaf in leaves:
            if isinstance(leaf.value, jax.Array) and id(leaf.value) not in kept:
                leaf.value.delete()
    by_place = {leaf.place: array for leaf, array in zip(leaves, arrays, strict=True)}
    return jax.tree.unflatten(structure, [by_place[place] for place in range(len(leaves))])


@dataclass(frozen=True)
class _Decoded:
    """What one process decoded: nothing of it is seen until all checks are passed.

    Attributes:
      manifest: of the payload.
      contents: new bits of every box of every leaf, None of leaves without a change.
      bases: digest sums of the old weights; this process's share where there are several.
      sums: those of the new weights, likewise.
    """

    manifest: Manifest
    contents: list[list[np.ndarray] | None]
    bases: list[Sums]
    sums: list[Sums]


def together(attempt: Callable[[], _Decoded], n_leaves: int) -> _Decoded:
    """Runs an attempt on all processes, adds up their sums, and fails on all if one fails."""
    failure: Exception | None = None
    report = np.zeros((1 + 2 * n_leaves, 2), np.uint32)
    done = None
    try:
        done = attempt()
        report[1:] = np.asarray([*done.bases, *done.sums], np.uint32).reshape(-1, 2)
    except Exception as error:  # whatever it is, the others wait for word of it
        failure = error
        refusals = [kind for kind in _REFUSALS if isinstance(error, kind)]
        report[0, 0] = 1 + _REFUSALS.index(refusals[0]) if refusals else 1 + len(_REFUSALS)
    reports = multihost_utils.process_allgather(report)
    if failure is not None:
        raise failure
    for process, code in enumerate(np.asarray(reports)[:, 0, 0].tolist()):
        if code > len(_REFUSALS):
            raise RuntimeError(f"process {process} failed to apply the payload; see its own error")
        if code:
            raise _REFUSALS[code - 1](f"process {process} refused the payload; see its own error")
    assert done is not None
    totals = np.asarray(reports, np.uint64).sum(0)[1:] % (1 << 32)
    sums = [(int(first), int(second)) for first, second in totals]
    return _Decoded(done.manifest, done.contents, sums[:n_leaves], sums[n_leaves:])


def check_model(manifest: Manifest, leaves: Sequence[Leaf]) -> None:
    """Refuses a payload of another tree, or of part of one.

    Raises:
      WrongModel: names the first difference.
      Incomplete: one process's part.
    """
    if len(manifest.tensors) != len(leaves):
        raise WrongModel(
            f"the payload is of {len(manifest.tensors)} tensors, the receiver has {len(leaves)}"
        )
    for tensor, leaf in zip(manifest.tensors, leaves, strict=True):
        theirs = tensor.name, tensor.dtype, tensor.grid.shape
        if theirs != (leaf.name, leaf.dtype.name, leaf.shape):
            raise WrongModel(
                f"the payload has {theirs[0]!r} {theirs[1]}{list(theirs[2])} where the receiver "
                f"has {leaf.name!r} {leaf.dtype.name}{list(leaf.shape)}",
                tensor=tensor.name,
            )
    if manifest.part is not None:
        raise Incomplete("this is one process's part of a payload; merge it with the others'")


def base_sums(
    leaves: Sequence[Leaf],
    manifest: Manifest,
    base_digest: TreeDigest | None,
    spread: bool = False,
) -> list[Sums]:
    """Digest sums of the receiver's weights; this process's share where they are spread."""
    if manifest.kind == ANCHOR:
        return [(0, 0)] * len(leaves)
    known = base_digest.sums if base_digest else {}
    sums = []
    seen: dict[int, Sums] = {}
    for leaf, tensor in zip(leaves, manifest.tensors, strict=True):
        if leaf.name in known:
            # Known as a whole; the first process answers for it.
            pair = known[leaf.name] if not spread or jax.process_index() == 0 else (0, 0)
        else:
            pair = seen.get(id(leaf.value)) or host.digest_sums(leaf, tensor.grid)
            seen[id(leaf.value)] = pair
        sums.append(pair)
    return sums


def _check_base(
    manifest: Manifest,
    leaves: Sequence[Leaf],
    sums: Sequence[Sums],
    base_digest: TreeDigest | None,
) -> None:
    if manifest.kind == ANCHOR:
        return
    root = tree_digest(leaves, sums).root
    if base_digest is not None and base_digest.root != root:
        raise ValueError("base_digest is not of old: names, shapes, dtypes or weights differ")
    if root != manifest.base_root:
        named = "" if manifest.base_version is None else f" (version {manifest.base_version})"
        raise WrongBase(
            f"the payload was made against weights {manifest.base_root.hex()}{named}, the receiver "
            f"has {root.hex()}; apply the versions in order, or an anchor"
        )


def _decode_all(
    parsed: Payload, leaves: Sequence[Leaf], bases: Sequence[Sums], threads: int
) -> tuple[list[list[np.ndarray] | None], list[Sums]]:
    """New bits of every leaf's boxes, None where nothing changed, and the new digest sums."""
    manifest = parsed.manifest
    tables = read_tables(manifest)
    stored = stored_tiles(parsed)
    contents: list[list[np.ndarray] | None] = []
    sums: list[Sums] = []
    done: dict[tuple[int, int], int] = {}
    for index, (leaf, tensor) in enumerate(zip(leaves, manifest.tensors, strict=True)):
        twin = done.setdefault((tensor.same, id(leaf.value)), index)
        tiles = stored.get(tensor.same)
        if manifest.kind == ANCHOR:
            _check_all_there(tensor.name, tensor.grid, tiles)
        if twin != index:
            contents.append(contents[twin])
            sums.append(sums[twin])
        elif tiles is None and manifest.kind != ANCHOR:
            contents.append(None)
            sums.append(bases[index])
        else:
            content, change = _decode_leaf(parsed, leaf, tensor.grid, tiles, tables, threads)
            contents.append(content)
            sums.append(add(bases[index], change))
    return contents, sums


def read_tables(manifest: Manifest) -> list[codec.Tables]:
    """The coder's tables of a payload.

    Raises:
      Damaged: no encoder made them.
    """
    found = []
    for index, (dtype, data) in enumerate(manifest.tables):
        try:
            tables, used = codec.Tables.from_bytes(data, element_format(jax.numpy.dtype(dtype)))
        except (codec.Malformed, TypeError) as error:
            raise Damaged(f"the coder's tables {index} for {dtype}: {error}") from error
        if used != len(data):
            raise Damaged(f"the coder's tables {index} for {dtype} have bytes left over")
        found.append(tables)
    return found


def stored_tiles(parsed: Payload) -> dict[int, Stored]:
    """The tiles of a payload by tensor."""
    collected: dict[int, list[Stored]] = {}
    for run, starts, buckets in parsed.located():
        tables = np.full(len(starts), run.table)
        collected.setdefault(run.tensor, []).append(Stored(run.tiles, starts, buckets, tables))
    return {tensor: _sorted(several) for tensor, several in collected.items()}


def _columns(stored: Stored) -> tuple[np.ndarray, ...]:
    tiles = stored.tiles
    directory = tiles.ids, tiles.modes, tiles.nnz, tiles.sizes
    return *directory, stored.starts, stored.buckets, stored.tables


def _sorted(several: Sequence[Stored]) -> Stored:
    if len(several) == 1:
        return several[0]
    ids, modes, nnz, sizes, starts, buckets, tables = (
        np.concatenate(column)
        for column in zip(
            *(map(_columns, several)),
            strict=True,
        )
    )
    order = np.argsort(ids)
    tiles = Tiles(ids[order], modes[order], nnz[order], sizes[order])
    return Stored(tiles, starts[order], buckets[order], tables[order])


def _check_all_there(name: str, grid: TileGrid, stored: Stored | None) -> None:
    if grid.n_tiles != (0 if stored is None else len(stored.tiles)):
        raise Damaged(f"{name}: an anchor has to hold all {grid.n_tiles} tiles", tensor=name)


def _decode_leaf(
    parsed: Payload,
    leaf: Leaf,
    grid: TileGrid,
    stored: Stored | None,
    tables: Sequence[codec.Tables],
    threads: int,
) -> tuple[list[np.ndarray], Sums]:
    """New bits of the boxes that this process holds, and the change of its share of the sums."""
    anchor = parsed.manifest.kind == ANCHOR
    held = host.held(leaf)
    boxes = [piece.box for piece in held]
    if any(part.ids is None for box in boxes for part in parts(grid, box)):
        return _decode_cut(parsed, leaf, grid, stored, tables, threads)
    contents, total = [], (0, 0)
    for piece in held:
        old = None if anchor else host.read_box(leaf, piece.box)
        out, change = _decode_box(parsed, leaf, grid, piece.box, old, stored, tables, threads)
        contents.append(out)
        if piece.owned and host.speaks_for(leaf):
            total = add(total, change)
    return contents, total


def _decode_box(
    parsed: Payload,
    leaf: Leaf,
    grid: TileGrid,
    box: Box,
    old: np.ndarray | None,
    stored: Stored | None,
    tables: Sequence[codec.Tables],
    threads: int,
) -> tuple[np.ndarray, Sums]:
    """New bits of a box that cuts no tile, and the change of its digest sums."""
    fmt = element_format(leaf.dtype)
    out = host.empty_bits(tuple(stop - start for start, stop in box), fmt.bits_dtype)
    view = out.reshape(box_view(grid, out.shape))
    total = (0, 0)
    for part in parts(grid, box):
        assert part.ids is not None
        place = view[part.cut]
        target = np.ascontiguousarray(place)
        base = None if old is None else host.part_of(old, grid, part)
        frame = host.frame_of(grid, part)
        for chosen, coded, table in _selected(parsed, part.ids, stored, tables, fmt):
            try:
                change = codec.decode_box(
                    base, target, coded, fmt, grid.tile, table, chosen, threads, frame
                )
            except codec.Malformed as error:
                raise _blame(error, leaf, part.ids, stored) from error
            total = add(total, change)
        if not np.may_share_memory(target, place):
            place[...] = target
    return out, total


def _selected(
    parsed: Payload,
    ids: np.ndarray,
    stored: Stored | None,
    tables: Sequence[codec.Tables],
    fmt: ElementFormat,
) -> Iterator[tuple[np.ndarray, codec.CodedTiles, codec.Tables]]:
    """All tiles of a box, those that are not stored as empty ones, by the tables they need."""
    mode = np.zeros(len(ids), np.uint8)
    nnz, size = np.zeros(len(ids), np.uint32), np.zeros(len(ids), np.uint32)
    offset, table = np.zeros(len(ids), np.int64), np.full(len(ids), -1)
    if stored is not None:
        at = np.searchsorted(ids, stored.tiles.ids)
        mine = np.flatnonzero(ids[np.minimum(at, len(ids) - 1)] == stored.tiles.ids)
        at = at[mine]
        mode[at], nnz[at] = stored.tiles.modes[mine], stored.tiles.nnz[mine]
        size[at], offset[at] = stored.tiles.sizes[mine], stored.starts[mine]
        table[at] = stored.tables[mine]
    for index in np.unique(table).tolist():
        chosen = np.flatnonzero(table == index)
        coded = codec.CodedTiles(
            mode[chosen], nnz[chosen], size[chosen], parsed.data, offset[chosen]
        )
        yield chosen, coded, tables[index] if index >= 0 else _no_tables(fmt)


@functools.cache
def _no_tables(fmt: ElementFormat) -> codec.Tables:
    """For tiles that are only copied."""
    return codec.make_tables(fmt, [], (1, 1))


def _blame(
    error: codec.Malformed, leaf: Leaf, ids: np.ndarray, stored: Stored | None
) -> CorruptPayload:
    if error.tile is None or stored is None:
        return Damaged(f"{leaf.name}: {error}", tensor=leaf.name)
    tile = int(ids[error.tile])
    at = int(np.searchsorted(stored.tiles.ids, tile))
    bucket = int(stored.buckets[min(at, len(stored.buckets) - 1)])
    return Damaged(
        f"bucket {bucket} is damaged: {leaf.name}, tile {tile} of the tensor: {error}",
        bucket=bucket,
        tensor=leaf.name,
    )


def _decode_cut(
    parsed: Payload,
    leaf: Leaf,
    grid: TileGrid,
    stored: Stored | None,
    tables: Sequence[codec.Tables],
    threads: int,
) -> tuple[list[np.ndarray], Sums]:
    """As `_decode_leaf`, where the receiver's shards cut tiles: the tensor is put together."""
    if not host.is_local(leaf):
        raise ValueError(
            f"leaf {leaf.name!r}: tiles {grid.tile} of the payload lie across the shards of "
            "several processes here; give these shardings to encode as receivers="
        )
    whole = whole_box(leaf.shape)
    old = None if parsed.manifest.kind == ANCHOR else host.read_box(leaf, whole)
    out, change = _decode_box(parsed, leaf, grid, whole, old, stored, tables, threads)
    cut = [tuple(slice(*edges) for edges in piece.box) for piece in host.held(leaf)]
    contents = []
    for box in cut:
        bits = host.empty_bits(out[box].shape, out.dtype)
        bits[...] = out[box]
        contents.append(bits)
    return contents, change if host.speaks_for(leaf) else (0, 0)


def _check_target(manifest: Manifest, leaves: Sequence[Leaf], sums: Sequence[Sums]) -> None:
    for tensor, pair in zip(manifest.tensors, sums, strict=True):
        if tensor.target is not None and tensor.target != pair:
            raise WrongTarget(
                f"{tensor.name}: what came out is not what went in: digest {pair}, "
                f"wanted {tensor.target}",
                tensor=tensor.name,
            )
    root = tree_digest(leaves, sums).root
    if root != manifest.target_root:
        raise WrongTarget(
            f"what came out is not what went in: digest {root.hex()}, "
            f"wanted {manifest.target_root.hex()}"
        )
