"""From two versions of a tree to a payload: `encode`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kernels.sparse_delta import codec, host
from kernels.sparse_delta.assemble import (
    base_sums,
    checked_version,
    matched,
    packed,
    sharding_trees,
    ties,
)
from kernels.sparse_delta.delta import diff
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.finish import finish
from kernels.sparse_delta.routing import Coded, routed
from kernels.sparse_delta.tiles import Part, TileGrid, parts
from kernels.sparse_delta.trees import Leaf, TreeDigest, add, named_leaves
from kernels.sparse_delta.wire import Run, Tiles


@dataclass(frozen=True)
class _Work:
    """One box to code: a part of a shard of a tensor."""

    tensor: int
    ids: np.ndarray
    frame: codec.DigestFrame
    old: np.ndarray | None
    new: np.ndarray


@dataclass(frozen=True)
class Touched:
    """Tiles of a tensor that may have changed: their numbers, int64 and rising, in a grid."""

    grid: TileGrid
    ids: np.ndarray


def encode(
    old: Any,
    new: Any,
    *,
    version: int | None = None,
    base_version: int | None = None,
    base_digest: TreeDigest | None = None,
    receivers: Sequence[Any] | None = None,
    threads: int | None = None,
    conditional: bool = True,
) -> bytes:
    """Packs what turns `old` into `new`, bit for bit.

    Where other processes hold some of the arrays, each process calls this with the same arguments
    and gets its part; `merge` joins the parts.

    Args:
      old: pytree of arrays with 1-, 2- or 4-byte elements; None packs all of `new` (an anchor).
      new: the same structure, shapes, dtypes and shardings.
      version: what the caller calls `new`, 0 … 2^63 − 1; only carried.
      base_version: what the caller calls `old`; only carried.
      base_digest: of `old`, as `inspect(payload).target_digest` gave it for the payload that made
        `old`, or `digest(old)`. It is trusted and saves reading `old` once more.
      receivers: pytrees like `new` whose leaves are the shardings (or arrays with them) of those
        who will apply the payload. Tiles are so cut that none lies in two of their shards, and
        so ordered that those of one shard of the first lie together, for receivers that fetch
        what they need (`needed`). Wanted where a receiver's tensor is spread over processes.
      threads: how many work at once; as many as there are cores where None.
      conditional: code which elements change, and how, by the exponents of the old ones. False
        codes plain gaps instead: about 3 bits a change more, twice as fast at both ends. The
        format and `apply` are the same. Where the arrays lie on accelerators these count the
        exponents, at no cost, and the argument changes nothing.

    Returns:
      The payload: at most 1 % + 4 KiB and the leaves' names more than the weights.

    Raises:
      TypeError: a leaf is no array of such elements; names it.
      ValueError: the trees, or a leaf of them, do not match; names it.
    """
    if old is not None and _alike_on_accelerators(old, new):
        delta = diff(old, new, receivers=receivers or ())
        return finish(
            delta,
            version=version,
            base_version=base_version,
            base_digest=base_digest,
            receivers=receivers,
            threads=threads,
        )
    return encode_trees(
        old,
        new,
        versions=(version, base_version),
        base_digest=base_digest,
        receivers=receivers,
        threads=threads,
        conditional=conditional,
    )


def encode_trees(
    old: Any,
    new: Any,
    *,
    versions: tuple[int | None, int | None],
    base_digest: TreeDigest | None = None,
    receivers: Sequence[Any] | None = None,
    threads: int | None = None,
    conditional: bool = True,
    touched: Mapping[str, Touched] | None = None,
) -> bytes:
    """`encode`, which says what the arguments are, with one hint more.

    Args:
      old: as for `encode`.
      new: likewise.
      versions: of `new` and of `old`.
      base_digest: as for `encode`.
      receivers: likewise.
      threads: likewise.
      conditional: likewise.
      touched: by name of the leaf, the only tiles that may have changed; a leaf that is not named
        may have changed anywhere.
    """
    leaves, structure = named_leaves(new, role="new")
    olds = None if old is None else matched(old, leaves, structure)
    numbers = checked_version("version", versions[0]), checked_version("base_version", versions[1])
    theirs = sharding_trees(receivers, leaves, structure)
    grids = _grids(leaves, theirs)
    same = ties(leaves, olds, grids)
    threads = host.default_threads() if threads is None else threads
    spread = host.is_spread(leaves)

    base = [(0, 0)] * len(leaves)
    if olds is not None:
        base = base_sums(olds, grids, same, base_digest, spread)
    work = _work(leaves, olds, grids, same, touched or {}, spread)
    tables, table_of = _make_tables(leaves, grids, work, conditional)
    runs, chunks, change = [], [], [(0, 0)] * len(leaves)
    for item in work:
        leaf = leaves[item.tensor]
        table = table_of[leaf.dtype.name]
        coded = codec.encode_box(
            item.old,
            item.new,
            element_format(leaf.dtype),
            grids[item.tensor].tile,
            tables[table][1],
            threads,
            item.frame,
        )
        if olds is None:
            grown = host.digest_of(item.new, item.frame)
            change[item.tensor] = add(change[item.tensor], (int(grown[0]), int(grown[1])))
        change[item.tensor] = add(change[item.tensor], coded.digest_change)
        kept = np.flatnonzero(coded.mode)
        if len(kept):
            at = kept if len(kept) < len(coded.mode) else slice(None)
            tiles = Tiles(item.ids[at], coded.mode[at], coded.nnz[at], coded.size[at])
            runs.append(Run(item.tensor, table, tiles))
            chunks.append(coded.data.data)
    coded = Coded(tuple(tables), tuple(runs), tuple(chunks), tuple(change))
    if receivers:
        coded = routed(coded, grids, [shardings[0] for shardings in theirs])
    return packed(leaves, grids, same, base, coded, numbers, anchor=olds is None, spread=spread)


def _alike_on_accelerators(old: Any, new: Any) -> bool:
    """Whether the device half can do the looking: both trees lie alike on accelerators."""
    leaves, structure = named_leaves(new, role="new")
    if not host.on_accelerators(leaves):
        return False
    return all(
        isinstance(before.value, jax.Array)
        and before.value.sharding.is_equivalent_to(leaf.value.sharding, len(leaf.shape))
        for before, leaf in zip(matched(old, leaves, structure), leaves, strict=True)
    )


def _grids(leaves: Sequence[Leaf], shardings: Sequence[Sequence[Any]]) -> list[TileGrid]:
    return [host.grid_of(leaf, more) for leaf, more in zip(leaves, shardings, strict=True)]


def _work(
    leaves: Sequence[Leaf],
    olds: Sequence[Leaf] | None,
    grids: Sequence[TileGrid],
    same: Sequence[int],
    touched: Mapping[str, Touched],
    spread: bool,
) -> list[_Work]:
    work = []
    for index, (leaf, grid) in enumerate(zip(leaves, grids, strict=True)):
        before = olds[index] if olds else None
        unchanged = before is not None and before.value is leaf.value
        if (
            unchanged
            or same[index] != index
            or not host.speaks_for(leaf, spread)
            or not grid.n_tiles
        ):
            continue
        for piece in host.held(leaf):
            if not piece.owned:
                continue
            new = host.read_box(leaf, piece.box)
            old = host.read_box(before, piece.box) if before else None
            known = touched.get(leaf.name)
            only = known.ids if known is not None and known.grid == grid else None
            for part in parts(grid, piece.box):
                whole = None if old is None else host.part_of(old, grid, part)
                fresh = host.part_of(new, grid, part)
                for band, ids, origin in _bands(part, fresh.shape, grid, only):
                    frame = host.frame_of(grid, part)._replace(origin=origin)
                    before_band = None if whole is None else whole[band]
                    work.append(_Work(index, ids, frame, before_band, fresh[band]))
    return work


def _bands(
    part: Part, shape: tuple[int, int, int], grid: TileGrid, only: np.ndarray | None
) -> Iterator[tuple[tuple[slice, ...], np.ndarray, int]]:
    """Cuts a part to stretches along its first axis of more than one tile that hold given tiles.

    Yields:
      Where in the part, the numbers of its tiles, and the row-major index of its first element.
    """
    assert part.ids is not None, "the grid was chosen so that no shard cuts a tile"
    if only is None:
        yield (), part.ids, part.origin
        return
    axis = 0 if shape[0] > 1 else 1
    size = 1 if axis == 0 else grid.tile[0]
    ids = part.ids.reshape(-(-shape[axis] // size), -1)
    hot = np.isin(ids, only).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], hot, [False]]).astype(np.int8)))
    _, all_rows, all_cols = grid.extents
    step = all_rows * all_cols if axis == 0 else grid.tile[0] * all_cols
    for start, stop in edges.reshape(-1, 2).tolist():
        cut = slice(start * size, min(stop * size, shape[axis]))
        band = (cut,) if axis == 0 else (slice(None), cut)
        yield band, ids[start:stop].reshape(-1), part.origin + start * step


def _make_tables(
    leaves: Sequence[Leaf], grids: Sequence[TileGrid], work: Sequence[_Work], conditional: bool
) -> tuple[list[tuple[str, codec.Tables]], dict[str, int]]:
    """Tables for each dtype that has anything to code."""
    tables = []
    by_dtype: dict[str, list[_Work]] = {}
    for item in work:
        by_dtype.setdefault(leaves[item.tensor].dtype.name, []).append(item)
    for name, items in by_dtype.items():
        pairs = [(item.old, item.new) for item in items if item.old is not None]
        largest = max(items, key=lambda item: item.new.size)
        fmt = element_format(leaves[largest.tensor].dtype)
        tile = grids[largest.tensor].tile
        tables.append((name, codec.make_tables(fmt, pairs, tile, conditional)))
    return tables, {name: index for index, (name, _) in enumerate(tables)}
