"""The bytes of a payload, written: header, manifest, buckets. FORMAT.md describes them.

    header (32 bytes) | manifest | bucket | bucket | …

What is written here is read by `parse`; what a tile's bytes mean is the business of `codec`.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import xxhash

from kernels.sparse_delta import frames
from kernels.sparse_delta.tiles import TileGrid

MAGIC = b"SPDELTA\0"
FORMAT_VERSION = 2
HEADER = struct.Struct("<8sIIQQ")  # magic, format version, manifest size, payload size, xxh3-64
ANCHOR, DELTA = 0, 1
# What a reader of some tiles fetches too much, at either end of a stretch (`needed` asks for
# neighbouring buckets in one); each costs 20 bytes.
BUCKET_BYTES = 256 << 10
# Sums of tensors below this size are cheaper to make again than to carry: 8 bytes beside 1 KiB
# or less would break the bound on the size of a payload.
SUMS_FROM_ELEMENTS = 1024

# kind, flags, tables, part, parts, tensors, buckets, tiles, version, base version, roots
FIXED = struct.Struct("<BBHHHIIQqq16s16s")
# dimensions, splits, tile, tie, whether sums are carried
TENSOR = struct.Struct("<BBBIIIB")
DIRECTORY_COLUMNS = 6  # tensor, table, number, mode, changes, bytes of each tile
HAS_VERSION, HAS_BASE_VERSION = 1, 2
SECTION = struct.Struct("<BII")  # method, raw bytes, stored bytes
STORED, ZSTD = 0, 1
_ZSTD_LEVEL = 3
_COMPRESSED_FROM = 64  # bytes of a section
# A section may be no more than this many times the payload, plus a floor: a few bytes of zstd can
# ask for gigabytes. The writer keeps to it too.
_EXPANSION, _EXPANSION_FLOOR = 256, 1 << 16
BUCKET = np.dtype([("tiles", "<u4"), ("size", "<u4"), ("xxh3", "<u8"), ("crc32c", "<u4")])
_MAX_NAME_BYTES = 1 << 14

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
      part: of one process's share its number and how many there are; None of a whole payload.
      version: of the target, if the caller numbers versions.
      base_version: of the base, likewise.
      base_root: tree digest of the old weights; zeros in an anchor and in a part.
      target_root: tree digest of the new weights; zeros in a part.
      tensors: by rising name.
      tables: dtype and bytes of the coder's tables.
      runs: in the order of the buckets' bytes.
    """

    kind: int
    part: tuple[int, int] | None
    version: int | None
    base_version: int | None
    base_root: bytes
    target_root: bytes
    tensors: tuple[Tensor, ...]
    tables: tuple[tuple[str, bytes], ...]
    runs: tuple[Run, ...]


def write(manifest: Manifest, chunks: Sequence[memoryview]) -> bytes:
    """Puts a payload together.

    Args:
      manifest: complete.
      chunks: the runs' bytes, one chunk a run.
    """
    sizes = join([run.tiles.sizes for run in manifest.runs], np.uint32)
    cuts = _cut(sizes)
    buckets = np.zeros(len(cuts) - 1, BUCKET)
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


def join(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)


def _manifest_bytes(manifest: Manifest, buckets: np.ndarray, body: int) -> bytes:
    flags = HAS_VERSION * (manifest.version is not None)
    flags |= HAS_BASE_VERSION * (manifest.base_version is not None)
    fixed = FIXED.pack(
        manifest.kind,
        flags,
        len(manifest.tables),
        *(manifest.part or (0, 0)),
        len(manifest.tensors),
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
    if len(raw) >= _COMPRESSED_FROM:
        packed = frames.pack(raw, _ZSTD_LEVEL)
        if len(packed) < len(raw) <= expansion_limit(body + len(packed)):
            return SECTION.pack(ZSTD, len(raw), len(packed)) + packed
    return SECTION.pack(STORED, len(raw), len(raw)) + raw


def expansion_limit(payload_bytes: int) -> int:
    return _EXPANSION_FLOOR + _EXPANSION * payload_bytes


def _tensors_bytes(manifest: Manifest) -> bytes:
    out = bytearray()
    for index, tensor in enumerate(manifest.tensors):
        name, dtype, shape = tensor.name.encode(), tensor.dtype.encode(), tensor.grid.shape
        if len(name) >= _MAX_NAME_BYTES:
            raise ValueError(f"a leaf's name must be below {_MAX_NAME_BYTES} bytes: {name!r}")
        out += struct.pack("<H", len(name)) + name + bytes([len(dtype)]) + dtype
        carried = tensor.target is not None
        tie = index - tensor.same
        out += TENSOR.pack(len(shape), *tensor.grid.splits, *tensor.grid.tile, tie, carried)
        out += struct.pack(f"<{len(shape)}Q", *shape)
        for sums in (tensor.target, tensor.base if manifest.part is not None else None):
            out += struct.pack("<II", *sums) if sums is not None else b""
    return bytes(out)


def _tables_bytes(manifest: Manifest) -> bytes:
    return b"".join(
        bytes([len(dtype)]) + dtype.encode() + struct.pack("<I", len(table)) + table
        for dtype, table in manifest.tables
    )


def _directory_bytes(manifest: Manifest) -> bytes:
    runs = manifest.runs
    counts = [len(run.tiles) for run in runs]
    columns = (
        np.repeat([run.tensor for run in runs], counts),
        np.repeat([run.table for run in runs], counts),
        np.diff(join([run.tiles.ids for run in runs], np.int64), prepend=0) & 0xFFFFFFFF,
        join([run.tiles.modes for run in runs], np.uint8),
        join([run.tiles.nnz for run in runs], np.uint32),
        join([run.tiles.sizes for run in runs], np.uint32),
    )
    # Differences of neighbours are 1, and bytes of equal weight lie together: zstd likes both.
    entries = np.stack([column.astype("<u4") for column in columns])
    return entries.reshape(-1, 1).view(np.uint8).T.tobytes()
