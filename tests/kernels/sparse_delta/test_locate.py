"""Changes placed by class counts, against the places worked out from the old values one by one."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels.sparse_delta import codec, locate, reference
from kernels.sparse_delta.codec import Mode
from kernels.sparse_delta.elements import element_format, exponent, order
from kernels.sparse_delta.reference import EMPTY_SLOT, SUBBLOCK

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
TILE = (32, 300)


def boxes(dtype, density, shape=(2, 70, 300), seed=0):
    rng = np.random.default_rng(seed)
    fmt = element_format(dtype)
    old = rng.normal(0, 20 if fmt.kind != "float" else 0.02, shape).astype(dtype)
    old = old.view(fmt.bits_dtype)
    step = rng.integers(1, 4, shape).astype(fmt.bits_dtype)
    return old, np.where(rng.random(shape) < density, old + step, old), fmt


def tiles_of(box):
    lead, rows, _ = box.shape
    return [box[i, r : r + TILE[0]].reshape(-1) for i in range(lead) for r in range(0, rows, 32)]


def coded_pair(dtype, density, **options):
    old, new, fmt = boxes(dtype, density)
    tables = codec.make_tables(fmt, [(old, new)], TILE, **options)
    return old, new, fmt, tables, codec.encode_box(old, new, fmt, TILE, tables)


def packed_counts(old, fmt, tables):
    thresholds = jnp.asarray(tables.thresholds, jnp.int32)
    return np.asarray(reference.class_counts(jnp.asarray(old), thresholds, fmt=fmt, tile=TILE))


def classes_in(tile, fmt, tables):
    return np.searchsorted(tables.thresholds, exponent(tile, fmt), side="right")


def expected_places(tile, new, fmt, tables, *, lone):
    """Of every changed element: sub-block, class and rank in it; and its change mod 2^32."""
    classes = np.full(len(tile), 7) if lone else classes_in(tile, fmt, tables)
    steps = order(new, fmt).astype(np.int64) - order(tile, fmt).astype(np.int64)
    found = []
    for at in np.flatnonzero(tile != new):
        start = at - at % SUBBLOCK
        rank = int((classes[start:at] == classes[at]).sum())
        change = int(steps[at])
        negative = fmt.kind == "float" and int(tile[at]) & fmt.sign_bit
        modulus = 1 << fmt.width_bits
        change = (-change if negative else change) % modulus
        change -= modulus if change >= modulus // 2 else 0
        found.append((int(at) // SUBBLOCK, int(classes[at]), rank, change % (1 << 32)))
    return sorted(found)


def places_of(located, tile):
    own = slice(located.starts[tile], located.starts[tile + 1])
    place, change = located.places[own].astype(int), located.changes[own].tolist()
    return sorted(zip(place >> 11, place >> 8 & 7, place & 255, change, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("density", [0.001, 0.02, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_change_is_placed_by_the_counts(dtype, density, threads):
    old, new, fmt, tables, coded = coded_pair(DTYPES[dtype], density)
    sizes = np.asarray([len(tile) for tile in tiles_of(old)])
    by_position = locate.names_positions(coded.mode, tables)
    for lone in np.unique(by_position).tolist():
        mine = np.flatnonzero((by_position == lone) & (coded.mode <= Mode.ENTROPY))
        own = codec.CodedTiles(
            coded.mode[mine], coded.nnz[mine], coded.size[mine], coded.data, coded.offset[mine]
        )
        counts = None if lone else packed_counts(old, fmt, tables)[mine]
        located = locate.locate(own, sizes[mine], counts, tables, tile=TILE, threads=threads)
        for k, tile in enumerate(mine):
            pair = tiles_of(old)[tile], tiles_of(new)[tile]
            want = expected_places(*pair, fmt, tables, lone=lone)
            assert places_of(located, k) == want
            blocks = [place[0] for place in want]
            assert located.fullest[k] == max((blocks.count(b) for b in blocks), default=0)


def test_tables_of_one_class_need_no_counts():
    old, new, fmt, tables, coded = coded_pair(DTYPES["bfloat16"], 0.05, conditional=False)
    assert set(coded.mode.tolist()) == {Mode.ENTROPY}
    assert locate.names_positions(coded.mode, tables).all()
    sizes = np.asarray([len(tile) for tile in tiles_of(old)])
    located = locate.locate(coded, sizes, None, tables, tile=TILE, threads=1)
    for k, pair in enumerate(zip(tiles_of(old), tiles_of(new), strict=True)):
        assert places_of(located, k) == expected_places(*pair, fmt, tables, lone=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_slots_hold_each_change_once(dtype):
    old, _, fmt, tables, coded = coded_pair(DTYPES[dtype], 0.02)
    sizes = np.asarray([len(tile) for tile in tiles_of(old)])
    counts = packed_counts(old, fmt, tables)
    located = locate.locate(coded, sizes, counts, tables, tile=TILE, threads=2)
    chosen = np.asarray([5, 0, 3])
    room = locate.room_for(located.fullest[chosen])
    assert room % 8 == 0
    assert located.fullest[chosen].max() <= room < located.fullest[chosen].max() + 8
    options = {"entries": 4, "room": room, "tile": TILE, "fmt": fmt, "threads": 2}
    words, extra = locate.fill(located, chosen, **options)
    assert (extra is None) == (fmt.width_bits < 32)
    assert np.all(words[3] == EMPTY_SLOT)
    for entry, tile in enumerate(chosen):
        slot, block = np.nonzero(words[entry] != EMPTY_SLOT)
        word = words[entry, slot, block].astype(int)
        change = word & 0xFFFF if extra is None else extra[entry, slot, block].astype(int)
        found = sorted(zip(block, word >> 24, word >> 16 & 255, change.tolist(), strict=True))
        mask = 0xFFFF if extra is None else 0xFFFFFFFF
        assert found == [(*place[:3], place[3] & mask) for place in places_of(located, tile)]


def test_a_sub_block_of_one_class_counts_256():
    """The byte of a count saturates; 255 of one class and one of another is not 256 of one."""
    bits = np.full((1, 32, 512), 0x3F80, np.uint16)  # 1.0
    bits[0, 0, 7] = 0
    new = bits.copy()
    new[0, :, 255::256] += 1
    fmt = element_format(DTYPES["bfloat16"])
    tables = codec.make_tables(fmt, [(bits, new)], (32, 512))
    # Zeros are of class 0, all others of class 7.
    tables = dataclasses.replace(tables, thresholds=np.ones(7, np.uint8))
    coded = codec.encode_box(bits, new, fmt, (32, 512), tables)
    assert coded.mode.tolist() == [Mode.ENTROPY]
    thresholds = jnp.asarray(tables.thresholds, jnp.int32)
    options = {"fmt": fmt, "tile": (32, 512)}
    counts = np.asarray(reference.class_counts(jnp.asarray(bits), thresholds, **options))
    located = locate.locate(coded, np.asarray([1 << 14]), counts, tables, tile=(32, 512), threads=1)
    place = located.places.astype(int)
    assert (place >> 11).tolist() == list(range(64))
    assert set((place >> 8 & 7).tolist()) == {7}
    assert (place & 255).tolist() == [254] + [255] * 63


@pytest.mark.parametrize("name", ["mode", "nnz", "size", "offset"])
def test_what_the_directory_says_wrongly_is_refused(name):
    old, _, fmt, tables, coded = coded_pair(DTYPES["bfloat16"], 0.02)
    sizes = np.asarray([len(tile) for tile in tiles_of(old)])
    counts = packed_counts(old, fmt, tables)
    for value in (0, 4, 5, 255, 1 << 20, (1 << 31) - 1):
        columns = {key: getattr(coded, key).copy() for key in ("mode", "nnz", "size", "offset")}
        if value > np.iinfo(columns[name].dtype).max or value == columns[name][2]:
            continue
        columns[name][2] = value
        bad = codec.CodedTiles(data=coded.data, **columns)
        with pytest.raises(codec.Malformed) as refusal:
            locate.locate(bad, sizes, counts, tables, tile=TILE, threads=1)
        assert refusal.value.tile == 2


def test_streams_with_any_bit_flipped_are_refused_or_stay_within_the_tile():
    old, _, fmt, tables, coded = coded_pair(DTYPES["bfloat16"], 0.005)
    sizes = np.asarray([len(tile) for tile in tiles_of(old)])
    counts = packed_counts(old, fmt, tables)
    outcomes = set()
    for bit in range(0, 8 * len(coded.data), 7):
        data = coded.data.copy()
        data[bit // 8] ^= 1 << bit % 8
        columns = {key: getattr(coded, key) for key in ("mode", "nnz", "size", "offset")}
        try:
            located = locate.locate(
                codec.CodedTiles(data=data, **columns), sizes, counts, tables, tile=TILE, threads=1
            )
        except codec.Malformed:
            outcomes.add("refused")
            continue
        outcomes.add("read")
        assert np.all((located.places >> 11) <= (sizes.max() - 1) // SUBBLOCK)
    assert "refused" in outcomes
