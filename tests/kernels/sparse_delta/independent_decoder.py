"""A second decoder of sparse_delta payloads, in plain NumPy, written from `FORMAT.md` alone.

It shares no code with `kernels.sparse_delta`, and met payloads before its author had read any of
that (the text was wrong on ties then, and was mended): where the two agree, the text is enough. It
takes whole payloads, checks seals, sizes, sums and digests rather than every bound, and is slow,
since symbols are decoded in Python.
"""

import re
import struct
from functools import cache
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

Tree = dict[str, tuple[str, NDArray[Any]]]  # by name: the dtype's name, elements as integers
Frequencies = tuple[list[int], list[int], list[int]]  # f(s), F(s), and the symbol of every slot
Table = tuple[tuple[int, ...], tuple[int, ...], list[Frequencies]]  # thresholds, weights, classes
MANTISSA = {"float32": 23, "bfloat16": 7, "float16": 10, ".*e5m2.*": 2, ".*e4m3.*": 3, ".*e3m4": 4}


class Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    splits: tuple[int, int]
    tile: tuple[int, int]
    tie: int
    sums: tuple[int, int] | None


class Manifest(NamedTuple):
    kind: int
    version: int | None
    base_version: int | None
    base_digest: bytes
    target_digest: bytes
    tensors: list[Tensor]
    tables: list[tuple[str, Table | None]]
    tiles: list[list[int]]  # each: tensor, table, number, mode, changed elements, bytes
    buckets: list[tuple[int, ...]]  # each: tiles, bytes, xxh3-64, crc32c


def width(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def fields(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def planes(self, width: int, count: int) -> NDArray[np.int64]:
        planes = np.frombuffer(self.take(width * count), np.uint8).reshape(width, count)
        return (planes.astype(np.int64) << np.arange(0, 8 * width, 8)[:, None]).sum(0)

    def bits(self, count: int) -> NDArray[np.int64]:
        bits = np.unpackbits(self.planes(1, -(-count // 8)).astype(np.uint8), bitorder="little")
        assert not bits[count:].any(), "filled up with zero bits"
        return bits[:count].astype(np.int64)

    def section(self) -> "Reader":
        method, raw, stored = self.fields("BII")
        data = self.take(stored)
        if method == 1:
            data = zstandard.ZstdDecompressor().decompress(data, raw, allow_extra_data=False)
        assert (method in (0, 1), len(data)) == (True, raw), "method and raw size of a section"
        return Reader(data)

    def end(self) -> None:
        assert self.at == len(self.data), "nothing follows the last field"


def tree_digest(tree: Tree) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The digest of a tree, and the sums S1 and S2 of each of its tensors."""
    state, sums, mask = xxhash.xxh3_128(), {}, 0xFFFFFFFF
    for name, (dtype, values) in sorted(tree.items(), key=lambda item: item[0].encode()):
        u, i = values.ravel().astype(np.uint64), np.arange(values.size, dtype=np.uint64)
        a = ((u + 1) * 0x9E3779B1 ^ (i & mask) * 0x85EBCA77 + (i >> 32) * 0xC2B2AE3D) & mask
        a = (a ^ a >> 15) * 0x2C1B3C6D & mask
        a = a ^ a >> 13
        sums[name] = int(a.sum()) & mask, int(((a ^ a >> 16) * 0x297A2D39 & mask).sum()) & mask
        state.update(struct.pack("<I", len(name.encode())) + name.encode())
        state.update(struct.pack("<B", len(dtype)) + dtype.encode())
        state.update(struct.pack(f"<B{values.ndim}Q2I", values.ndim, *values.shape, *sums[name]))
    return state.digest(), sums


def frequencies(f: list[int]) -> Frequencies:
    f = f + [0] * (255 - len(f)) + [4096 - sum(f)]  # the escape has what is missing
    return f, [0, *accumulate(f)], np.repeat(np.arange(256), f).tolist()


@cache
def gap_frequencies(n: int, k: int) -> Frequencies:
    r = ((n - k) << 32) // k
    t = r.bit_length() - 1
    level = min(max(2 * (t - 32) + ((r << 15) >> t >= 46341) + 16, 0), 56)
    mean = (7223245206 if level % 2 else 5107605667) << (level - 16) // 2 + 8

    def tail(a: int) -> int:
        power, base = 1 << 64, (mean << 64) // ((1 << 40) + mean)
        for bit in range(a.bit_length()):
            power, base = power * base >> 64 if a >> bit & 1 else power, base * base >> 64
        return power

    tails = [tail(t - 4 * x << x) for t in range(77) for x in [max((t >> 2) - 1, 0)]]
    shares = [here - beyond for here, beyond in pairwise(tails)]
    f = [(4096 * share + (1 << 63)) >> 64 for share in shares]
    rare = tails[76] + sum(share for share, count in zip(shares, f, strict=True) if count == 0)
    f[f.index(max(f))] += 4095 - (4096 * rare >> 64) - sum(f)
    return frequencies(f)


def read_table(data: bytes) -> Table | None:
    r, classes = Reader(data), []
    if r.fields("B") == (0,):
        return r.end()
    thresholds, weights = r.fields("7B"), r.fields("8H")
    for _ in range(8):
        (size,), f = r.fields("B"), []
        while len(f) < size:
            (v,) = r.fields("B")
            v = v - 128 + 128 * r.fields("B")[0] if v >= 128 else v
            f += [v] if v else [0] * (1 + r.fields("B")[0])
        classes.append(frequencies(f) if size else classes[-1])
    return r.end() or (thresholds, weights, classes)


def entropy(stream: bytes, k: int, classes: NDArray[Any], table: Table, w: int):
    """Positions and codes of the changes of a tile, class by class."""
    at, end = 0, len(stream) - (4 if k < 1024 else 8)
    states = [x for (x,) in struct.iter_unpack("<I", stream[end:])][::-1]  # that of gaps first

    def raw(size: int) -> int:
        nonlocal at
        at += size
        field = int.from_bytes(stream[at - size >> 3 : at + 7 >> 3], "little")
        return field >> (at - size & 7) & (1 << size) - 1

    def symbol(which: int, f: Frequencies) -> int:
        nonlocal end
        x, slot = states[which] >> 12, states[which] & 4095
        s = f[2][slot]
        x = f[0][s] * x + slot - f[1][s]
        if x < 1 << 16:
            end -= 2
            x = x << 16 | int.from_bytes(stream[end : end + 2], "little")
        states[which] = x
        return s

    def number(token: int) -> int:
        x = max((token >> 2) - 1, 0)
        return (token - 4 * x << x) + raw(x)

    sizes, left, counts = np.bincount(classes, minlength=8).tolist(), k, []
    expected = [n * w for n, w in zip(sizes, table[1], strict=True)]
    for c in range(7):
        e = left * expected[c] // (sum(expected[c:]) or 1)
        zeros = next(d for d in range(23) if raw(1))
        h = e.bit_length() >> 1
        f = ((1 << zeros) + raw(zeros) - 1 << h) + raw(h)
        counts.append(e - (f + 1) // 2 if f % 2 else e + f // 2)
        left -= counts[c]
    positions, codes = [], []
    for c, (size, count) in enumerate(zip(sizes, [*counts, left], strict=True)):
        members, rank = np.flatnonzero(classes == c).tolist(), -1
        for _ in range(count):
            s = symbol(0, gap_frequencies(size, count)) if count < size else 0
            rank += 1 + (raw(20) if s == 255 else number(s))
            positions.append(members[rank])
            s = symbol(-1, table[2][c])
            codes.append(raw(w) if s == 255 else 2 * number(s >> 1) + (s & 1))
    assert (set(states), end) == ({1 << 16}, -(-at // 8)), "everything is used up"
    return np.array(positions), np.array(codes)


def decode_tile(mode: int, k: int, stream: bytes, old: NDArray[np.int64], dtype: str, table: Any):
    """The new elements of a tile, whose old ones are given row by row."""
    r, n, w = Reader(stream), old.size, width(dtype)
    m = next((m for name, m in MANTISSA.items() if re.fullmatch(name, dtype)), 0)
    if mode in (0, 4):
        return np.frombuffer(stream, f"<u{w // 8}") if mode else old
    top, mask = 1 << w - 1, (1 << w) - 1
    if mode == 3:
        exponents = (old & (top - 1)) >> m if m else 0 * old
        classes = np.searchsorted(table[0], exponents, side="right")
        positions, codes = entropy(stream, k, classes, table, w)
    else:
        (b,) = r.fields("B")
        if mode == 1:
            counts = r.planes(1, -(-n // 256))
            positions = np.repeat(256 * np.arange(len(counts)), counts) + r.planes(1, k)
        else:
            positions = np.flatnonzero(r.bits(n))
        codes = r.bits(k * b).reshape(k, b) @ (1 << np.arange(b))
        full = codes == (mask if b == w else (1 << b) - 1)
        codes[full] = np.frombuffer(r.take(int(full.sum()) * w // 8), f"<u{w // 8}")
        r.end()
    new, was, c = old.copy(), old[positions], np.where(codes & 1, codes // 2 + 1, -(codes // 2) - 1)
    if m:
        rank = (was ^ np.where(was & top, mask, top)) + np.where(was & top, -c, c)
        new[positions] = (rank ^ np.where(rank & top, top, mask)) & mask
    else:
        flip = top if dtype.startswith("int") else 0
        new[positions] = ((was ^ flip) + c ^ flip) & mask
    return new


def read_tensors(r: Reader, n: int) -> tuple[list[Tensor], list[str]]:
    names = [r.take(size) for size in r.fields(f"{n}H")]
    dtypes = [r.take(*r.fields("B")).decode("ascii") for _ in range(*r.fields("B"))]
    kinds, ranks = [dtypes[i] for i in r.fields(f"{n}B")], r.fields(f"{n}B")
    shapes = [r.fields(f"{rank}Q") for rank in ranks]
    splits, boxes = [r.fields("2B") for _ in names], [r.fields("2I") for _ in names]
    steps, carried = r.fields(f"{n}I"), r.fields(f"{n}B")
    sums = [r.fields("2I") if flag else None for flag in carried]
    ties = [i - step for i, step in enumerate(steps)]
    r.end()
    assert names == sorted(set(names)), "names rise strictly"
    columns = zip(map(bytes.decode, names), kinds, shapes, splits, boxes, ties, sums, strict=True)
    return [Tensor(*row) for row in columns], dtypes


def read_manifest(payload: bytes) -> Manifest:
    r = Reader(payload)
    magic, version, manifest_size, size, seal = r.fields("8sIIQQ")
    assert (magic, version, size) == (b"SPDELTA\0", 1, len(payload)), "magic, version and size"
    r = Reader(r.take(manifest_size))
    assert seal == xxhash.xxh3_64_intdigest(payload[:24] + r.data), "seal"
    kind, flags, n_tables, part, parts, n, n_runs, n_buckets, n_tiles = r.fields("BBHHHIIIQ")
    versions, (base, target) = r.fields("qq"), r.fields("16s16s")
    assert (kind >> 1, flags >> 2, part, parts) == (0, 0, 0, 0), "a whole payload"
    tensors, dtypes = read_tensors(r.section(), n)
    section, tables = r.section(), []
    for _ in range(n_tables):
        dtype, size = section.fields("BI")
        tables.append((dtypes[dtype], read_table(section.take(size))))
    section.end()
    section = r.section()
    runs = [section.planes(size, n_runs) for size in (4, 2, 4)]
    steps, *columns = (section.planes(size, n_tiles) for size in (4, 1, 4, 4))
    section.end()
    numbers = [np.cumsum(run) for run in np.split(steps, np.cumsum(runs[2])[:-1])]
    owners = [np.repeat(column, runs[2]) for column in runs[:2]]
    tiles = np.stack([*owners, np.concatenate([steps[:0], *numbers]), *columns], 1).tolist()
    section = r.section()
    buckets = [section.fields("IIQI") for _ in range(n_buckets)]
    section.end()
    r.end()
    own, before = (v if flags >> i & 1 else None for i, v in enumerate(versions))
    return Manifest(kind, own, before, base, target, tensors, tables, tiles, buckets)


def decode(payload: bytes, base: Tree | None) -> Tree:
    """The target of a payload, from the base; an anchor needs none.

    Raises:
      AssertionError: the payload, or the base, is not what it should be.
    """
    manifest = read_manifest(payload)
    (manifest_size,), tiles, streams = struct.unpack_from("<I", payload, 12), manifest.tiles, []
    r = Reader(payload)
    r.take(32 + manifest_size)
    for count, size, xxh3, crc32c in manifest.buckets:
        bucket = Reader(r.take(size))
        assert xxh3 == xxhash.xxh3_64_intdigest(bucket.data), "xxh3-64 of a bucket"
        assert crc32c == google_crc32c.value(bucket.data), "crc32c of a bucket"
        streams += [bucket.take(tile[5]) for tile in tiles[len(streams) : len(streams) + count]]
        bucket.end()
    r.end()
    assert len(streams) == len(tiles), "the tiles of the buckets add up to all"
    if manifest.kind == 1:
        assert tree_digest(base or {})[0] == manifest.base_digest, "base digest"
    target = {}
    for t in manifest.tensors:
        zeros = np.zeros(t.shape, f"<u{width(t.dtype) // 8}")
        target[t.name] = t.dtype, base[t.name][1].copy() if manifest.kind and base else zeros
    for (tensor, table, number, mode, k, _), stream in zip(tiles, streams, strict=True):
        t = manifest.tensors[tensor]
        s1, s2 = t.splits
        (rows, cols), (height, breadth) = (prod(t.shape[s1:s2]), prod(t.shape[s2:])), t.tile
        line, j = divmod(number, -(-cols // breadth))
        lead, i = divmod(line, -(-rows // height))
        view = target[t.name][1].reshape(-1, rows, cols)[lead]
        box = view[i * height : (i + 1) * height, j * breadth : (j + 1) * breadth]
        assert manifest.kind or mode == 4, "an anchor has dense tiles only"
        old, coder = box.astype(np.int64).ravel(), manifest.tables[table][1]
        box[...] = decode_tile(mode, k, stream, old, t.dtype, coder).reshape(box.shape)
    target = {t.name: target[manifest.tensors[t.tie].name] for t in manifest.tensors}
    digest, sums = tree_digest(target)
    assert digest == manifest.target_digest, "target digest"
    assert all(t.sums in (None, sums[t.name]) for t in manifest.tensors), "sums"
    return target
