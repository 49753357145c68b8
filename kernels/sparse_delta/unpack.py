"""From the tiles of a payload to the bits of a receiver's boxes."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from kernels.sparse_delta import codec, host
from kernels.sparse_delta.elements import ElementFormat, element_format
from kernels.sparse_delta.errors import CorruptPayload, Damaged
from kernels.sparse_delta.parse import Payload
from kernels.sparse_delta.tiles import Box, TileGrid, box_view, parts, whole_box
from kernels.sparse_delta.trees import Leaf, Sums, add
from kernels.sparse_delta.wire import ANCHOR, Manifest, Tiles


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

    def __len__(self) -> int:
        return len(self.tiles)


@dataclass(frozen=True)
class Unpacker:
    """What the tiles of a payload are decoded with.

    Attributes:
      payload: its manifest was checked, and the checksums of its buckets.
      tables: of the coder.
      stored: tiles by tensor.
      threads: how many work at once.
      spread: whether other processes hold some of the receiver's tree.
      arena: where new bits are put.
    """

    payload: Payload
    tables: Sequence[codec.Tables]
    stored: Mapping[int, Stored]
    threads: int
    spread: bool
    arena: host.Arena

    @classmethod
    def of(cls, payload: Payload, *, threads: int, spread: bool) -> "Unpacker":
        """Reads the coder's tables and sorts the tiles.

        Raises:
          Damaged: no encoder made the tables.
        """
        tables, stored = _read_tables(payload.manifest), _stored_tiles(payload)
        tensors = payload.manifest.tensors
        arena = host.Arena(
            sum(
                math.prod(t.grid.shape) * jax.numpy.dtype(t.dtype).itemsize
                for k, t in enumerate(tensors)
                if t.same == k and (k in stored or payload.manifest.kind == ANCHOR)
            )
        )
        return cls(payload, tables, stored, threads, spread, arena)

    def leaf(self, leaf: Leaf, grid: TileGrid, tensor: int) -> tuple[list[np.ndarray], Sums]:
        """New bits of the boxes of a leaf that this process holds.

        Args:
          leaf: of the receiver.
          grid: of its tiles.
          tensor: index of the tensor that its tiles are stored as.

        Returns:
          The bits, and by how much this process's share of the digest sums grows.

        Raises:
          Damaged: a tile's stream is bad; nothing that anybody sees was written.
          ValueError: tiles lie across several processes.
        """
        held = host.held(leaf)
        speaks = host.speaks_for(leaf, self.spread)
        if any(part.ids is None for piece in held for part in parts(grid, piece.box)):
            contents, total = self._cut(leaf, grid, tensor)
            return contents, total if speaks else (0, 0)
        contents, total = [], (0, 0)
        for piece in held:
            out, change = self._box(leaf, grid, tensor, piece.box)
            contents.append(out)
            if piece.owned and speaks:
                total = add(total, change)
        return contents, total

    def _box(self, leaf: Leaf, grid: TileGrid, tensor: int, box: Box) -> tuple[np.ndarray, Sums]:
        """New bits of a box that cuts no tile, and the change of its digest sums."""
        fmt = element_format(leaf.dtype)
        old = None if self.payload.manifest.kind == ANCHOR else host.read_box(leaf, box)
        out = self.arena.take(tuple(stop - start for start, stop in box), fmt.bits_dtype)
        view = out.reshape(box_view(grid, out.shape))
        total = (0, 0)
        for part in parts(grid, box):
            assert part.ids is not None, "whoever calls this has looked"
            place = view[part.cut]
            target = np.ascontiguousarray(place)
            base = None if old is None else host.part_of(old, grid, part)
            frame = host.frame_of(grid, part)
            for chosen, coded, tables in self._selected(part.ids, tensor, fmt):
                try:
                    change = codec.decode_box(
                        base, target, coded, fmt, grid.tile, tables, chosen, self.threads, frame
                    )
                except codec.Malformed as error:
                    raise self.blame(error, leaf, part.ids, tensor) from error
                total = add(total, change)
            if not np.may_share_memory(target, place):
                place[...] = target
        return out, total

    def _cut(self, leaf: Leaf, grid: TileGrid, tensor: int) -> tuple[list[np.ndarray], Sums]:
        """Where the receiver's shards cut tiles, its tensor is put together on the host."""
        if not host.is_local(leaf):
            raise ValueError(lies_across(leaf, grid))
        out, change = self._box(leaf, grid, tensor, whole_box(leaf.shape))
        contents = []
        for piece in host.held(leaf):
            own = out[tuple(slice(*edges) for edges in piece.box)]
            bits = self.arena.take(own.shape, own.dtype)
            bits[...] = own
            contents.append(bits)
        return contents, change

    def _selected(
        self, ids: np.ndarray, tensor: int, fmt: ElementFormat
    ) -> Iterator[tuple[np.ndarray, codec.CodedTiles, codec.Tables]]:
        """All tiles of a part, those that are not stored as empty ones, by the tables they need."""
        count = len(ids)
        mode, nnz, size = (np.zeros(count, t) for t in (np.uint8, np.uint32, np.uint32))
        offset, table = np.zeros(count, np.int64), np.full(count, -1)
        stored = self.stored.get(tensor)
        if stored is not None:
            at = np.searchsorted(ids, stored.tiles.ids)
            mine = np.flatnonzero(ids[np.minimum(at, count - 1)] == stored.tiles.ids)
            at = at[mine]
            mode[at], nnz[at] = stored.tiles.modes[mine], stored.tiles.nnz[mine]
            size[at], offset[at] = stored.tiles.sizes[mine], stored.starts[mine]
            table[at] = stored.tables[mine]
        for index in np.unique(table).tolist():
            chosen = np.flatnonzero(table == index)
            coded = codec.CodedTiles(
                mode[chosen], nnz[chosen], size[chosen], self.payload.data, offset[chosen]
            )
            yield chosen, coded, self.tables[index] if index >= 0 else _no_tables(fmt)

    def blame(
        self, error: codec.Malformed, leaf: Leaf, ids: np.ndarray, tensor: int
    ) -> CorruptPayload:
        """The refusal of a payload with a bad stream.

        Args:
          error: its `tile` is an index into `ids`.
          leaf: of the receiver.
          ids: numbers of tiles in the tensor.
          tensor: index of the tensor that they are stored as.
        """
        stored = self.stored.get(tensor)
        if error.tile is None or stored is None:
            return Damaged(f"{leaf.name}: {error}", tensor=leaf.name)
        tile = int(ids[error.tile])
        bucket = int(stored.buckets[np.searchsorted(stored.tiles.ids, tile)])
        return Damaged(
            f"bucket {bucket} is damaged: {leaf.name}, tile {tile} of the tensor: {error}",
            bucket=bucket,
            tensor=leaf.name,
        )


def lies_across(leaf: Leaf, grid: TileGrid) -> str:
    """Why a leaf cannot be rebuilt whose tiles lie across several processes."""
    return (
        f"leaf {leaf.name!r}: tiles {grid.tile} of the payload lie across the shards of "
        "several processes here; give these shardings to encode as receivers="
    )


@functools.cache
def _no_tables(fmt: ElementFormat) -> codec.Tables:
    """For tiles that are only copied."""
    return codec.make_tables(fmt, [], (1, 1))


def _read_tables(manifest: Manifest) -> list[codec.Tables]:
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


def _stored_tiles(parsed: Payload) -> dict[int, Stored]:
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
