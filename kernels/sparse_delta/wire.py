"""The bytes of a payload: header, manifest, buckets. FORMAT.md describes them.

    header (32 bytes) | manifest | bucket | bucket | …

Everything in the manifest is checked here against itself and against the limits of whoever reads
it; what a tile's bytes mean is the business of `codec`.
"""

import dataclasses
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import xxhash
import zstandard

from kernels.sparse_delta.errors import CorruptPayload, Damaged, UnknownFormat
from kernels.sparse_delta.tiles import MAX_TILE_ELEMENTS, TileGrid

MAGIC = b"SPDELTA\0"
FORMAT_VERSION = 1
HEADER = struct.Struct("<8sIIQQ")  # magic, format version, manifest size, payload size, xxh3-64
ANCHOR, DELTA = 0, 1
# Larger buckets mean fewer requests to an object store, smaller ones less to fetch twice.
BUCKET_BYTES = 4 << 20
# Sums of tensors below this size are cheaper to make again than to carry: 8 bytes beside 1 KiB
# or less would break the bound on the size of a payload.
SUMS_FROM_ELEMENTS = 1024

# kind, flags, tables, tensors, runs, buckets, tiles, version, base version, roots
_FIXED = struct.Struct("<BBHIIIQqq16s16s")
_PART, _HAS_VERSION, _HAS_BASE_VERSION = 1, 2, 4
_SECTION = struct.Struct("<BII")  # method, raw bytes, stored bytes
_STORED, _ZSTD = 0, 1
_ZSTD_LEVEL = 3
# A section may be no more than this many times the payload, plus a floor: a few bytes of zstd can
# ask for gigabytes. The writer keeps to it too.
_EXPANSION, _EXPANSION_FLOOR = 256, 1 << 16
_BUCKET = np.dtype([("tiles", "<u4"), ("size", "<u4"), ("xxh3", "<u8"), ("crc32c", "<u4")])
_MAX_NAME, _MAX_NDIM, _MAX_TABLE_BYTES = 1 << 14, 64, 1 << 16

Sums = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of the tree.

    Attributes:
      name: path of the leaf.
      dtype: its name in JAX.
      grid: its shape and its tiles.
      same: index of an earlier tensor whose tiles are this one's too (tied weights), or its own.
      target: digest sums of the new values, where carried; of a part, the part's share.
      base: digest sums of the old values; only parts carry them.
    """

    name: str
    dtype: str
    grid: TileGrid
    same: int
    target: Sums | None = None
    base: Sums | None = None


@dataclass(frozen=True)
class Tiles:
    """A directory of coded tiles, one entry a tile.

    Attributes:
      ids: number in the tensor's grid, int64.
      modes: how its bytes are to be read, uint8.
      nnz: changed elements, uint32.
      sizes: bytes, uint32.
    """

    ids: np.ndarray
    modes: np.ndarray
    nnz: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: Any) -> "Tiles":
        return Tiles(self.ids[at], self.modes[at], self.nnz[at], self.sizes[at])


@dataclass(frozen=True)
class Run:
    """Tiles of one tensor that are stored one after the other, by rising number.

    Attributes:
      tensor: index.
      table: index of the coder's tables.
      tiles: the directory.
    """

    tensor: int
    table: int
    tiles: Tiles


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything of a payload but the tiles' bytes.

    Attributes:
      kind: ANCHOR or DELTA.
      part: whether this is one process's share.
      version: of the target, if the caller numbers versions.
      base_version: of the base, likewise.
      base_root: tree digest of the old weights; zeros in an anchor and in a part.
      target_root: tree digest of the new weights; zeros in a part.
      tensors: by rising name.
      tables: dtype and bytes of the coder's tables.
      runs: in the order of the buckets' bytes.
    """

    kind: int
    part: bool
    version: int | None
    base_version: int | None
    base_root: bytes
    target_root: bytes
    tensors: tuple[Tensor, ...]
    tables: tuple[tuple[str, bytes], ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Payload:
    """A payload whose manifest was checked.

    Attributes:
      manifest: what was read.
      buckets: tiles, size and checksums of each bucket.
      offsets: first byte of each bucket in the payload, and the end of the last.
      data: the whole payload, uint8.
    """

    manifest: Manifest
    buckets: np.ndarray
    offsets: np.ndarray
    data: np.ndarray

    def verify(self, wanted: np.ndarray | None = None) -> None:
        """Checks the buckets' checksums.

        Args:
          wanted: bool, one a bucket; all where None.

        Raises:
          Damaged: names the first bucket that is not what was written.
        """
        for index in range(len(self.buckets)) if wanted is None else np.flatnonzero(wanted):
            content = self.data.data[self.offsets[index] : self.offsets[index + 1]]
            if (
                xxhash.xxh3_64_intdigest(content) != self.buckets[index]["xxh3"]
                or google_crc32c.value(bytes(content)) != self.buckets[index]["crc32c"]
            ):
                raise Damaged(
                    f"bucket {index} is damaged: its checksums do not match; fetch it again",
                    bucket=int(index),
                )

    def located(self) -> Iterator[tuple[Run, np.ndarray, np.ndarray]]:
        """Runs with the first byte in the payload and the bucket of each of their tiles."""
        bucket = np.repeat(np.arange(len(self.buckets)), self.buckets["tiles"])
        at = 0
        start = int(self.offsets[0])
        for run in self.manifest.runs:
            ends = start + np.cumsum(run.tiles.sizes, dtype=np.int64)
            yield run, ends - run.tiles.sizes, bucket[at : at + len(run.tiles)]
            at += len(run.tiles)
            start = int(ends[-1])


def write(manifest: Manifest, chunks: Sequence[memoryview]) -> bytes:
    """Puts a payload together.

    Args:
      manifest: complete.
      chunks: the runs' bytes, one chunk a run.
    """
    sizes = _join([run.tiles.sizes for run in manifest.runs], np.uint32)
    cuts = _cut(sizes)
    buckets = np.zeros(len(cuts) - 1, _BUCKET)
    buckets["tiles"] = np.diff(cuts)
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[cuts]
    buckets["size"] = np.diff(ends)
    views = [chunk.cast("B") for chunk in chunks]
    for record, pieces in zip(buckets, _bucketed(views, ends), strict=True):
        xxh3, crc = xxhash.xxh3_64(), 0
        for piece in pieces:
            xxh3.update(piece)
            crc = google_crc32c.extend(crc, bytes(piece))
        record["xxh3"], record["crc32c"] = xxh3.intdigest(), crc
    body = int(ends[-1])
    stored = _manifest_bytes(manifest, buckets, body)
    total = HEADER.size + len(stored) + body
    head = HEADER.pack(MAGIC, FORMAT_VERSION, len(stored), total, 0)[:-8]
    seal = xxhash.xxh3_64_intdigest(head + stored)
    return b"".join([head, struct.pack("<Q", seal), stored, *views])


def _cut(sizes: np.ndarray) -> np.ndarray:
    """First tile of every bucket, and the end: as many tiles a bucket as fit, at least one."""
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts = [0]
    while cuts[-1] < len(sizes):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        fit = int(np.searchsorted(ends, before + BUCKET_BYTES, side="right"))
        cuts.append(max(fit, cuts[-1] + 1))
    return np.asarray(cuts, np.int64)


def _bucketed(views: Sequence[memoryview], ends: np.ndarray) -> Iterator[list[memoryview]]:
    """The bytes of each bucket, as slices of the chunks."""
    chunk = start = 0
    for size in np.diff(ends):
        pieces, missing = [], int(size)
        while missing:
            piece = views[chunk][start : start + missing]
            pieces.append(piece)
            missing -= len(piece)
            start += len(piece)
            if start == len(views[chunk]):
                chunk, start = chunk + 1, 0
        yield pieces


def _join(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)


def _manifest_bytes(manifest: Manifest, buckets: np.ndarray, body: int) -> bytes:
    flags = (
        _PART * manifest.part
        | _HAS_VERSION * (manifest.version is not None)
        | _HAS_BASE_VERSION * (manifest.base_version is not None)
    )
    fixed = _FIXED.pack(
        manifest.kind,
        flags,
        len(manifest.tables),
        len(manifest.tensors),
        len(manifest.runs),
        len(buckets),
        sum(len(run.tiles) for run in manifest.runs),
        manifest.version or 0,
        manifest.base_version or 0,
        manifest.base_root,
        manifest.target_root,
    )
    raw = (
        _tensors_bytes(manifest),
        _tables_bytes(manifest),
        _directory_bytes(manifest),
        buckets.tobytes(),
    )
    return fixed + b"".join(_section_bytes(section, body) for section in raw)


def _section_bytes(raw: bytes, body: int) -> bytes:
    packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=False).compress(raw)
    if len(packed) < len(raw) <= _expansion_limit(body):
        return _SECTION.pack(_ZSTD, len(raw), len(packed)) + packed
    return _SECTION.pack(_STORED, len(raw), len(raw)) + raw


def _expansion_limit(payload_bytes: int) -> int:
    return _EXPANSION_FLOOR + _EXPANSION * payload_bytes


def _tensors_bytes(manifest: Manifest) -> bytes:
    tensors = manifest.tensors
    names = [tensor.name.encode() for tensor in tensors]
    for name in names:
        if len(name) >= _MAX_NAME:
            raise ValueError(f"a leaf's name must be below {_MAX_NAME} bytes: {name!r}")
    dtypes = _dtypes(manifest)
    carried = [tensor.target is not None for tensor in tensors]
    columns = [
        np.asarray([len(name) for name in names], "<u2"),
        b"".join(names),
        bytes([len(dtypes)]),
        *(bytes([len(dtype)]) + dtype.encode() for dtype in dtypes),
        np.asarray([dtypes.index(tensor.dtype) for tensor in tensors], "u1"),
        np.asarray([len(tensor.grid.shape) for tensor in tensors], "u1"),
        np.asarray([size for tensor in tensors for size in tensor.grid.shape], "<u8"),
        np.asarray([tensor.grid.splits for tensor in tensors], "u1"),
        np.asarray([tensor.grid.tile for tensor in tensors], "<u4"),
        np.asarray([tensor.same for tensor in tensors], "<u4"),
        np.asarray(carried, "u1"),
        np.asarray([tensor.target for tensor in tensors if tensor.target], "<u4"),
    ]
    if manifest.part:
        columns.append(np.asarray([tensor.base for tensor in tensors], "<u4"))
    return b"".join(c if isinstance(c, bytes) else c.tobytes() for c in columns)


def _dtypes(manifest: Manifest) -> list[str]:
    return sorted({tensor.dtype for tensor in manifest.tensors})


def _tables_bytes(manifest: Manifest) -> bytes:
    dtypes = _dtypes(manifest)
    return b"".join(
        struct.pack("<BI", dtypes.index(dtype), len(table)) + table
        for dtype, table in manifest.tables
    )


def _directory_bytes(manifest: Manifest) -> bytes:
    runs = manifest.runs
    # Gaps of neighbouring tiles are 1, and bytes of equal weight lie together: zstd likes both.
    gaps = [np.diff(run.tiles.ids, prepend=0) for run in runs]
    columns = [
        _planes(np.asarray([run.tensor for run in runs], "<u4")),
        _planes(np.asarray([run.table for run in runs], "<u2")),
        _planes(np.asarray([len(run.tiles) for run in runs], "<u4")),
        _planes(_join(gaps, "<u4")),
        _join([run.tiles.modes for run in runs], np.uint8).tobytes(),
        _planes(_join([run.tiles.nnz for run in runs], "<u4")),
        _planes(_join([run.tiles.sizes for run in runs], "<u4")),
    ]
    return b"".join(columns)


def _planes(column: np.ndarray) -> bytes:
    return column.view(np.uint8).reshape(len(column), column.itemsize).T.tobytes()


def read(payload: Any, *, limits: "Limits | None" = None) -> Payload:
    """Checks and reads header and manifest; the buckets' checksums are `Payload.verify`.

    Args:
      payload: bytes-like.
      limits: what the reader's own tensors allow; None bounds by the size of the payload alone.

    Raises:
      CorruptPayload: names what is wrong.
    """
    data = np.frombuffer(payload, np.uint8)
    if len(data) < HEADER.size:
        raise Damaged(f"a payload has at least {HEADER.size} bytes, this has {len(data)}")
    magic, version, manifest_size, total, seal = HEADER.unpack(data[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise UnknownFormat(f"no sparse_delta payload: it begins with {magic!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise UnknownFormat(
            f"payload of format version {version}; this code reads {FORMAT_VERSION}"
        )
    if total != len(data) or HEADER.size + manifest_size > total:
        raise Damaged(
            f"the payload should have {total} bytes with a manifest of {manifest_size}, "
            f"and has {len(data)}"
        )
    head = data[: HEADER.size - 8].tobytes()
    stored = data[HEADER.size : HEADER.size + manifest_size].tobytes()
    if xxhash.xxh3_64_intdigest(head + stored) != seal:
        raise Damaged("the manifest is damaged: its checksum does not match; fetch it again")
    try:
        return _Reader(stored, data, limits or Limits()).payload()
    except (struct.error, UnicodeDecodeError, zstandard.ZstdError, ValueError) as error:
        raise Damaged(f"the manifest cannot be read: {error}") from error


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


class _Cursor:
    """Reads columns from bytes, never beyond their end."""

    def __init__(self, raw: bytes, field: str) -> None:
        self.raw, self.field, self.at = raw, field, 0

    def take(self, size: int) -> bytes:
        if size < 0 or size > len(self.raw) - self.at:
            raise Damaged(f"the {self.field} end early: {size} bytes wanted at {self.at}")
        self.at += size
        return self.raw[self.at - size : self.at]

    def column(self, dtype: str, count: int) -> np.ndarray:
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

    def __init__(self, stored: bytes, data: np.ndarray, limits: Limits) -> None:
        self.cursor = _Cursor(stored, "manifest")
        self.data, self.limits, self.manifest_size = data, limits, len(stored)

    def payload(self) -> Payload:
        (
            kind, flags, n_tables, n_tensors, n_runs, n_buckets, n_tiles,
            version, base_version, base_root, target_root,
        ) = _FIXED.unpack(self.cursor.take(_FIXED.size))  # fmt: skip
        if kind not in (ANCHOR, DELTA) or flags & ~(_PART | _HAS_VERSION | _HAS_BASE_VERSION):
            raise UnknownFormat(f"unknown kind {kind} or flags {flags:#x} of payload")
        self._bound("tensors", n_tensors, self.limits.tensors)
        self._bound("tiles", n_tiles, self.limits.elements)
        if n_runs > n_tiles or n_buckets > n_tiles or n_tables > n_runs:
            raise Damaged(
                f"fields contradict each other: {n_tiles=}, {n_runs=}, {n_buckets=}, {n_tables=}"
            )
        part = bool(flags & _PART)
        names, dims = self.limits.names, self.limits.dims
        ceiling = None
        if names is not None and dims is not None:
            ceiling = names + 8 * dims + 64 * n_tensors + 4096
        tensors, dtypes = self._tensors(self._section("tensor table", ceiling), n_tensors, part)
        tables = self._tables(
            self._section("coder's tables", n_tables * (_MAX_TABLE_BYTES + 5)), n_tables, dtypes
        )
        runs = self._runs(
            self._section("tile directory", 10 * n_runs + 13 * n_tiles),
            n_runs, n_tiles, tensors, tables,
        )  # fmt: skip
        bucket_table = self._section("bucket table", n_buckets * _BUCKET.itemsize)
        buckets = bucket_table.column(_BUCKET, n_buckets)  # pyright: ignore[reportArgumentType]
        bucket_table.end()
        self.cursor.end()
        manifest = Manifest(
            kind=kind,
            part=part,
            version=version if flags & _HAS_VERSION else None,
            base_version=base_version if flags & _HAS_BASE_VERSION else None,
            base_root=base_root,
            target_root=target_root,
            tensors=tensors,
            tables=tables,
            runs=runs,
        )
        return Payload(manifest, buckets, self._offsets(buckets, manifest), self.data)

    def _bound(self, field: str, value: int, limit: int | None) -> None:
        if limit is not None and value > limit:
            raise Damaged(f"{value} {field} are more than the receiver's tensors allow: {limit}")

    def _section(self, field: str, ceiling: int | None) -> _Cursor:
        method, raw_size, stored_size = _SECTION.unpack(self.cursor.take(_SECTION.size))
        stored = self.cursor.take(stored_size)
        self._bound(f"bytes of {field}", raw_size, ceiling)
        if method == _STORED:
            if raw_size != stored_size:
                raise Damaged(f"the {field} have two sizes: {raw_size} and {stored_size}")
            return _Cursor(stored, field)
        if method != _ZSTD:
            raise UnknownFormat(f"the {field} are stored by unknown method {method}")
        if raw_size > _expansion_limit(len(self.data)):
            raise Damaged(f"the {field} would be {raw_size} bytes, more than the payload warrants")
        raw = zstandard.ZstdDecompressor().decompress(
            stored, max_output_size=raw_size, allow_extra_data=False
        )
        if len(raw) != raw_size:
            raise Damaged(f"the {field} are {len(raw)} bytes, not {raw_size}")
        return _Cursor(raw, field)

    def _tensors(
        self, cursor: _Cursor, count: int, part: bool
    ) -> tuple[tuple[Tensor, ...], list[str]]:
        lengths = cursor.column("<u2", count).tolist()
        names = [cursor.take(length).decode() for length in lengths]
        dtypes = [cursor.take(cursor.take(1)[0]).decode("ascii") for _ in range(cursor.take(1)[0])]
        dtype_of = cursor.column("u1", count)
        ndims = cursor.column("u1", count)
        if any(a.encode() >= b.encode() for a, b in itertools.pairwise(names)):
            raise Damaged("the tensors' names are not in rising order")
        if np.any(dtype_of >= len(dtypes)) or np.any(ndims > _MAX_NDIM):
            raise Damaged("a tensor has a dtype or a number of dimensions out of bounds")
        ends = np.cumsum(ndims, dtype=np.int64).tolist()
        dims = cursor.column("<u8", ends[-1] if ends else 0).tolist()
        splits = cursor.column("u1", 2 * count).reshape(count, 2).tolist()
        tiles = cursor.column("<u4", 2 * count).reshape(count, 2).tolist()
        same = cursor.column("<u4", count).tolist()
        carried = cursor.column("u1", count)
        if np.any(carried > 1):
            raise Damaged("the column of carried sums holds other than 0 and 1")
        sums = iter(_pairs(cursor, int(carried.sum())))
        base: list[Sums | None] = [None] * count
        if part:
            base = [*_pairs(cursor, count)]
        targets = [next(sums) if has else None for has in carried]
        cursor.end()
        found: list[Tensor] = []
        for index, name in enumerate(names):
            shape = tuple(dims[ends[index] - int(ndims[index]) : ends[index]])
            grid = TileGrid(shape, tuple(splits[index]), tuple(tiles[index]))
            tensor = Tensor(
                name=name,
                dtype=dtypes[dtype_of[index]],
                grid=grid,
                same=same[index],
                target=targets[index],
                base=base[index],
            )
            self._check_tensor(tensor, index, found)
            found.append(tensor)
        return tuple(found), dtypes

    def _check_tensor(self, tensor: Tensor, index: int, before: list[Tensor]) -> None:
        if tensor.grid.n_tiles >= 1 << 32 or max(tensor.grid.extents) >= 1 << 48:
            raise Damaged(f"{tensor.name}: more tiles than can be: {tensor.grid}")
        if tensor.same == index:
            return
        if tensor.same > index:
            raise Damaged(f"{tensor.name}: tied to a tensor that does not come before it")
        other = before[tensor.same]
        if (other.same, other.dtype, other.grid) != (tensor.same, tensor.dtype, tensor.grid):
            raise Damaged(f"{tensor.name}: tied to {other.name}, which is another kind of tensor")

    def _tables(
        self, cursor: _Cursor, count: int, dtypes: list[str]
    ) -> tuple[tuple[str, bytes], ...]:
        tables = []
        for _ in range(count):
            dtype, size = struct.unpack("<BI", cursor.take(5))
            if dtype >= len(dtypes) or size > _MAX_TABLE_BYTES:
                raise Damaged(f"tables of {size} bytes for dtype {dtype} are out of bounds")
            tables.append((dtypes[dtype], cursor.take(size)))
        cursor.end()
        return tuple(tables)

    def _runs(
        self,
        cursor: _Cursor,
        n_runs: int,
        n_tiles: int,
        tensors: tuple[Tensor, ...],
        tables: tuple[tuple[str, bytes], ...],
    ) -> tuple[Run, ...]:
        tensor_of = cursor.planes("<u4", n_runs)
        table_of = cursor.planes("<u2", n_runs)
        counts = cursor.planes("<u4", n_runs).astype(np.int64)
        if counts.sum() != n_tiles or np.any(counts == 0):
            raise Damaged("the runs of tiles do not add up to the tiles")
        if np.any(tensor_of >= len(tensors)) or np.any(table_of >= len(tables)):
            raise Damaged("a run of tiles is of a tensor or of tables that are not there")
        gaps = cursor.planes("<u4", n_tiles).astype(np.int64)
        modes = cursor.column("u1", n_tiles)
        nnz = cursor.planes("<u4", n_tiles)
        sizes = cursor.planes("<u4", n_tiles)
        cursor.end()
        if np.any(nnz > MAX_TILE_ELEMENTS):
            raise Damaged(f"a tile has more changes than {MAX_TILE_ELEMENTS}, the most elements")
        runs = []
        stops = np.cumsum(counts).tolist()
        for index, stop in enumerate(stops):
            at = slice(stop - int(counts[index]), stop)
            tensor = tensors[tensor_of[index]]
            run_gaps = gaps[at]
            ids = np.cumsum(run_gaps)
            if np.any(run_gaps[1:] == 0) or ids[-1] >= tensor.grid.n_tiles:
                raise Damaged(f"{tensor.name}: its tiles do not rise within its grid")
            if tensor.same != tensor_of[index] or tables[table_of[index]][0] != tensor.dtype:
                raise Damaged(f"{tensor.name}: tiles of a tied tensor, or tables of another dtype")
            tiles = Tiles(ids, modes[at], nnz[at], sizes[at])
            runs.append(Run(int(tensor_of[index]), int(table_of[index]), tiles))
        _refuse_twice(runs, tensors)
        return tuple(runs)

    def _offsets(self, buckets: np.ndarray, manifest: Manifest) -> np.ndarray:
        start = HEADER.size + self.manifest_size
        offsets = np.concatenate([[start], start + np.cumsum(buckets["size"], dtype=np.int64)])
        sizes = _join([run.tiles.sizes for run in manifest.runs], np.int64)
        cuts = np.concatenate([[0], np.cumsum(buckets["tiles"], dtype=np.int64)])
        if cuts[-1] != len(sizes) or np.any(buckets["tiles"] == 0):
            raise Damaged("the buckets do not hold the tiles of the directory")
        if np.any(np.add.reduceat(sizes, cuts[:-1]) != buckets["size"] if len(sizes) else False):
            raise Damaged("the buckets' sizes are not those of their tiles")
        if offsets[-1] != len(self.data):
            raise Damaged(f"the buckets end at {offsets[-1]}, the payload at {len(self.data)}")
        return offsets


def _pairs(cursor: _Cursor, count: int) -> list[Sums]:
    return [(int(a), int(b)) for a, b in cursor.column("<u4", 2 * count).reshape(count, 2)]


def _refuse_twice(runs: Sequence[Run], tensors: Sequence[Tensor]) -> None:
    by_tensor: dict[int, list[np.ndarray]] = {}
    for run in runs:
        by_tensor.setdefault(run.tensor, []).append(run.tiles.ids)
    for index, several in by_tensor.items():
        if len(several) > 1:
            ids = np.sort(np.concatenate(several))
            if np.any(ids[1:] == ids[:-1]):
                raise Damaged(f"{tensors[index].name}: a tile is there twice")


def merge(payloads: Sequence[Any]) -> tuple[Manifest, list[memoryview]]:
    """Joins the manifests and the bytes of several parts, tile by tile unchanged.

    Args:
      payloads: one of each process, in any order.

    Returns:
      The manifest, still a part, whose sums are those of all; and the bytes of its runs.

    Raises:
      CorruptPayload: a part is damaged or holds what another one holds too.
      ValueError: no parts, or not of one and the same encode.
    """
    read_parts = [read(payload) for payload in payloads]
    if not read_parts or not all(part.manifest.part for part in read_parts):
        raise ValueError("merge joins one or more parts, as `finish` gives them in each process")
    first = read_parts[0].manifest
    tensors = list(first.tensors)
    tables: list[tuple[str, bytes]] = []
    runs: list[Run] = []
    chunks: list[memoryview] = []
    for index, part in enumerate(read_parts):
        part.verify()
        manifest = part.manifest
        _check_alike(first, manifest)
        if index:
            tensors = [
                dataclasses.replace(
                    mine, target=_add(mine.target, its.target), base=_add(mine.base, its.base)
                )
                for mine, its in zip(tensors, manifest.tensors, strict=True)
            ]
        for run, starts, _ in part.located():
            runs.append(dataclasses.replace(run, table=run.table + len(tables)))
            stop = int(starts[-1]) + int(run.tiles.sizes[-1])
            chunks.append(part.data.data[int(starts[0]) : stop])
        tables.extend(manifest.tables)
    _refuse_twice(runs, tensors)
    return (
        dataclasses.replace(first, tensors=tuple(tensors), tables=tuple(tables), runs=tuple(runs)),
        chunks,
    )


def _check_alike(first: Manifest, other: Manifest) -> None:
    def identity(manifest: Manifest) -> Any:
        bare = [dataclasses.replace(t, target=None, base=None) for t in manifest.tensors]
        return manifest.kind, manifest.version, manifest.base_version, bare

    if identity(first) != identity(other):
        raise ValueError(
            "the parts are not of one encode: their versions, tensors or tiles differ; "
            "every process has to encode the same trees with the same arguments"
        )


def _add(mine: Sums | None, its: Sums | None) -> Sums:
    if mine is None or its is None:
        raise CorruptPayload("a part carries the sums of all its tensors; one has none")
    return (mine[0] + its[0]) % (1 << 32), (mine[1] + its[1]) % (1 << 32)
