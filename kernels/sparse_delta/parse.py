"""Reading the manifest of a payload that nobody vouches for.

Everything in it is checked against itself and against the limits of whoever reads it, checksums
before all else; `wire` describes and writes the same bytes.
"""

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import xxhash

from kernels.sparse_delta import frames, wire
from kernels.sparse_delta.errors import Damaged, Incomplete, UnknownFormat
from kernels.sparse_delta.partial import PartialPayload
from kernels.sparse_delta.tiles import MAX_TILE_ELEMENTS, TileGrid
from kernels.sparse_delta.wire import ANCHOR, DELTA, HEADER, Manifest, Run, Tensor, Tiles

_MAX_NDIM, _MAX_TABLE_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class Payload:
    """A payload whose manifest was checked.

    Attributes:
      manifest: what was read.
      buckets: tiles, size and checksums of each bucket.
      offsets: first byte of each bucket in the payload, and the end of the last.
      data: the whole payload, uint8; of a `PartialPayload` the buckets that are here.
      places: first byte of each bucket in `data`, −1 where it is not here.
    """

    manifest: Manifest
    buckets: np.ndarray
    offsets: np.ndarray
    data: np.ndarray
    places: np.ndarray

    def verify(self, wanted: np.ndarray | None = None) -> None:
        """Checks the buckets' checksums.

        Args:
          wanted: bool, one a bucket; all that are here where None.

        Raises:
          Damaged: names the first bucket that is not what was written.
          Incomplete: names one that is wanted and not here.
        """
        for index in np.flatnonzero(self.places >= 0 if wanted is None else wanted).tolist():
            start, place = int(self.offsets[index]), int(self.places[index])
            size = int(self.offsets[index + 1]) - start
            if place < 0:
                raise Incomplete(
                    f"bucket {index} is not here: add bytes {start} … {start + size - 1}",
                    bucket=index,
                )
            content = self.data.data[place : place + size]
            if (
                xxhash.xxh3_64_intdigest(content) != self.buckets[index]["xxh3"]
                or google_crc32c.value(bytes(content)) != self.buckets[index]["crc32c"]
            ):
                raise Damaged(
                    f"bucket {index} is damaged: its checksums do not match; fetch it again",
                    bucket=int(index),
                )

    def located(self) -> Iterator[tuple[Run, np.ndarray, np.ndarray]]:
        """Runs with the first byte in `data` and the bucket of each of their tiles.

        That byte is −1 where the tile's bucket is not here.
        """
        bucket = np.repeat(np.arange(len(self.buckets)), self.buckets["tiles"])
        moved = self.places - self.offsets[:-1]
        at = 0
        start = int(self.offsets[0])
        for run in self.manifest.runs:
            ends = start + np.cumsum(run.tiles.sizes, dtype=np.int64)
            own = bucket[at : at + len(run.tiles)]
            here = self.places[own] >= 0
            yield run, np.where(here, ends - run.tiles.sizes + moved[own], -1), own
            at += len(run.tiles)
            start = int(ends[-1])


def read(payload: Any, *, limits: "Limits | None" = None) -> Payload:
    """Checks and reads header and manifest; the buckets' checksums are `Payload.verify`.

    Args:
      payload: bytes-like, or a `PartialPayload` with the manifest.
      limits: what the reader's own tensors allow; None bounds by the size of the payload alone.

    Raises:
      CorruptPayload: names what is wrong.
    """
    partial = isinstance(payload, PartialPayload)
    source = payload if partial else PartialPayload({0: payload})
    header = read_header(source)
    if header is None:
        raise Damaged(f"a payload has at least {HEADER.size} bytes, these are fewer")
    limits = limits or Limits()
    if partial:
        limits.check("bytes", header.total, limits.total)
    elif source.missing(0, header.total) or source.cut(header.total, header.total + 1) is not None:
        raise Damaged(
            f"the payload should have {header.total} bytes, and has {memoryview(payload).nbytes}"
        )
    stored = source.cut(HEADER.size, header.body)
    if stored is None:
        raise Incomplete(f"the manifest is not here: add bytes 0 … {header.body - 1}")
    if xxhash.xxh3_64_intdigest(header.sealed + stored.tobytes()) != header.seal:
        raise Damaged("the manifest is damaged: its checksum does not match; fetch it again")
    try:
        return _Reader(stored.tobytes(), source, header, limits).payload()
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise Damaged(f"the manifest cannot be read: {error}") from error


@dataclass(frozen=True)
class Header:
    """The first bytes of a payload, of which nothing is known yet but that they are its own.

    Attributes:
      body: where the manifest ends.
      total: bytes of the payload.
      seal: checksum of `sealed` and the manifest.
      sealed: the header's bytes before the seal.
    """

    body: int
    total: int
    seal: int
    sealed: bytes


def read_header(source: PartialPayload) -> Header | None:
    """The header, or None where it is not here.

    Raises:
      CorruptPayload: it is no header of this format, or contradicts itself.
    """
    head = source.cut(0, HEADER.size)
    if head is None:
        return None
    magic, version, manifest_size, total, seal = HEADER.unpack(head.tobytes())
    if magic != wire.MAGIC:
        raise UnknownFormat(
            f"no sparse_delta payload: it begins with {magic!r}, not {wire.MAGIC!r}"
        )
    if version != wire.FORMAT_VERSION:
        raise UnknownFormat(
            f"payload of format version {version}; this code reads {wire.FORMAT_VERSION}"
        )
    body = HEADER.size + manifest_size
    if body > total:
        raise Damaged(f"a payload of {total} bytes has no room for a manifest of {manifest_size}")
    return Header(body, total, seal, head[: HEADER.size - 8].tobytes())


@dataclass(frozen=True)
class Limits:
    """What the receiver's tensors allow a manifest to hold; None means no limit of this kind.

    Attributes:
      tensors: number of them.
      names: bytes of all names.
      dims: dimensions of all shapes.
      elements: of all tensors.
    """

    tensors: int | None = None
    names: int | None = None
    dims: int | None = None
    elements: int | None = None

    @property
    def table(self) -> int | None:
        """Bytes of a tensor table."""
        if self.tensors is None or self.names is None or self.dims is None:
            return None
        return self.names + 8 * self.dims + 64 * self.tensors + 4096

    @property
    def total(self) -> int | None:
        """Bytes of a payload: twice what dense elements of 32 bits and the names could take."""
        if self.elements is None or self.table is None:
            return None
        return 2 * (4 * self.elements + self.table)

    def check(self, field: str, value: int, limit: int | None) -> None:
        """Raises `Damaged` where a field is above a limit."""
        if limit is not None and value > limit:
            raise Damaged(f"{value} {field} are more than the receiver's tensors allow: {limit}")


class _Cursor:
    """Reads columns from bytes, never beyond their end."""

    def __init__(self, raw: bytes, field: str) -> None:
        self.raw, self.field, self.at = raw, field, 0

    def take(self, size: int) -> bytes:
        if size < 0 or size > len(self.raw) - self.at:
            raise Damaged(f"the {self.field} end early: {size} bytes wanted at {self.at}")
        self.at += size
        return self.raw[self.at - size : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def column(self, dtype: Any, count: int) -> np.ndarray:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * count), dtype)

    def planes(self, dtype: str, count: int) -> np.ndarray:
        width = np.dtype(dtype).itemsize
        planes = self.column("u1", count * width).reshape(width, count)
        return np.ascontiguousarray(planes.T).view(dtype).reshape(count)

    def end(self) -> None:
        if self.at != len(self.raw):
            raise Damaged(f"{len(self.raw) - self.at} bytes follow the {self.field}")


class _Reader:
    """Reads one manifest."""

    def __init__(
        self, stored: bytes, source: PartialPayload, header: Header, limits: Limits
    ) -> None:
        self.cursor = _Cursor(stored, "manifest")
        self.source, self.header, self.limits = source, header, limits

    def payload(self) -> Payload:
        (
            kind, flags, n_tables, part, parts, n_tensors, n_buckets, n_tiles,
            version, base_version, base_root, target_root,
        ) = wire.FIXED.unpack(self.cursor.take(wire.FIXED.size))  # fmt: skip
        if kind not in (ANCHOR, DELTA) or flags & ~(wire.HAS_VERSION | wire.HAS_BASE_VERSION):
            raise UnknownFormat(f"unknown kind {kind} or flags {flags:#x} of payload")
        self.limits.check("tensors", n_tensors, self.limits.tensors)
        self.limits.check("tiles", n_tiles, self.limits.elements)
        if max(n_buckets, n_tables) > n_tiles:
            raise Damaged(f"fields contradict each other: {n_tiles=}, {n_buckets=}, {n_tables=}")
        if part >= max(parts, 1):
            raise Damaged(f"part {part} of {parts} is out of bounds")
        tensors = self._tensors(
            self._section("tensor table", self.limits.table), n_tensors, parts > 0
        )
        tables = self._tables(
            self._section("coder's tables", n_tables * (_MAX_TABLE_BYTES + 260)), n_tables
        )
        directory = self._section("tile directory", 4 * wire.DIRECTORY_COLUMNS * n_tiles)
        runs = self._runs(directory, n_tiles, tensors, tables)
        bucket_table = self._section("bucket table", n_buckets * wire.BUCKET.itemsize)
        buckets = bucket_table.column(wire.BUCKET, n_buckets)
        bucket_table.end()
        self.cursor.end()
        manifest = Manifest(
            kind=kind,
            part=(part, parts) if parts else None,
            version=version if flags & wire.HAS_VERSION else None,
            base_version=base_version if flags & wire.HAS_BASE_VERSION else None,
            base_root=base_root,
            target_root=target_root,
            tensors=tensors,
            tables=tables,
            runs=runs,
        )
        offsets = self._offsets(buckets, manifest)
        return Payload(manifest, buckets, offsets, *self._held(offsets))

    def _section(self, field: str, ceiling: int | None) -> _Cursor:
        method, raw_size, stored_size = wire.SECTION.unpack(self.cursor.take(wire.SECTION.size))
        stored = self.cursor.take(stored_size)
        self.limits.check(f"bytes of {field}", raw_size, ceiling)
        if method == wire.STORED:
            if raw_size != stored_size:
                raise Damaged(f"the {field} have two sizes: {raw_size} and {stored_size}")
            return _Cursor(stored, field)
        if method != wire.ZSTD:
            raise UnknownFormat(f"the {field} are stored by unknown method {method}")
        if raw_size > wire.expansion_limit(self.header.total):
            raise Damaged(f"the {field} would be {raw_size} bytes, more than the payload warrants")
        try:
            raw = frames.unpack(stored, raw_size)
        except frames.BadFrame as error:
            raise Damaged(f"the {field} {error}") from error
        return _Cursor(raw, field)

    def _tensors(self, cursor: _Cursor, count: int, part: bool) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for index in range(count):
            name = cursor.take(cursor.unpack("<H")[0]).decode()
            dtype = cursor.take(cursor.take(1)[0]).decode("ascii")
            n_dims, *fields = cursor.unpack(wire.TENSOR.format)
            splits, tile, back, carried = fields[:2], fields[2:4], fields[4], fields[5]
            if n_dims > _MAX_NDIM or carried > 1 or (part and not carried):
                raise Damaged(f"{name}: {n_dims} dimensions, or sums {carried}, are out of bounds")
            grid = TileGrid(cursor.unpack(f"<{n_dims}Q"), tuple(splits), tuple(tile))
            target = cursor.unpack("<II") if carried else None
            base = cursor.unpack("<II") if part else None
            tensor = Tensor(
                name=name, dtype=dtype, grid=grid, same=index - back, target=target, base=base
            )
            if found and found[-1].name.encode() >= name.encode():
                raise Damaged("the tensors' names are not in rising order")
            self._check_tensor(tensor, index, found)
            found.append(tensor)
        cursor.end()
        return tuple(found)

    def _check_tensor(self, tensor: Tensor, index: int, before: list[Tensor]) -> None:
        if tensor.grid.n_tiles >= 1 << 32 or max(tensor.grid.extents) >= 1 << 48:
            raise Damaged(f"{tensor.name}: more tiles than can be: {tensor.grid}")
        if tensor.same == index:
            return
        if tensor.same < 0:
            raise Damaged(f"{tensor.name}: tied to a tensor before the first one")
        other = before[tensor.same]
        if (other.same, other.dtype, other.grid) != (tensor.same, tensor.dtype, tensor.grid):
            raise Damaged(f"{tensor.name}: tied to {other.name}, which is another kind of tensor")

    def _tables(self, cursor: _Cursor, count: int) -> tuple[tuple[str, bytes], ...]:
        tables = []
        for _ in range(count):
            dtype = cursor.take(cursor.take(1)[0]).decode("ascii")
            (size,) = cursor.unpack("<I")
            if size > _MAX_TABLE_BYTES:
                raise Damaged(f"tables of {size} bytes for {dtype} are out of bounds")
            tables.append((dtype, cursor.take(size)))
        cursor.end()
        return tuple(tables)

    def _runs(
        self,
        cursor: _Cursor,
        n_tiles: int,
        tensors: tuple[Tensor, ...],
        tables: tuple[tuple[str, bytes], ...],
    ) -> tuple[Run, ...]:
        columns = cursor.planes("<u4", wire.DIRECTORY_COLUMNS * n_tiles)
        cursor.end()
        tensor_of, table_of, steps, modes, nnz, sizes = columns.reshape(
            wire.DIRECTORY_COLUMNS, n_tiles
        )
        if np.any(tensor_of >= len(tensors)) or np.any(table_of >= len(tables)):
            raise Damaged("a tile is of a tensor or of tables that are not there")
        if np.any(nnz > MAX_TILE_ELEMENTS) or np.any(modes > 255):
            raise Damaged(f"a tile has more changes than {MAX_TILE_ELEMENTS}, the most elements")
        numbers = np.cumsum(steps, dtype=np.int64) & 0xFFFFFFFF
        # A new run where anything else than the tile's number changes, or that does not rise.
        same = np.ones(n_tiles, bool)
        for column in (tensor_of, table_of):
            same[1:] &= column[1:] == column[:-1]
        same[1:] &= numbers[1:] > numbers[:-1]
        same[:1] = False
        runs = []
        starts = np.flatnonzero(~same).tolist()
        for start, stop in itertools.pairwise([*starts, n_tiles]):
            at = slice(start, stop)
            tensor, table = int(tensor_of[start]), int(table_of[start])
            own = tensors[tensor]
            if numbers[stop - 1] >= own.grid.n_tiles:
                raise Damaged(f"{own.name}: tile {numbers[stop - 1]} is beyond its grid")
            if own.same != tensor or tables[table][0] != own.dtype:
                raise Damaged(f"{own.name}: tiles of a tied tensor, or tables of another dtype")
            tiles = Tiles(numbers[at], modes[at].astype(np.uint8), nnz[at], sizes[at])
            runs.append(Run(tensor, table, tiles))
        refuse_twice(runs, tensors)
        return tuple(runs)

    def _offsets(self, buckets: np.ndarray, manifest: Manifest) -> np.ndarray:
        start = self.header.body
        offsets = np.concatenate([[start], start + np.cumsum(buckets["size"], dtype=np.int64)])
        sizes = wire.join([run.tiles.sizes for run in manifest.runs], np.int64)
        cuts = np.concatenate([[0], np.cumsum(buckets["tiles"], dtype=np.int64)])
        if cuts[-1] != len(sizes) or np.any(buckets["tiles"] == 0):
            raise Damaged("the buckets do not hold the tiles of the directory")
        if np.any(np.add.reduceat(sizes, cuts[:-1]) != buckets["size"] if len(sizes) else False):
            raise Damaged("the buckets' sizes are not those of their tiles")
        if offsets[-1] != self.header.total:
            raise Damaged(f"the buckets end at {offsets[-1]}, the payload at {self.header.total}")
        return offsets

    def _held(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The buckets that are here, in one array, and where in it each begins."""
        whole = self.source.cut(0, self.header.total)
        if whole is not None:
            return whole, offsets[:-1]
        found = [self.source.cut(*edges) for edges in itertools.pairwise(offsets.tolist())]
        sizes = np.asarray([0 if bucket is None else len(bucket) for bucket in found], np.int64)
        places = np.where([b is None for b in found], -1, np.cumsum(sizes) - sizes)
        here = [bucket for bucket in found if bucket is not None]
        return np.concatenate([np.empty(0, np.uint8), *here]), places.astype(np.int64)


def refuse_twice(runs: Sequence[Run], tensors: Sequence[Tensor]) -> None:
    by_tensor: dict[int, list[np.ndarray]] = {}
    for run in runs:
        by_tensor.setdefault(run.tensor, []).append(run.tiles.ids)
    for index, several in by_tensor.items():
        if len(several) > 1:
            ids = np.sort(np.concatenate(several))
            if np.any(ids[1:] == ids[:-1]):
                raise Damaged(f"{tensors[index].name}: a tile is there twice")
