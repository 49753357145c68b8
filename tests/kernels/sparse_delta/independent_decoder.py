"""A second decoder of sparse_delta payloads, in plain NumPy, written from `FORMAT.md` alone.

It shares no code with `kernels.sparse_delta`: where the two agree, the text is enough. It takes
whole payloads, checks seals, sizes and digests rather than every bound, and reads bit by bit.
"""

import re
import struct
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import xxhash
import zstandard

Tree = dict[str, tuple[str, np.ndarray]]  # by name: the dtype's name, elements as integers
MANTISSA = {"float32": 23, "bfloat16": 7, "float16": 10, ".*e5m2.*": 2, ".*e4m3.*": 3, ".*e3m4": 4}


class Manifest(NamedTuple):
    fixed: tuple[Any, ...]
    tensors: list[tuple[Any, ...]]  # each: name, dtype, shape, splits, tile, tie
    tables: list[bytes]
    tiles: list[tuple[int, ...]]  # each: tensor, table, number, mode, changes, bytes
    buckets: list[tuple[int, ...]]  # each: tiles, bytes, xxh3-64, crc32c


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

    def packed(self, size: int, count: int, method: int) -> bytes:
        data = self.take(size)
        return zstandard.ZstdDecompressor().decompress(data, count) if method else data

    def section(self) -> "Reader":
        method, raw, stored = self.fields("BII")
        return Reader(self.packed(stored, raw, method))


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

    def code(self, symbols: dict[tuple[int, int], int]) -> int:
        size = code = 0
        while (size, code) not in symbols:
            size, code = size + 1, 2 * code + self.raw(1)
        token, z = divmod(symbols[size, code], 2)
        x = max((token >> 2) - 1, 0)
        return 2 * ((token - 4 * x << x) + self.raw(x)) + z


def tree_digest(tree: Tree) -> bytes:
    state, mask = xxhash.xxh3_128(), 0xFFFFFFFF
    for name, (dtype, values) in sorted(tree.items(), key=lambda item: item[0].encode()):
        u, i = values.ravel().astype(np.uint64), np.arange(values.size, dtype=np.uint64)
        a = ((u + 1) * 0x9E3779B1 ^ (i & mask) * 0x85EBCA77 + (i >> 32) * 0xC2B2AE3D) & mask
        a = (a ^ a >> 15) * 0x2C1B3C6D & mask
        a = a ^ a >> 13
        b = (a ^ a >> 16) * 0x297A2D39 & mask
        sums = (int(a.sum()) & mask, int(b.sum()) & mask)
        state.update(struct.pack("<I", len(name.encode())) + name.encode())
        state.update(struct.pack("<B", len(dtype)) + dtype.encode())
        state.update(struct.pack(f"<B{values.ndim}Q2I", values.ndim, *values.shape, *sums))
    return state.digest()


def read_prefix_codes(r: Reader) -> list[dict[tuple[int, int], int]]:
    codes: list[dict[tuple[int, int], int]] = []
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
    _, *thresholds = r.fields("8B")
    shares, steps, symbols = r.fields("8H"), r.fields("8B"), read_prefix_codes(r)
    classes, left, positions, codes = np.searchsorted(thresholds, exponents, "right"), k, [], []
    for c in range(8):
        expected = left * shares[c] // (sum(shares[c:]) or 1)
        count = left if c == 7 else expected + front.signed(expected.bit_length() >> 1)
        step, left = steps[c] + front.signed(0) if count else 0, left - count
        gaps = [0 if step == 31 else front.rice(step) for _ in range(count)]
        members = np.flatnonzero(classes == c)
        positions += [members[rank] for rank in accumulate(gaps, lambda a, b: a + 1 + b)]
        codes += [back.code(symbols[c]) for _ in range(count)]
    for _ in range(front.rice(0)):
        codes[front.raw(20)] = front.raw(w)
    assert -(-front.at // 8) - (-back.at // 8) == len(stream), "the strings meet"
    return np.array(positions), np.array(codes)


def decode_tile(mode: int, k: int, stream: bytes, old: np.ndarray, dtype: str, table: bytes):
    """The new elements of a tile, whose old ones are given row by row."""
    r, n, w = Reader(stream), old.size, 8 * old.itemsize
    old = old.astype(np.int64)
    if mode in (0, 4):
        return np.frombuffer(stream, f"<u{w // 8}") if mode else old
    if mode == 5:
        sizes = (r.fields("I")[0] for _ in range(w // 8))
        return Reader(b"".join(r.packed(s, n, s != n) for s in sizes)).planes(w // 8, n)
    m = next((m for name, m in MANTISSA.items() if re.fullmatch(name, dtype)), 0)
    top, mask = 1 << w - 1, (1 << w) - 1
    if mode == 3:
        exponents = (old & (top - 1)) >> m if m else 0 * old
        positions, codes = entropy(stream, k, exponents, table, w)
    else:
        b, counts = r.take(1)[0], r.take(-(-n // (256 if mode == 1 else 8)))
        if mode == 1:
            blocks = np.repeat(np.arange(len(counts)), list(counts))
            positions = 256 * blocks + np.frombuffer(r.take(k), np.uint8)
        else:
            positions = np.flatnonzero(np.unpackbits(np.array([*counts], "u1"), bitorder="little"))
        bits = Bits(r.take(-(-k * b // 8)))
        codes = np.array([bits.raw(b) for _ in range(k)])
    was, c = old[positions], np.where(codes & 1, codes // 2 + 1, -(codes // 2) - 1)
    if m:
        rank = (was ^ np.where(was & top, mask, top)) + np.where(was & top, -c, c)
        old[positions] = (rank ^ np.where(rank & top, top, mask)) & mask
    else:
        flip = top if dtype.startswith("int") else 0
        old[positions] = ((was ^ flip) + c ^ flip) & mask
    return old
