"""The host half of `encode`: from what the device found to a payload.

Only records of changed elements come to the host, and the few tiles of which too much changed for
their slots.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from kernels.sparse_delta.delta import Delta, ShardRecords, shard_records
from kernels.sparse_delta.elements import ElementFormat, element_format, order
from kernels.sparse_delta.records import encode_records, tables_of_records
from kernels.sparse_delta.routing import Coded, routed
from kernels.sparse_delta.tiles import TileGrid, box_view
from kernels.sparse_delta.trees import Leaf, Sums, TreeDigest, add, named_leaves
from kernels.sparse_delta.wire import Run, Tiles

_WORD = np.uint64(0xFFFFFFFF)
# Dense tiles that are looked at for the tables of all of them.
_SURVEYED_TILES = 16

# Tiles that share tables: dtype, and the thresholds of the device's classes, or None where the
# tiles come dense.
_Group = tuple[str, tuple[int, ...] | None]


def finish(
    delta: Delta,
    *,
    version: int | None = None,
    base_version: int | None = None,
    base_digest: TreeDigest | None = None,
    receivers: Sequence[Any] | None = None,
    threads: int | None = None,
) -> bytes:
    """Packs a delta: `encode(old, new)` is `finish(diff(old, new))`.

    Args:
      delta: from `diff`, of concrete arrays.
      version: what the caller calls the new weights; only carried.
      base_version: what the caller calls the old ones; only carried.
      base_digest: of the old ones; see `encode`. Without it all of them are read once, where they
        lie.
      receivers: those that `diff` got; their tiles are put together as `encode` does.
      threads: how many work at once; as many as there are cores where None.

    Returns:
      The payload; where other processes hold some of the arrays this process's part, to `merge`.
    """
    leaves, structure = named_leaves(delta.new, role="new")
    olds = matched(delta.old, leaves, structure)
    versions = checked_version("version", version), checked_version("base_version", base_version)
    grids = [delta.grids[leaf.place] for leaf in leaves]
    same = ties(leaves, olds, grids)
    spread = host.is_spread(leaves)
    threads = host.default_threads() if threads is None else threads
    shards = {
        index: list(shard_records(delta, leaf.place))
        for index, leaf in enumerate(leaves)
        if same[index] == index and host.speaks_for(leaf, spread)
    }
    thresholds = [
        None if own is None else tuple(np.asarray(own).tolist()) for own in delta.thresholds
    ]
    coders = {
        index: [_ShardCoder(olds[index], leaves[index], grids[index], shard) for shard in own]
        for index, own in shards.items()
    }
    groups: dict[_Group, list[_ShardCoder]] = {}
    for index, own in coders.items():
        classes = thresholds[leaves[index].place]
        for coder in own:
            groups.setdefault((coder.new.dtype.name, classes), []).append(coder)
            if coder.shard.dense.any():
                groups.setdefault((coder.new.dtype.name, None), []).append(coder)
    tables = {key: _tables(key, own) for key, own in groups.items()}
    numbers = {key: number for number, key in enumerate(tables)}
    runs, chunks, change = [], [], [(0, 0)] * len(leaves)
    with ThreadPoolExecutor(threads) as pool:
        for index, own in coders.items():
            for coder, dense in itertools.product(own, (False, True)):
                key = coder.new.dtype.name, None if dense else thresholds[leaves[index].place]
                if key not in tables:
                    continue
                tiles, data, grown = coder.coded(dense, tables[key], pool)
                change[index] = add(change[index], grown)
                if len(tiles):
                    runs.append(Run(index, numbers[key], tiles))
                    chunks.append(data)
    coded = Coded(
        tuple((key[0], table) for key, table in tables.items()),
        tuple(runs),
        tuple(chunks),
        tuple(change),
    )
    if receivers:
        theirs = sharding_trees(receivers, leaves, structure)
        coded = routed(coded, grids, [shardings[0] for shardings in theirs])
    base = base_sums(olds, grids, same, base_digest, spread)
    return packed(leaves, grids, same, base, coded, versions, anchor=False, spread=spread)


def _tables(key: _Group, coders: Sequence["_ShardCoder"]) -> codec.Tables:
    """Tables of the coder for all tiles that share them.

    Tiles that come with records have the classes of the device; for those that come dense the
    coder chooses its own, from a few of them.
    """
    fmt, thresholds = element_format(jax.numpy.dtype(key[0])), key[1]
    shards = [coder.shard for coder in coders]
    if thresholds is None:
        dense = [(coder, tile) for coder in coders for tile in np.flatnonzero(coder.shard.dense)]
        some = dense[:: -(-len(dense) // _SURVEYED_TILES)]
        boxes = [coder.fetched(int(tile)) for coder, tile in some]
        return codec.make_tables(fmt, boxes, coders[0].grid.tile)
    return tables_of_records(
        fmt,
        np.asarray(thresholds),
        np.sum([shard.totals[~shard.dense].sum(0) for shard in shards], axis=0),
        np.concatenate([shard.class_ for shard in shards]),
        np.concatenate([_codes(shard, fmt) for shard in shards]),
    )


def _codes(shard: ShardRecords, fmt: ElementFormat) -> np.ndarray:
    """Code 2(|c| − 1) + [c > 0] of every change c, u32; FORMAT.md says what c is."""
    modulus = np.int64(1) << fmt.width_bits
    change = order(shard.new, fmt).astype(np.int64) - order(shard.old, fmt).astype(np.int64)
    if fmt.kind == "float":
        change = np.where(shard.old & shard.old.dtype.type(fmt.sign_bit), -change, change)
    change %= modulus
    negative = change >= fmt.sign_bit
    return np.where(negative, 2 * (modulus - change) - 2, 2 * change - 1).astype(np.uint32)


def _cut(
    data: Any, start: tuple[int, int, int], *, extents: tuple[int, ...], size: tuple[int, ...]
) -> np.ndarray:
    """A tile of a shard; of an accelerator's shard only the tile comes to the host."""
    if isinstance(data, np.ndarray):
        box = data.reshape(extents)
        return box[tuple(slice(at, at + n) for at, n in zip(start, size, strict=True))]
    return np.asarray(_cut_on_device(data, start, extents=extents, size=size))


@functools.partial(jax.jit, static_argnames=("extents", "size"))
def _cut_on_device(
    data: jax.Array,
    start: tuple[jax.Array, ...],
    *,
    extents: tuple[int, ...],
    size: tuple[int, ...],
) -> jax.Array:
    return jax.lax.dynamic_slice(data.reshape(extents), start, size)


class _ShardCoder:
    """Codes the tiles of one shard."""

    def __init__(self, old: Leaf, new: Leaf, grid: TileGrid, shard: ShardRecords) -> None:
        self.old, self.new, self.grid, self.shard = old, new, grid, shard
        self.fmt = element_format(new.dtype)

    def coded(
        self, dense: bool, tables: codec.Tables, pool: ThreadPoolExecutor
    ) -> tuple[Tiles, memoryview, Sums]:
        """Codes the tiles that came dense, or the others.

        Returns:
          The stored tiles, their bytes, and by how much the digest sums grow.
        """
        shard = self.shard
        touched = np.flatnonzero(shard.dense if dense else np.diff(shard.starts))
        records = np.stack([shard.position, shard.class_, shard.rank, _codes(shard, self.fmt)])
        sizes = self.grid.sizes(shard.ids)

        def one(tile: int) -> codec.CodedTiles:
            if dense:
                return self._dense(tile, tables)
            own = slice(int(shard.starts[tile]), int(shard.starts[tile + 1]))
            coded = encode_records(
                np.ascontiguousarray(records[:, own]),
                shard.totals[tile],
                int(sizes[tile]),
                self.fmt,
                tables,
            )
            if coded is not None:
                return coded
            # Its records are in the digest's change already.
            return dataclasses.replace(self._dense(tile, tables), digest_change=(0, 0))

        done = list(pool.map(one, touched.tolist()))
        kept = [k for k in np.argsort(shard.ids[touched]).tolist() if done[k].mode[0]]
        columns = (
            np.concatenate([np.zeros(0, t), *(getattr(done[k], name) for k in kept)]).astype(t)
            for name, t in (("mode", np.uint8), ("nnz", np.uint32), ("size", np.uint32))
        )
        tiles = Tiles(shard.ids[touched[kept]], *columns)
        data = np.concatenate([np.zeros(0, np.uint8), *(done[k].data for k in kept)])
        grown = [(0, 0) if dense else self._digest_change()]
        return tiles, data.data, add(*grown, *(tile.digest_change for tile in done))

    def _dense(self, tile: int, tables: codec.Tables) -> codec.CodedTiles:
        """A tile that overflowed its slots, coded from the arrays."""
        old, new = self.fetched(tile)
        _, rows, cols = self.grid.extents
        origin = int(self.grid.origins(self.shard.ids[tile : tile + 1])[0])
        frame = codec.DigestFrame(origin, rows * cols, cols)
        return codec.encode_box(old, new, self.fmt, self.grid.tile, tables, 1, frame)

    def fetched(self, tile: int) -> tuple[np.ndarray, np.ndarray]:
        """The bits of a tile before and after, (1, rows, cols)."""
        extents = box_view(self.grid, self.shard.piece.shape)
        high, wide = self.grid.tile
        down, across = -(-extents[1] // high), -(-extents[2] // wide)
        rest, col = divmod(tile, across)
        lead, row = divmod(rest, down)
        start = lead, row * high, col * wide
        size = 1, min(high, extents[1] - start[1]), min(wide, extents[2] - start[2])
        old, new = (
            _cut(host.shard_of(leaf, self.shard.piece), start, extents=extents, size=size)
            for leaf in (self.old, self.new)
        )
        bits = self.fmt.bits_dtype
        return np.ascontiguousarray(old).view(bits), np.ascontiguousarray(new).view(bits)

    def _digest_change(self) -> Sums:
        shard, grid = self.shard, self.grid
        counts = np.diff(shard.starts)
        tile = np.repeat(np.arange(len(counts)), counts)
        _, _, first_col = grid.places(shard.ids)
        _, _, cols = grid.extents
        width = np.minimum(grid.tile[1], cols - first_col)[tile]
        row, col = np.divmod(shard.position.astype(np.int64), width)
        index = (grid.origins(shard.ids)[tile] + row * cols + col).astype(np.uint64)
        grown = [
            (int(after) - int(before)) % (1 << 32)
            for before, after in zip(
                _hashes(shard.old, index), _hashes(shard.new, index), strict=True
            )
        ]
        return grown[0], grown[1]


def _hashes(bits: np.ndarray, index: np.ndarray) -> Iterator[np.uint64]:
    """The two digest sums of elements at row-major indices of their tensor."""
    place = (index & _WORD) * np.uint64(0x85EBCA77) + (index >> np.uint64(32)) * np.uint64(
        0xC2B2AE3D
    )
    a = ((bits.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B1) ^ place) & _WORD
    a ^= a >> np.uint64(15)
    a = a * np.uint64(0x2C1B3C6D) & _WORD
    a ^= a >> np.uint64(13)
    yield a.sum() & _WORD
    yield ((a ^ a >> np.uint64(16)) * np.uint64(0x297A2D39) & _WORD).sum() & _WORD
