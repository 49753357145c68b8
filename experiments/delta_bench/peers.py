"""The peers: how others send sparse updates, from their published layouts.

Each is a whole round trip, at the best speed that NumPy, numba and the C library named in the
layout give one thread; all sparse ones share the same compiled search for changes. In their favour
they send no checksums, and a JSON header of names and counts instead of pickles or safetensors.
The sources are SparseRL-Sync (arXiv:2605.07330), PULSE (arXiv:2602.03839) and its code
one-covenant/grail, slime's delta checkpoints (THUDM/slime#2181) and NeMo-RL's remote sparse refit.
"""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zstandard

from experiments.delta_bench import loops
from experiments.delta_bench.codec import Codec, over_tensors
from experiments.delta_bench.pairs import Bits

_PAD = 256
MODELLED_VALUE_SHARE = 0.6
"""α of SparseRL-Sync's model of compressed values, at its best: bits of a bf16 value kept."""
MODELLED_BITS = 16 + MODELLED_VALUE_SHARE * 16
"""Bits per change that SparseRL-Sync models for int16 gaps and entropy-coded values."""


def _join(header: Any, sections: Sequence[Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([len(text).to_bytes(4, "little"), text, *map(memoryview, sections)])


def _split(payload: Any) -> tuple[Any, memoryview]:
    view = memoryview(payload)
    end = 4 + int.from_bytes(view[:4], "little")
    return json.loads(bytes(view[4:end])), view[end:]


class _Sections:
    """Reads arrays one after the other."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def take(self, dtype: Any, count: int) -> np.ndarray:
        start = self._at
        self._at += np.dtype(dtype).itemsize * count
        return np.frombuffer(self._view[start : self._at], dtype)


def _flat(tensors: Bits) -> dict[str, np.ndarray]:
    return {name: x.reshape(-1) for name, x in tensors.items()}


def _compress(data: Any, threads: int = 1) -> bytes:
    return zstandard.ZstdCompressor(level=1, threads=threads if threads > 1 else 0).compress(data)


def _decompress(data: Any) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def _positions(old: Bits, new: Bits, threads: int) -> dict[str, np.ndarray]:
    return over_tensors(loops.changed, _flat(old), _flat(new), threads=threads)


def _rebuilt(old: Bits, parts: Mapping[str, Any], put: Any, threads: int) -> dict[str, np.ndarray]:
    """Copies of all tensors; `put(flat copy, part)` writes the changed ones."""

    def one(before: np.ndarray, part: Any) -> np.ndarray:
        out = before.copy()
        if part is not None:
            put(out.reshape(-1), part)
        return out

    return over_tensors(one, old, {name: parts.get(name) for name in old}, threads=threads)


# SparseRL-Sync as released: the model's changes in one array of int32 indices and one of bf16
# values, each padded to 256 elements; tensors without a change are left out.


def _encode_coo(old: Bits, new: Bits, threads: int) -> bytes:
    found = {n: p for n, p in _positions(old, new, threads).items() if p.size}
    flat = _flat(new)
    values = over_tensors(loops.take, {n: flat[n] for n in found}, found, threads=threads)
    pad = -sum(p.size for p in found.values()) % _PAD
    sections = [*found.values(), np.zeros(pad, np.int32), *values.values(), np.zeros(pad, "<u2")]
    return _join([[name, p.size] for name, p in found.items()], sections)


def _apply_coo(old: Bits, payload: Any, threads: int) -> dict[str, np.ndarray]:
    header, body = _split(payload)
    total = sum(count for _, count in header)
    total += -total % _PAD
    positions = np.frombuffer(body[: 4 * total], "<i4")
    values = np.frombuffer(body[4 * total :], "<u2")
    parts, at = {}, 0
    for name, count in header:
        parts[name] = positions[at : at + count], values[at : at + count]
        at += count
    return _rebuilt(old, parts, lambda out, part: loops.put(out, *part), threads)


# SparseRL-Sync as modelled: int16 gaps, entropy-coded values. The paper names no coder; zstd-1 on
# each byte plane is Huffman coding of the plane, where a plane gains from it. Gaps that do not fit
# are escaped, without which the layout is not lossless.


def _encode_modelled(old: Bits, new: Bits, threads: int) -> bytes:
    found = _positions(old, new, threads)
    gaps = over_tensors(loops.narrow_gaps, found, threads=threads)
    values = over_tensors(loops.take, _flat(new), found, threads=threads)
    planes = np.concatenate(list(values.values())).view(np.uint8).reshape(-1, 2)
    frames = [_compress(np.ascontiguousarray(planes[:, i]), threads) for i in (0, 1)]
    header = [[[n, g.size, large.size] for n, (g, large) in gaps.items()], len(frames[0])]
    arrays = [*(g for g, _ in gaps.values()), *(large for _, large in gaps.values())]
    return _join(header, [*arrays, *frames])


def _apply_modelled(old: Bits, payload: Any, threads: int) -> dict[str, np.ndarray]:
    (tensors, low_bytes), body = _split(payload)
    sections = _Sections(body)
    gaps = [sections.take("<u2", count) for _, count, _ in tensors]
    large = [sections.take("<u4", count) for _, _, count in tensors]
    used = sum(2 * count + 4 * escaped for _, count, escaped in tensors)
    frames = body[used : used + low_bytes], body[used + low_bytes :]
    low, high = (np.frombuffer(_decompress(frame), np.uint8) for frame in frames)
    parts, at = {}, 0
    for (name, count, _), narrow, wide in zip(tensors, gaps, large, strict=True):
        parts[name] = narrow, wide, low[at : at + count], high[at : at + count]
        at += count
    return _rebuilt(old, parts, lambda out, part: loops.put_by_narrow_gaps(out, *part), threads)


# PULSE v3.1: for each tensor row gaps, column gaps (absolute in a new row) and new values; rows as
# uint8 and columns as uint16 where they fit, else int32; everything in one zstd-1 frame.


def _columns(shape: Sequence[int]) -> int:
    return max(1, math.prod(shape[1:])) if len(shape) > 1 else max(1, math.prod(shape))


def _encode_pulse(old: Bits, new: Bits, threads: int) -> bytes:
    def one(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        flat = after.reshape(-1)
        positions = loops.changed(before.reshape(-1), flat)
        rows, cols = loops.rows_and_columns(positions, _columns(after.shape))
        if rows.max(initial=0) < 1 << 8:
            rows = rows.astype(np.uint8)
        if cols.max(initial=0) < 1 << 16:
            cols = cols.astype(np.uint16)
        return rows, cols, loops.take(flat, positions)

    found = over_tensors(one, old, new, threads=threads)
    header = [
        [name, list(new[name].shape), v.size, r.dtype.str, c.dtype.str]
        for name, (r, c, v) in found.items()
    ]
    return _compress(_join(header, [x for part in found.values() for x in part]), threads)


def _apply_pulse(old: Bits, payload: Any, threads: int) -> dict[str, np.ndarray]:
    header, body = _split(_decompress(payload))
    sections, parts = _Sections(body), {}
    for name, shape, count, row_type, column_type in header:
        arrays = [sections.take(dtype, count) for dtype in (row_type, column_type, "<u2")]
        parts[name] = _columns(shape), *arrays
    return _rebuilt(old, parts, lambda out, part: loops.put_by_rows(out, *part), threads)


# slime: XOR of whole tensors, a zstd-1 frame each.


def _encode_dense_xor(old: Bits, new: Bits, threads: int) -> bytes:
    frames = over_tensors(
        lambda before, after: _compress(np.bitwise_xor(before, after)), old, new, threads=threads
    )
    return _join([[name, len(frame)] for name, frame in frames.items()], list(frames.values()))


def _apply_dense_xor(old: Bits, payload: Any, threads: int) -> dict[str, np.ndarray]:
    def one(before: np.ndarray, frame: memoryview) -> np.ndarray:
        return before ^ np.frombuffer(_decompress(frame), "<u2").reshape(before.shape)

    return over_tensors(one, old, _frames(payload), threads=threads)


def _frames(payload: Any) -> dict[str, memoryview]:
    header, body = _split(payload)
    frames, at = {}, 0
    for name, size in header:
        frames[name] = body[at : at + size]
        at += size
    return frames


# NeMo-RL: for each tensor gaps as uint16 (uint32 where one does not fit) and XORed values, then
# zstd-1 over all of them; a second form splits both streams into byte planes first, which is no
# published layout but what zstd makes the most of.


def _encode_gaps(old: Bits, new: Bits, threads: int, *, planes: bool) -> bytes:
    def one(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions = loops.changed(before, after)
        gaps, largest = loops.gaps_of(positions)
        narrow = gaps.astype(np.uint16) if largest < 1 << 16 else gaps
        return narrow, loops.take_xor(before, after, positions)

    found = over_tensors(one, _flat(old), _flat(new), threads=threads)
    header = [[name, v.size, g.dtype.str] for name, (g, v) in found.items()]
    arrays = [x for part in found.values() for x in part]
    if planes:
        arrays = [np.ascontiguousarray(x.view("u1").reshape(-1, x.itemsize).T) for x in arrays]
    return _compress(_join(header, arrays), threads)


def _apply_gaps(old: Bits, payload: Any, threads: int, *, planes: bool) -> dict[str, np.ndarray]:
    header, body = _split(_decompress(payload))
    sections, parts = _Sections(body), {}

    def array(dtype: str, count: int) -> np.ndarray:
        if not planes:
            return sections.take(dtype, count)
        size = np.dtype(dtype).itemsize
        bytes_ = sections.take("u1", size * count).reshape(size, count)
        return np.ascontiguousarray(bytes_.T).view(dtype).reshape(-1)

    for name, count, gap_type in header:
        parts[name] = array(gap_type, count), array("<u2", count)
    return _rebuilt(old, parts, lambda out, part: loops.put_xor_by_gaps(out, *part), threads)


# blosc2: XOR of whole tensors, bits transposed within blocks, zstd at Blosc's level 1.


def _encode_blosc(old: Bits, new: Bits, threads: int) -> bytes:
    import blosc2

    options: dict[str, Any] = {
        "typesize": 2, "clevel": 1, "nthreads": threads, "codec": blosc2.Codec.ZSTD,
        "filters": [blosc2.Filter.BITSHUFFLE],
    }  # fmt: skip
    frames = {
        name: blosc2.compress2(np.bitwise_xor(before, new[name]), **options)
        for name, before in old.items()
    }
    return _join([[name, len(frame)] for name, frame in frames.items()], list(frames.values()))


def _apply_blosc(old: Bits, payload: Any, threads: int) -> dict[str, np.ndarray]:
    import blosc2

    out, options = {}, dict[str, Any](nthreads=threads)
    for name, frame in _frames(payload).items():
        xor = np.empty_like(old[name])
        blosc2.decompress2(bytes(frame), dst=xor, **options)
        out[name] = np.bitwise_xor(xor, old[name], out=xor)
    return out


# Fixed width: blocks of 256 elements with a count, byte offsets and 4-bit steps; no entropy coder.


def _encode_fixed(old: Bits, new: Bits, threads: int) -> bytes:
    def one(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, ...]:
        return loops.fixed_width(before, after, loops.changed(before, after))

    found = over_tensors(one, _flat(old), _flat(new), threads=threads)
    header = [[name, o.size, r.size] for name, (_, o, _, r) in found.items()]
    return _join(header, [x for part in found.values() for x in part])


def _apply_fixed(old: Bits, payload: Any, threads: int) -> dict[str, np.ndarray]:
    header, body = _split(payload)
    sections, parts = _Sections(body), {}
    for name, sent, raws in header:
        blocks = -(-old[name].size // loops.BLOCK)
        sizes = (("u1", blocks), ("u1", sent), ("u1", -(-sent // 2)), ("<u2", raws))
        parts[name] = [sections.take(dtype, count) for dtype, count in sizes]
    return _rebuilt(old, parts, lambda out, part: loops.put_fixed_width(out, *part), threads)


COO = Codec(name="COO (SparseRL-Sync)", encode=_encode_coo, apply=_apply_coo)
DENSE_XOR = Codec(name="XOR + zstd-1 (slime)", encode=_encode_dense_xor, apply=_apply_dense_xor)


def peers() -> list[Codec]:
    """All peers that can run here; blosc2 is an optional package."""
    found = [
        COO,
        Codec(
            name="int16 gaps + coded values",
            encode=_encode_modelled,
            apply=_apply_modelled,
        ),
        Codec(name="PULSE v3.1 + zstd-1", encode=_encode_pulse, apply=_apply_pulse),
        DENSE_XOR,
    ]
    named = {
        False: "u16 gaps + XOR (NeMo-RL)",
        True: "u16 gaps + XOR, planes",
    }
    for planes, name in named.items():
        found.append(
            Codec(
                name=name,
                encode=lambda o, n, t, planes=planes: _encode_gaps(o, n, t, planes=planes),
                apply=lambda o, p, t, planes=planes: _apply_gaps(o, p, t, planes=planes),
            )
        )
    found.append(Codec(name="block-256, fixed width", encode=_encode_fixed, apply=_apply_fixed))
    if importlib.util.find_spec("blosc2"):
        name = "blosc2 bitshuffle"
        found.append(Codec(name=name, encode=_encode_blosc, apply=_apply_blosc))
    return found
