"""The host coder: nothing is lost, little is sent, and no stream can do harm."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sparse_delta import codec, elements, loops
from kernels.sparse_delta.codec import DigestFrame, Malformed, Mode
from kernels.sparse_delta.elements import element_format

DTYPES = [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32, jnp.int8, jnp.uint16, jnp.float16]
BF16 = element_format(jnp.bfloat16)


# ------------------------------------------------------------------------------------------ pairs


def changed(old, density, seed, step=None):
    """`old` with a share of its elements changed by a few steps, or to anything."""
    rng = np.random.default_rng(seed)
    new = old.copy()
    where = rng.random(old.shape) < density
    if step is None:
        new[where] = rng.integers(0, np.iinfo(old.dtype).max, where.sum(), old.dtype, True)
    else:
        moves = rng.integers(1, step + 1, where.sum()) * rng.choice([-1, 1], where.sum())
        new[where] = (old[where].astype(np.int64) + moves).astype(old.dtype)
    return new


def normal(shape, dtype, seed=0):
    weights = np.random.default_rng(seed).standard_normal(shape, np.float32) * 0.02
    return elements.as_bits(
        (weights * (1 if elements.element_format(dtype).kind == "float" else 3000)).astype(dtype)
    )


def optimizer_step(density, shape=(4, 512, 512), steps=12):
    """bf16 weights before and after a step of Adam on float32 masters that changes `density`.

    Weights N(0, σ_l) with lognormal σ_l around .02, gradients of unit noise and an AR(1) direction
    of .3. The updates do not depend on the weights, so their sum serves any learning rate.
    """
    rng = np.random.default_rng(3)

    def noise():
        return rng.standard_normal(shape, np.float32)

    scale = (0.02 * np.exp(0.5 * rng.standard_normal((shape[0], 1, 1)))).astype(np.float32)
    weights = noise() * scale
    direction = noise()
    first = np.zeros(shape, np.float32)
    second = np.zeros(shape, np.float32)
    total = before = np.zeros(shape, np.float32)
    for t in range(1, steps + 1):
        direction = np.float32(0.9) * direction + np.float32(math.sqrt(0.19)) * noise()
        gradient = np.float32(0.3) * direction + noise()
        first = np.float32(0.9) * first + np.float32(0.1) * gradient
        second = np.float32(0.999) * second + np.float32(0.001) * gradient * gradient
        update = first / np.float32(1 - 0.9**t)
        update /= np.sqrt(second / np.float32(1 - 0.999**t))
        before, total = total, total + update
    sides = []
    low, high = 1e-9, 1e-1
    for _ in range(25):
        rate = np.float32(math.sqrt(low * high))
        sides = [(weights - rate * d).astype(jnp.bfloat16).view(np.uint16) for d in (before, total)]
        low, high = (rate, high) if (sides[0] != sides[1]).mean() < density else (low, rate)
    return sides


def assert_round_trip(old, new, fmt, tile, threads=1, frame=None, conditional=True):
    tables = codec.make_tables(fmt, [(old, new)], tile, conditional)
    coded = codec.encode_box(old, new, fmt, tile, tables, threads, frame)
    again, used = codec.Tables.from_bytes(tables.to_bytes(), fmt)
    assert used == len(tables.to_bytes())
    ids = np.arange(coded.mode.size)
    out = np.full_like(old, 7)
    change = codec.decode_box(old, out, coded, fmt, tile, again, ids, threads, frame)
    assert np.array_equal(out, new)
    assert change == coded.digest_change
    in_place = old.copy()
    codec.decode_box(in_place, in_place, coded, fmt, tile, again, ids, threads)
    assert np.array_equal(in_place, new)
    assert coded.data.size == coded.size.sum()
    assert np.array_equal(coded.nnz.sum(), (old != new).sum())
    return coded, tables


# --------------------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 40, None])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.1, 0.6, 1.0])
def test_round_trip(dtype, density, step):
    old = normal((2, 70, 300), dtype)
    assert_round_trip(old, changed(old, density, 1, step), element_format(dtype), (32, 256))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 70, 300), (1, 33, 512), (3, 41, 256), (1, 1, 7)])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.1, 0.6, 1.0])
def test_round_trip_with_one_class(dtype, shape, density):
    """Tiles that are gathered, ones that are scanned where they lie, and a clipped last one."""
    old = normal(shape, dtype)
    frame = DigestFrame(2**32 - 9, 10**5, shape[2] + 3)
    new = changed(old, density, 1, 3)
    coded, tables = assert_round_trip(
        old, new, element_format(dtype), (32, 256), 2, frame, conditional=False
    )
    assert not (tables.lengths.size and tables.thresholds.any())
    expected = np.subtract(slow_digest(new, frame), slow_digest(old, frame)) % 2**32
    assert coded.digest_change == tuple(expected)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_round_trip_of_any_bits_shapes_and_tiles(data):
    fmt = element_format(data.draw(st.sampled_from(DTYPES[:4])))
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 600)))
    tile = data.draw(st.tuples(st.integers(1, 50), st.integers(1, 700)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    top = data.draw(st.sampled_from([1, 3, np.iinfo(fmt.bits_dtype).max]))
    old = rng.integers(0, top, shape, fmt.bits_dtype, True)
    density = data.draw(st.sampled_from([0, 0.001, 0.01, 0.2, 0.5, 0.99, 1]))
    new = changed(old, density, 5, data.draw(st.sampled_from([None, 1, 3, 1000])))
    threads, conditional = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    coded, _ = assert_round_trip(old, new, fmt, tile, threads, conditional=conditional)
    assert coded.data.size <= new.nbytes


SPECIAL = [
    0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0,
    0x7FC1, 0x7F81, 0xFFFF,
]  # fmt: skip


def test_every_change_between_special_values():
    """±0, subnormals, exponent carries, infinities and NaN payloads are values like any other."""
    pairs = np.array([(a, b) for a in SPECIAL for b in SPECIAL], np.uint16)
    old, new = (np.tile(side, 60).reshape(1, 60, -1) for side in pairs.T)
    assert_round_trip(np.ascontiguousarray(old), np.ascontiguousarray(new), BF16, (60, 256))


def test_a_lone_change_after_the_longest_gap():
    old = normal((1, 1024, 1024), jnp.bfloat16)
    new = old.copy()
    new[0, -1, -1] ^= 1
    coded, _ = assert_round_trip(old, new, BF16, (1024, 1024))
    assert coded.mode[0] == Mode.ENTROPY
    assert coded.size[0] < 32


def test_threads_and_dense_tiles_change_nothing():
    old = normal((3, 64, 512), jnp.bfloat16)
    new = changed(old, 0.05, 2, 2)
    new[1] = changed(old[1], 1.0, 3)
    one, _ = assert_round_trip(old, new, BF16, (32, 256), threads=1)
    many, _ = assert_round_trip(old, new, BF16, (32, 256), threads=4)
    assert np.array_equal(one.data, many.data)
    # Nothing fits tables that are made for both, but the tiles of few changes are not dense.
    assert Mode.DENSE in one.mode
    assert Mode.DENSE not in one.mode[one.nnz < 32 * 256 // 2]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
def test_a_box_without_an_old_one_is_dense(dtype):
    shape = (2, 33, 130)
    new = changed(normal(shape, dtype), 1.0, 3)
    fmt = element_format(dtype)
    tables = codec.make_tables(fmt, [], (16, 64))
    coded = codec.encode_box(None, new, fmt, (16, 64), tables)
    out = np.zeros_like(new)
    codec.decode_box(None, out, coded, fmt, (16, 64), tables, np.arange(coded.mode.size))
    assert np.array_equal(out, new)
    assert coded.data.size == new.nbytes


def test_only_listed_tiles_are_written():
    old = normal((1, 64, 256), jnp.bfloat16)
    new = changed(old, 1.0, 2, 1)
    tables = codec.make_tables(BF16, [(old, new)], (16, 256))
    coded = codec.encode_box(old, new, BF16, (16, 256), tables)
    some = codec.CodedTiles(
        coded.mode[[2]], coded.nnz[[2]], coded.size[[2]], coded.data, coded.offset[[2]]
    )
    out = old.copy()
    codec.decode_box(old, out, some, BF16, (16, 256), tables, np.array([2]))
    assert np.array_equal(out[0, 32:48], new[0, 32:48])
    assert np.array_equal(np.delete(out, range(32, 48), 1), np.delete(old, range(32, 48), 1))


def slow_digest(box, frame):
    total = [0, 0]
    for (lead, row, col), bits in np.ndenumerate(box):
        index = (
            frame.origin + int(lead) * frame.lead_stride + int(row) * frame.row_stride + int(col)
        )
        a = (int(bits) + 1) * 0x9E3779B1 ^ (index % 2**32 * 0x85EBCA77 + (index >> 32) * 0xC2B2AE3D)
        a %= 2**32
        a ^= a >> 15
        a = a * 0x2C1B3C6D % 2**32
        a ^= a >> 13
        total[0] += a
        total[1] += (a ^ (a >> 16)) * 0x297A2D39 % 2**32
    return [t % 2**32 for t in total]


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_change_of_the_digest_is_that_of_the_whole_box(density, dtype):
    frame = DigestFrame(2**32 - 700, 5000, 90)
    old = normal((2, 20, 80), dtype)
    new = changed(old, density, 2)
    coded, tables = assert_round_trip(old, new, element_format(dtype), (8, 64), frame=frame)
    expected = np.subtract(slow_digest(new, frame), slow_digest(old, frame)) % 2**32
    assert coded.digest_change == tuple(expected)
    anchor = codec.encode_box(None, new, element_format(dtype), (8, 64), tables)
    digest = codec.decode_box(
        None, new.copy(), anchor, element_format(dtype), (8, 64), tables,
        np.arange(anchor.mode.size), frame=frame,
    )  # fmt: skip
    assert digest == tuple(slow_digest(new, frame))


# ----------------------------------------------------------------------------------- little is sent


def conditional_entropy_bits(old, new):
    """Bits of H(changed | exponent) + H(change | exponent, changed), summed over all elements."""

    def bits(counts):
        counts = counts[counts > 0].astype(np.float64)
        return float((counts * np.log2(counts.sum() / counts)).sum())

    old, new = old.ravel(), new.ravel()
    exponents, moved = elements.exponent(old, BF16), old != new
    away = np.where(old >> 15 == 1, -1, 1)
    change = (elements.order(new, BF16).astype(int) - elements.order(old, BF16)) * away
    total = 0.0
    for e in np.unique(exponents):
        here = exponents == e
        total += bits(np.bincount(moved[here]))
        total += bits(np.unique(change[here & moved], return_counts=True)[1])
    return total


@pytest.mark.parametrize(("density", "excess"), [(0.0062, 0.06), (0.01, 0.07), (0.05, 0.09)])
def test_size_is_near_the_conditional_entropy(density, excess):
    old, new = optimizer_step(density)
    tables = codec.make_tables(BF16, [(old, new)], (256, 512))
    coded = codec.encode_box(old, new, BF16, (256, 512), tables)
    n_changed = (old != new).sum()
    assert n_changed == pytest.approx(density * old.size, rel=0.02)
    # Tables are sent once, however many tiles there are; here there are eight.
    assert len(tables.to_bytes()) < 250
    assert 8 * coded.data.size <= (1 + excess) * conditional_entropy_bits(old, new)
    if density == 0.0062:
        assert 8 * (coded.data.size + len(tables.to_bytes())) <= 8.5 * n_changed


@pytest.mark.parametrize(("density", "excess"), [(0.001, 0.04), (0.1, 0.04), (0.9, 0.4)])
def test_changes_anywhere_cost_their_entropy(density, excess):
    """Integers have one class: N·H(p) bits for which, and 1 bit each for ±1.

    A Rice code takes a whole bit for a gap of 0, which most are where nearly all change.
    """
    old = np.full((4, 256, 512), 100, np.uint8)
    new = changed(old, density, 8, 1)
    fmt = element_format(jnp.uint8)
    coded, _ = assert_round_trip(old, new, fmt, (256, 512))
    p = (old != new).mean()
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) + p
    assert 8 * coded.data.size <= (1 + excess) * old.size * entropy + 4 * 100


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=200), st.integers(0, 60))
def test_prefix_codes_are_complete_short_and_near_the_entropy(counts, skew):
    counts = np.array([*counts, 1, 1], np.int64) >> np.minimum(np.arange(len(counts) + 2), skew)
    counts[-2:] = 1
    lengths = np.zeros(len(counts), np.uint8)
    loops.code_lengths(counts, lengths)
    used = counts > 0
    assert np.array_equal(lengths > 0, used)
    assert lengths.max() <= loops.CODE_BITS
    assert np.sum(0.5 ** lengths[used].astype(float)) == 1
    own = counts[used]
    entropy = (own * np.log2(own.sum() / own)).sum()
    # Huffman's code is within a bit of the entropy; few of these need the limit on its lengths.
    assert entropy <= (own * lengths[used]).sum() <= entropy + 1.1 * own.sum()


def test_codes_that_the_tables_do_not_have_are_exceptions():
    old = normal((1, 64, 512), jnp.bfloat16)
    tables = codec.make_tables(BF16, [(old, changed(old, 0.1, 1, 1))], (64, 512))
    new = changed(old, 0.1, 2, 1)
    new[0, ::9, 5] = ~old[0, ::9, 5]
    coded = codec.encode_box(old, new, BF16, (64, 512), tables)
    assert coded.mode.tolist() == [Mode.ENTROPY]
    out = old.copy()
    codec.decode_box(old, out, coded, BF16, (64, 512), tables, np.array([0]))
    assert np.array_equal(out, new)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn])
def test_full_versions_of_weights_are_smaller_by_planes(dtype):
    new = normal((2, 256, 512), dtype)
    fmt = element_format(dtype)
    tables = codec.make_tables(fmt, [], (256, 512))
    coded = codec.encode_box(None, new, fmt, (256, 512), tables)
    assert set(coded.mode) == {Mode.PLANES}
    assert coded.data.size < new.nbytes / {1: 1.02, 2: 1.4, 4: 1.15}[new.itemsize]
    for end in (*range(12), coded.size[0] // 2, coded.size[0] - 1):
        cut = codec.CodedTiles(
            coded.mode[:1], coded.nnz[:1], np.array([end], np.uint32), coded.data, coded.offset[:1]
        )
        with pytest.raises(Malformed, match="no frame of its size"):
            codec.decode_box(None, new.copy(), cut, fmt, (256, 512), tables, np.array([0]))


def test_no_tile_is_larger_than_dense():
    old = normal((1, 64, 512), jnp.bfloat16)
    new = changed(old, 1.0, 1)
    coded, _ = assert_round_trip(old, new, BF16, (16, 512))
    assert set(coded.mode) == {Mode.DENSE}
    assert coded.data.size == new.nbytes


def test_simple_modes_without_tables():
    old = normal((1, 64, 512), jnp.bfloat16)
    none = codec.make_tables(BF16, [], (64, 512))
    modes = []
    for density in (0.01, 0.2, 1.0):
        new = changed(old, density, 1, 1)
        coded = codec.encode_box(old, new, BF16, (64, 512), none)
        out = old.copy()
        codec.decode_box(old, out, coded, BF16, (64, 512), none, np.array([0]))
        assert np.array_equal(out, new)
        modes.append(Mode(int(coded.mode[0])))
    assert modes == [Mode.BLOCK_OFFSET, Mode.BITMAP, Mode.BITMAP]


# ----------------------------------------------------------------------------- nothing can do harm


@functools.cache
def small_streams():
    """A stream of each mode that has one, with what it was made from."""
    streams = []
    old = normal((1, 4, 256), jnp.bfloat16)
    for density, with_tables in ((0.03, True), (0.6, True), (0.03, False), (0.4, False)):
        new = changed(old, density, 1, 3)
        tables = codec.make_tables(BF16, [(old, new)] if with_tables else [], (4, 256))
        streams.append((old, new, tables, codec.encode_box(old, new, BF16, (4, 256), tables)))
    assert [Mode(int(c.mode[0])) for *_, c in streams] == [
        Mode.ENTROPY, Mode.ENTROPY, Mode.BLOCK_OFFSET, Mode.BITMAP
    ]  # fmt: skip
    return streams


def decode_stream(old, tables, mode, n, stream):
    """Decode one tile; the result, or None if it was refused and nothing was written."""
    coded = codec.CodedTiles(
        np.array([mode], np.uint8), np.array([n], np.uint32), np.array([len(stream)], np.uint32),
        np.frombuffer(bytes(stream), np.uint8), np.zeros(1, np.int64),
    )  # fmt: skip
    out = old.copy()
    try:
        codec.decode_box(out, out, coded, BF16, old.shape[1:], tables, np.array([0]))
    except Malformed as error:
        refused = error
    else:
        return out
    assert refused.tile == 0
    assert np.array_equal(out, old)
    return None


def test_truncated_and_extended_streams_are_refused():
    for old, new, tables, coded in small_streams():
        mode, n = coded.mode[0], coded.nnz[0]
        out = decode_stream(old, tables, mode, n, coded.data)
        assert out is not None
        assert np.array_equal(out, new)
        for end in range(coded.data.size):
            assert decode_stream(old, tables, mode, n, coded.data[:end]) is None
        for more in (b"\0", b"\1", bytes(9)):
            assert decode_stream(old, tables, mode, n, coded.data.tobytes() + more) is None


def test_flipped_bits_and_wrong_counts_never_write_beyond_a_tile():
    """A flip may decode to other changes, which the digest finds, but to as many as it says."""
    for old, _, tables, coded in small_streams():
        mode, n = coded.mode[0], coded.nnz[0]
        for bit in range(0, 8 * coded.data.size, 3):  # reaches every place in a byte
            stream = coded.data.copy()
            stream[bit // 8] ^= 1 << bit % 8
            out = decode_stream(old, tables, mode, n, stream)
            assert out is None or (out != old).sum() == n
        for wrong in (0, 1, n - 1, n + 1, 1024, 1025, 2**32 - 1):
            assert decode_stream(old, tables, mode, wrong, coded.data) is None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_as_tables_and_streams(data):
    old = normal((1, 8, 200), jnp.bfloat16)
    heads = [t.to_bytes() for _, _, t, _ in small_streams()[:2]]
    raw = bytearray(data.draw(st.one_of(st.binary(max_size=400), st.sampled_from(heads))))
    for at in data.draw(st.lists(st.integers(0, max(len(raw) - 1, 0)), max_size=3)):
        if raw:
            raw[at] = data.draw(st.integers(0, 255))
    try:
        tables, used = codec.Tables.from_bytes(bytes(raw), BF16)
    except Malformed:
        return
    assert used <= len(raw)
    stream = data.draw(st.binary(max_size=500))
    mode, n = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 1700))
    decode_stream(old, tables, mode, n, stream)


def test_tables_that_end_anywhere_are_refused():
    old = normal((1, 64, 512), jnp.bfloat16)
    raw = codec.make_tables(BF16, [(old, changed(old, 0.1, 1, 9))], (64, 512)).to_bytes()
    for end in range(len(raw)):
        with pytest.raises(Malformed):
            codec.Tables.from_bytes(raw[:end], BF16)


def test_streams_outside_the_data_and_tiles_outside_the_box_are_refused():
    old = normal((1, 16, 256), jnp.bfloat16)
    none = codec.make_tables(BF16, [], (16, 256))

    def coded(size, offset):
        return codec.CodedTiles(
            np.array([4], np.uint8), np.array([4096], np.uint32), np.array([size], np.uint32),
            np.zeros(8192, np.uint8), np.array([offset], np.int64),
        )  # fmt: skip

    for size, offset in ((8192, 1), (8192, -1), (2**32 - 1, 0), (8192, 2**62)):
        with pytest.raises(Malformed, match="outside"):
            codec.decode_box(
                old, old.copy(), coded(size, offset), BF16, (16, 256), none, np.array([0])
            )
    for tile in (-1, 1):
        with pytest.raises(ValueError, match="tile_ids"):
            codec.decode_box(
                old, old.copy(), coded(8192, 0), BF16, (16, 256), none, np.array([tile])
            )


@pytest.mark.parametrize(
    ("old", "new", "tile", "message"),
    [
        (np.zeros((1, 2, 3), np.uint16), np.zeros((1, 3, 2), np.uint16), (2, 2), "one shape"),
        (np.zeros((1, 2, 3), np.uint8), np.zeros((1, 2, 3), np.uint8), (2, 2), "uint16"),
        (np.zeros((2, 3), np.uint16), np.zeros((2, 3), np.uint16), (2, 2), "lead, rows, cols"),
        (np.zeros((1, 2, 3), np.uint16), np.zeros((1, 2, 3), np.uint16), (0, 2), "a tile must"),
        (
            np.zeros((1, 2, 3), np.uint16),
            np.zeros((1, 2, 3), np.uint16),
            (2048, 1024),
            "a tile must",
        ),
    ],
)
def test_misuse_is_named(old, new, tile, message):
    with pytest.raises(ValueError, match=message):
        codec.encode_box(old, new, BF16, tile, codec.make_tables(BF16, [], (2, 2)))
