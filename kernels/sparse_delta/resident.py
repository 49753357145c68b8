"""Weights rebuilt on the devices that hold them, by what a payload says and class counts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from kernels.sparse_delta import codec, expand, host, locate
from kernels.sparse_delta.backends import Backend
from kernels.sparse_delta.delta import shard_tiles
from kernels.sparse_delta.digest import split_index, strides_of
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.expand import Edits, Patches
from kernels.sparse_delta.reference import Slots
from kernels.sparse_delta.tiles import Piece, TileGrid, box_view, parts, whole_box
from kernels.sparse_delta.trees import Leaf, Sums, add
from kernels.sparse_delta.unpack import Stored, Unpacker, lies_across

# Each slot of a sub-block costs all its elements a comparison; a tile with a fuller one is
# decoded on the host.
_MOST_ROOM = 32


class _Step(NamedTuple):
    """Tiles that one pass takes: those of a coder's table, by position or by class."""

    table: int
    by_class: bool


@dataclass(frozen=True)
class _Own:
    """The stored tiles of one piece.

    Attributes:
      numbers: int64, rising, in the piece's own view.
      at: index of each in the tensor's directory.
    """

    numbers: np.ndarray
    at: np.ndarray

    def __getitem__(self, chosen: Any) -> "_Own":
        return _Own(self.numbers[chosen], self.at[chosen])


class ResidentLeaf:
    """One leaf, rebuilt where it lies.

    First `request`, which starts the counting on the devices; then `decode`, which reads the
    streams on the host; then `rehearse`, after which `share` tells whether the new values will be
    right; then `array` hands them out.

    Where a shard cuts tiles, the tensor is put together on one device, as long as it takes, and
    goes back to its shards from there.
    """

    def __init__(
        self,
        unpacker: Unpacker,
        leaf: Leaf,
        grid: TileGrid,
        tensor: int,
        backend: Backend,
        *,
        in_place: bool,
    ) -> None:
        """Looks at who holds what.

        Args:
          unpacker: of the payload.
          leaf: of the receiver.
          grid: of its tiles.
          tensor: index of the tensor that its tiles are stored as.
          backend: which kernels.
          in_place: the new values are to be written over the old ones, by `array`.

        Raises:
          ValueError: tiles lie across several processes.
        """
        self.unpacker, self.leaf, self.grid, self.tensor = unpacker, leaf, grid, tensor
        self.backend: Backend = backend
        self.in_place = in_place
        self.fmt = element_format(leaf.dtype)
        self.pieces = _placed(leaf)
        self.cut = any(part.ids is None for p in self.pieces for part in parts(grid, p.box))
        if self.cut:
            if not host.is_local(leaf):
                raise ValueError(lies_across(leaf, grid))
            self.pieces = (Piece(whole_box(leaf.shape), self.pieces[0].devices[:1], True),)
        holders = [(d, index) for index, p in enumerate(self.pieces) for d in p.devices]
        holders.sort(key=lambda holder: holder[0].id)
        self.devices = [device for device, _ in holders]
        self.piece_of = [index for _, index in holders]
        self.mesh = expand.mesh_of(self.devices)
        self.stored: Stored = unpacker.stored[tensor]
        self.owned = [self._stored_of(piece) for piece in self.pieces]
        self.counts: dict[int, tuple[jax.Array, bool]] = {}
        self.edits: Edits | None = None
        self.new: jax.Array | None = None

    # ------------------------------------------------------------------------------ where it lies

    def _stored_of(self, piece: Piece) -> _Own:
        ids = shard_tiles(self.grid, piece.box)
        order = np.argsort(ids)
        found = np.searchsorted(ids, self.stored.tiles.ids, sorter=order)
        number = order[np.minimum(found, len(ids) - 1)]
        at = np.flatnonzero(ids[number] == self.stored.tiles.ids)
        number = number[at]
        rising = np.argsort(number)
        return _Own(number[rising], at[rising])

    def _view(self) -> TileGrid:
        """The tiles of a piece in its own view; all pieces have one shape."""
        return TileGrid(box_view(self.grid, self.pieces[0].shape), (1, 2), self.grid.tile)

    def _stack(self) -> jax.Array:
        """The old values."""
        value = self.leaf.value
        if self.cut:
            value = jax.device_put(value, SingleDeviceSharding(self.devices[0]))
        held = {shard.device: shard.data for shard in value.addressable_shards}
        return expand.stack(self.mesh, [held[device] for device in self.devices])

    def _spread(self, of_piece: Sequence[np.ndarray]) -> jax.Array:
        """Arrays of one shape, one a piece, brought to the devices that hold the piece."""
        arrays = [of_piece[index] for index in self.piece_of]
        return expand.stack(self.mesh, jax.device_put(arrays, self.devices))

    # -------------------------------------------------------------------------------- class counts

    def request(self) -> list[jax.Array]:
        """Has the devices count the classes of the tiles whose changes are named by class.

        Returns:
          The counts, which come to the host meanwhile.
        """
        old = None
        for table in sorted({step.table for step in self._steps() if step.by_class}):
            old = self._stack() if old is None else old
            own = [self._tiles_of(o, _Step(table, True)).numbers for o in self.owned]
            entries = expand.rounded(max(map(len, own)))
            whole = entries >= self._view().n_tiles
            chosen = None if whole else self._spread([_extended(o, entries) for o in own])
            thresholds = self.unpacker.tables[table].thresholds.astype(np.int32)
            counts = expand.class_counts(
                old, chosen, thresholds, grid=self.grid, backend=self.backend
            )
            counts.copy_to_host_async()
            self.counts[table] = counts, whole
        return [counts for counts, _ in self.counts.values()]

    def _steps(self) -> list[_Step]:
        """The passes that the leaf needs, on any process."""
        kinds = set()
        for table in np.unique(self.stored.tables).tolist():
            modes = self.stored.tiles.modes[self.stored.tables == table]
            by_position = locate.names_positions(modes, self.unpacker.tables[table])
            sparse = modes <= codec.Mode.ENTROPY
            kinds |= {_Step(table, not here) for here in np.unique(by_position[sparse]).tolist()}
        return sorted(kinds)

    def _tiles_of(self, own: _Own, step: _Step) -> _Own:
        modes = self.stored.tiles.modes[own.at]
        by_position = locate.names_positions(modes, self.unpacker.tables[step.table])
        here = self.stored.tables[own.at] == step.table
        return own[here & (modes <= codec.Mode.ENTROPY) & (by_position != step.by_class)]

    def _packed(self, piece: int, table: int, own: _Own) -> np.ndarray:
        counts, whole = self.counts[table]
        packed = np.asarray(expand.unstack(counts)[self.piece_of.index(piece)])
        return packed[own.numbers] if whole else packed[: len(own.numbers)]

    # -------------------------------------------------------------------------------------- decode

    def decode(self) -> None:
        """Reads all streams, and brings the changes to the devices.

        Raises:
          Damaged: a stream is bad; nothing was written.
        """
        slots = []
        dense = [[self._dense_tiles(own)] for own in self.owned]
        for step in self._steps():
            own = [self._tiles_of(o, step) for o in self.owned]
            found = [self._located(p, o, step) for p, o in enumerate(own)]
            for index, (mine, located) in enumerate(zip(own, found, strict=True)):
                dense[index].append(mine[located.fullest > _MOST_ROOM])
            thresholds = self.unpacker.tables[step.table].thresholds
            limits = np.asarray(thresholds if step.by_class else locate.LONE, np.int32)
            slots.append((self._slots(own, found), limits))
        self.counts.clear()
        patches = [list(self._patches(p, tiles)) for p, tiles in enumerate(dense)]
        self.edits = Edits(tuple(slots), self._spread_patches(patches))

    def _coded(self, own: _Own) -> codec.CodedTiles:
        tiles = self.stored.tiles
        return codec.CodedTiles(
            tiles.modes[own.at],
            tiles.nnz[own.at],
            tiles.sizes[own.at],
            self.unpacker.payload.data,
            self.stored.starts[own.at],
        )

    def _located(self, piece: int, own: _Own, step: _Step) -> locate.Located:
        packed = self._packed(piece, step.table, own) if step.by_class else None
        try:
            return locate.locate(
                self._coded(own),
                self._view().sizes(own.numbers),
                packed,
                self.unpacker.tables[step.table],
                tile=self.grid.tile,
                threads=self.unpacker.threads,
            )
        except codec.Malformed as error:
            ids = self.stored.tiles.ids[own.at]
            raise self.unpacker.blame(error, self.leaf, ids, self.tensor) from error

    def _slots(self, own: Sequence[_Own], found: Sequence[locate.Located]) -> Slots:
        """The slots of a step; all devices have as many."""
        listed = [
            np.flatnonzero((located.fullest > 0) & (located.fullest <= _MOST_ROOM))
            for located in found
        ]
        most = max(map(len, listed))
        entries = min(expand.rounded(most), self._view().n_tiles)
        room = max(
            locate.room_for(located.fullest[tiles])
            for located, tiles in zip(found, listed, strict=True)
        )
        words, extra = [], []
        for located, tiles in zip(found, listed, strict=True):
            keys, changes = locate.fill(
                located,
                tiles,
                entries=entries,
                room=room,
                tile=self.grid.tile,
                fmt=self.fmt,
                threads=self.unpacker.threads,
            )
            words.append(keys)
            extra.append(changes)
        return Slots(
            self._spread(
                [_extended(o.numbers[t], entries) for o, t in zip(own, listed, strict=True)]
            ),
            self._spread([np.asarray([len(tiles)], np.int32) for tiles in listed]),
            self._spread(words),
            self._spread(extra) if self.fmt.width_bits == 32 else None,
        )

    # ------------------------------------------------------------------------ tiles that come whole

    def _dense_tiles(self, own: _Own) -> _Own:
        return own[self.stored.tiles.modes[own.at] > codec.Mode.ENTROPY]

    def _patches(
        self, piece: int, several: Sequence[_Own]
    ) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
        """Size, starts and bits of the tiles of a piece that come whole, by their size."""
        need_old = np.repeat(np.arange(len(several)) > 0, [len(own.at) for own in several])
        own = _Own(
            np.concatenate([one.numbers for one in several]),
            np.concatenate([one.at for one in several]),
        )
        if not len(own.at):
            return
        rising = np.argsort(own.numbers)
        own, need_old = own[rising], need_old[rising]
        view = self._view()
        starts = np.stack(view.places(own.numbers), axis=1).astype(np.int32)
        _, rows, cols = view.extents
        sizes = np.minimum(self.grid.tile, np.asarray([rows, cols]) - starts[:, 1:])
        for size in np.unique(sizes, axis=0).tolist():
            chosen = np.flatnonzero(np.all(sizes == size, axis=1))
            bits = self._decoded(piece, own[chosen], need_old[chosen], starts[chosen], tuple(size))
            yield tuple(size), starts[chosen], bits

    def _decoded(
        self,
        piece: int,
        own: _Own,
        need_old: np.ndarray,
        starts: np.ndarray,
        size: tuple[int, int],
    ) -> np.ndarray:
        """New bits of tiles of one size; old values come to the host of those that need them."""
        bits = np.empty((len(own.at), *size), self.fmt.bits_dtype)
        fetched: dict[int, np.ndarray] = {}
        if need_old.any():
            stacked = expand.unstack(self._stack())[self.piece_of.index(piece)]
            old = expand.read_tiles(stacked, starts[need_old], grid=self.grid, size=size)
            fetched = dict(zip(np.flatnonzero(need_old).tolist(), old, strict=True))

        def one(k: int) -> None:
            old = fetched.get(k)
            base = None if old is None else np.ascontiguousarray(old).view(bits.dtype)[None]
            codec.decode_box(
                base,
                bits[k : k + 1],
                self._coded(own[k : k + 1]),
                self.fmt,
                self.grid.tile,
                self.unpacker.tables[int(self.stored.tables[own.at[k]])],
                np.zeros(1, np.int64),
            )

        with ThreadPoolExecutor(self.unpacker.threads) as pool:
            for k, done in enumerate([pool.submit(one, k) for k in range(len(own.at))]):
                try:
                    done.result()
                except codec.Malformed as error:
                    ids = self.stored.tiles.ids[own.at[k : k + 1]]
                    raise self.unpacker.blame(error, self.leaf, ids, self.tensor) from error
        return bits

    def _spread_patches(self, patches: Sequence[Sequence[Any]]) -> tuple[Patches, ...]:
        by_size = [{size: (starts, bits) for size, starts, bits in own} for own in patches]
        found = []
        for size in sorted({size for own in by_size for size in own}):
            none = np.zeros((0, 3), np.int32), np.zeros((0, *size), self.fmt.bits_dtype)
            own = [mine.get(size, none) for mine in by_size]
            length = expand.rounded(max(len(starts) for starts, _ in own))
            found.append(
                Patches(
                    self._spread([_padded(starts, length) for starts, _ in own]),
                    self._spread([np.asarray([len(starts)], np.int32) for starts, _ in own]),
                    self._spread([_padded(bits, length) for _, bits in own]),
                )
            )
        return tuple(found)

    # --------------------------------------------------------------------------------------- write

    def rehearse(self) -> jax.Array:
        """Starts making the new values, or only their digest sums if they come in place.

        Returns:
          The sums, of every device's shard.
        """
        assert self.edits is not None, "decode comes first"
        options = {"grid": self.grid, "backend": self.backend}
        if self.in_place:
            self.sums = expand.rewritten_sums(self._stack(), self.edits, self._origins(), **options)
            return self.sums
        # A tensor that was put together is nobody else's.
        self.new = expand.rewrite(self._stack(), self.edits, donate=self.cut, **options)
        self.edits = None
        self.sums = expand.shard_sums(self.new, self._origins(), grid=self.grid)
        return self.sums

    def _origins(self) -> jax.Array:
        strides = strides_of(self.leaf.shape)
        starts = [
            sum(edges[0] * stride for edges, stride in zip(piece.box, strides, strict=True))
            for piece in self.pieces
        ]
        return self._spread([np.asarray([split_index(start)], np.uint32) for start in starts])

    def share(self) -> Sums:
        """This process's share of the digest sums of the new values."""
        if not host.speaks_for(self.leaf, self.unpacker.spread):
            return 0, 0
        found = np.asarray(self.sums).tolist()
        owned = [index for index, piece in enumerate(self.pieces) if piece.owned]
        return add((0, 0), *(tuple(found[self.piece_of.index(index)]) for index in owned))

    def array(self) -> jax.Array:
        """The new values, as the leaf lies; where they are made in place, the old ones are gone."""
        if self.new is None:
            assert self.edits is not None, "decode comes first"
            self.new = expand.rewrite(
                self._stack(), self.edits, grid=self.grid, backend=self.backend, donate=True
            )
            self.edits = None
        shards = expand.unstack(self.new)
        sharding = self.leaf.value.sharding
        if self.cut:
            return jax.device_put(shards[0], sharding)
        return jax.make_array_from_single_device_arrays(self.leaf.shape, sharding, shards)


def _placed(leaf: Leaf) -> tuple[Piece, ...]:
    """As `host.held`, with the device of an array that lies on one."""
    return tuple(
        piece if piece.devices else Piece(piece.box, tuple(leaf.value.sharding.device_set), True)
        for piece in host.held(leaf)
    )


def _extended(numbers: np.ndarray, length: int) -> np.ndarray:
    """A list of tiles whose end repeats its last one."""
    last = numbers[-1:] if len(numbers) else np.zeros(1, np.int64)
    return np.concatenate([numbers, np.repeat(last, length - len(numbers))]).astype(np.int32)


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    missing = np.zeros((length - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, missing])
