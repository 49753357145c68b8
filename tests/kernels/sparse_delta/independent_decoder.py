"""A second decoder of sparse_delta payloads, in plain NumPy, written from `FORMAT.md` alone.

It shares no code with `kernels.sparse_delta`: where the two agree, the text is enough. It takes
whole payloads, checks seals, sizes and digests rather than every bound, and reads bit by bit.
"""

import re
import struct
from itertools import accumulate
from math import prod
from typing import Any

import google_crc32c
import numpy as np
import xxhash
import zstandard

Tree = dict[str, tuple[str, np.ndarray]]  # by name: the dtype's name, elements as integers
PrefixCode = dict[tuple[int, int], int]  # by length and bits: the symbol
MANTISSA = {"float32": 23, "bfloat16": 7, "float16": 10, ".*e5m2.*": 2, ".*e4m3.*": 3, ".*e3m4": 4}


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def fields(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def planes(self, width: int, count: int) -> np.ndarray:
        planes = np.frombuffer(self.take(width * count), np.uint8).reshape(width, count)
        return (planes.astype(np.int64) << np.arange(0, 8 * width, 8)[:, None]).sum(0)

    def unpacked(self, size: int, raw_size: int, packed: bool) -> bytes:
        data = self.take(size)
        return zstandard.ZstdDecompressor().decompress(data, raw_size) if packed else data

    def section(self) -> "Reader":
        method, raw_size, size = self.fields("BII")
        return Reader(self.unpacked(size, raw_size, method == 1))


class Bits:
    def __init__(self, data: bytes) -> None:
        self.bits, self.at = int.from_bytes(data, "little"), 0

    def raw(self, size: int) -> int:
        self.at += size
        return self.bits >> (self.at - size) & (1 << size) - 1

    def rice(self, step: int) -> int:
        zeros = next(z for z in range(25) if z == 24 or self.raw(1))
        return self.raw(24) if zeros == 24 else (zeros << step) + self.raw(step)

    def signed(self, step: int) -> int:
        v = self.rice(step)
        return -(v // 2) - 1 if v % 2 else v // 2

    def change(self, symbols: PrefixCode) -> int:
        size = code = 0
        while (size, code) not in symbols:
            size, code = size + 1, 2 * code + self.raw(1)
        token, sign = divmod(symbols[size, code], 2)
        x = max((token >> 2) - 1, 0)
        return 2 * ((token - 4 * x << x) + self.raw(x)) + sign


def tree_digest(tree: Tree) -> bytes:
    state, mask = xxhash.xxh3_128(), 0xFFFFFFFF
    for name, (dtype, values) in sorted(tree.items(), key=lambda item: item[0].encode()):
        u, i = values.ravel().astype(np.uint64), np.arange(values.size, dtype=np.uint64)
        a = ((u + 1) * 0x9E3779B1 ^ (i & mask) * 0x85EBCA77 + (i >> 32) * 0xC2B2AE3D) & mask
        a = (a ^ a >> 15) * 0x2C1B3C6D & mask
        a = a ^ a >> 13
        sums = [int(x.sum()) & mask for x in (a, (a ^ a >> 16) * 0x297A2D39 & mask)]
        state.update(struct.pack("<I", len(name.encode())) + name.encode())
        state.update(struct.pack("<B", len(dtype)) + dtype.encode())
        state.update(struct.pack(f"<B{values.ndim}Q2I", values.ndim, *values.shape, *sums))
    return state.digest()


def prefix_codes(r: Reader) -> list[PrefixCode]:
    codes: list[PrefixCode] = []
    for _ in range(8):
        lengths, code, own = r.take(r.take(1)[0]), 0, {}
        for size in range(1, 12):
            for symbol in (s for s, length in enumerate(lengths) if length == size):
                own[size, code], code = symbol, code + 1
            code *= 2
        codes.append(own if lengths else codes[-1])
    return codes


def entropy(stream: bytes, k: int, exponents: np.ndarray, table: bytes, w: int):
    """Positions and codes of the changes of a tile, class by class."""
    r, front, back = Reader(table), Bits(stream), Bits(stream[::-1])
    thresholds, shares, steps = r.fields("8B")[1:], r.fields("8H"), r.fields("8B")
    classes = np.searchsorted(thresholds, exponents, "right")
    left, positions, codes, symbols = k, [], [], prefix_codes(r)
    for c in range(8):
        expected = left * shares[c] // (sum(shares[c:]) or 1)
        count = left if c == 7 else expected + front.signed(expected.bit_length() >> 1)
        step, left = steps[c] + front.signed(0) if count else 0, left - count
        gaps = [0 if step == 31 else front.rice(step) for _ in range(count)]
        members = np.flatnonzero(classes == c)
        positions += [members[rank] for rank in accumulate(gaps, lambda rank, gap: rank + 1 + gap)]
        codes += [back.change(symbols[c]) for _ in range(count)]
    for _ in range(front.rice(0)):
        index, code = front.raw(20), front.raw(w)
        codes[index] = code
    assert -(-front.at // 8) - (-back.at // 8) == len(stream), "the strings meet"
    return np.array(positions), np.array(codes)


def decode_tile(mode: int, k: int, stream: bytes, old: np.ndarray, dtype: str, table: bytes):
    """The new elements of a tile, whose old ones are given row by row."""
    r, n, w = Reader(stream), old.size, 8 * old.itemsize
    m = next((m for name, m in MANTISSA.items() if re.fullmatch(name, dtype)), 0)
    new, top, mask = old.astype(np.int64), 1 << w - 1, (1 << w) - 1
    if mode in (0, 4):
        return np.frombuffer(stream, old.dtype) if mode else old
    if mode == 5:
        sizes = (r.fields("I")[0] for _ in range(w // 8))
        return Reader(b"".join(r.unpacked(s, n, s != n) for s in sizes)).planes(w // 8, n)
    if mode == 3:
        exponents = (new & (top - 1)) >> m if m else 0 * new
        positions, codes = entropy(stream, k, exponents, table, w)
    else:
        b, where = r.fields("B")[0], r.planes(1, -(-n // (256 if mode == 1 else 8)))
        if mode == 1:
            positions = np.repeat(256 * np.arange(len(where)), where) + r.planes(1, k)
        else:
            positions = np.flatnonzero(np.unpackbits(where.astype(np.uint8), bitorder="little"))
        bits = Bits(r.take(-(-k * b // 8)))
        codes = np.array([bits.raw(b) for _ in range(k)])
    was, c = new[positions], np.where(codes & 1, codes // 2 + 1, -(codes // 2) - 1)
    flip, minus = top if m or dtype.startswith("int") else 0, was & top if m else 0 * was
    rank = (was ^ np.where(minus, mask, flip)) + np.where(minus, -c, c)
    new[positions] = (rank ^ np.where((rank & top) | (m == 0), flip, mask)) & mask
    return new


def decode(payload: bytes, base: Tree | None) -> Tree:
    """The target of a payload, from the base; an anchor needs none."""
    r, target, tensors = Reader(payload), {}, []
    magic, version, size, total, seal = r.fields("8sIIQQ")
    assert (magic, version, total) == (b"SPDELTA\0", 2, len(payload)), "magic, version and size"
    m = Reader(r.take(size))
    assert seal == xxhash.xxh3_64_intdigest(payload[:24] + m.data), "seal"
    kind, _, n_tables, _, _, n, n_buckets, n_tiles = m.fields("BBHHHIIQ")
    _, _, base_digest, target_digest = m.fields("qq16s16s")
    assert kind == 0 or tree_digest(base or {}) == base_digest, "base digest"
    s = m.section()
    for index in range(n):
        name, dtype = s.take(*s.fields("H")).decode(), s.take(*s.fields("B")).decode()
        dims, s1, s2, rows, cols, tie, carried = s.fields("BBBIIIB")
        shape, _ = s.fields(f"{dims}Q"), s.take(8 * carried)
        view = prod(shape[:s1]), prod(shape[s1:s2]), prod(shape[s2:])
        width = re.search(r"\d+", dtype)
        old = np.zeros(shape, f"<u{int(width[0]) // 8 if width else 1}")
        old = base[name][1].copy() if kind and base else old
        target[name] = target[tensors[index - tie][0]] if tie else (dtype, old)
        tensors.append((name, dtype, target[name][1].reshape(view), rows, cols))
    s = m.section()
    tables = [s.take(s.take(1)[0]) and s.take(*s.fields("I")) for _ in range(n_tables)]
    tiles = m.section().planes(4, 6 * n_tiles).reshape(6, -1)
    tiles[2] = np.cumsum(tiles[2]) & 0xFFFFFFFF
    s, streams = m.section(), Reader(b"")
    for _, size, *sums in (s.fields("IIQI") for _ in range(n_buckets)):
        bucket = r.take(size)
        assert sums == [xxhash.xxh3_64_intdigest(bucket), google_crc32c.value(bucket)], "checksums"
        streams.data += bucket
    for tensor, table, number, mode, k, size in tiles.T.tolist():
        _, dtype, view, rows, cols = tensors[tensor]
        line, j = divmod(number, -(-view.shape[2] // cols))
        lead, i = divmod(line, -(-view.shape[1] // rows))
        box = view[lead, i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        new = decode_tile(mode, k, streams.take(size), box.ravel(), dtype, tables[table])
        box[...] = new.reshape(box.shape)
    assert streams.at == len(streams.data) == len(payload) - 32 - len(m.data), "nothing follows"
    assert tree_digest(target) == target_digest, "target digest"
    return target
