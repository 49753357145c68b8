"""The jnp definition of the device half against element-by-element Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sparse_delta import reference
from kernels.sparse_delta.elements import ElementFormat, element_format

FORMATS = {
    name: element_format(name)
    for name in ("bfloat16", "float16", "float32", "int8", "uint16", "float8_e4m3fn")
}
BF16 = FORMATS["bfloat16"]
THRESHOLDS = [110, 112, 114, 116, 118, 120, 122]


def make_pair(
    key: int, extents: tuple[int, ...], fmt: ElementFormat, density: float
) -> tuple[np.ndarray, np.ndarray]:
    """Bits with plausible exponents among any others, and a version with some of them changed."""
    rng = np.random.default_rng(key)
    dtype = fmt.bits_dtype
    old = rng.integers(0, 1 << fmt.width_bits, extents, dtype=np.uint64).astype(dtype)
    if fmt.exponent_bits == 8:
        usual = (rng.normal(0, 0.02, extents)).astype(np.float32).view(np.uint32)
        usual = (usual >> np.uint32(32 - fmt.width_bits)).astype(dtype)
        old = np.where(rng.random(extents) < 0.9, usual, old)
    change = rng.integers(1, 1 << fmt.width_bits, extents, dtype=np.uint64).astype(dtype)
    change = np.where(rng.random(extents) < 0.8, dtype.type(1), change)
    new = np.where(rng.random(extents) < density, old + change, old)
    return old, new


def tiles_of(box: np.ndarray, tile: tuple[int, int]) -> list[np.ndarray]:
    """The elements of every tile in their order, by slices."""
    lead, rows, cols = box.shape
    return [
        box[i, r : r + tile[0], c : c + tile[1]].reshape(-1)
        for i in range(lead)
        for r in range(0, rows, tile[0])
        for c in range(0, cols, tile[1])
    ]


def exponent_of(bits: int, fmt: ElementFormat) -> int:
    return (bits & fmt.magnitude_mask) >> fmt.mantissa_bits if fmt.kind == "float" else 0


def class_of(bits: int, fmt: ElementFormat) -> int:
    return sum(exponent_of(bits, fmt) >= t for t in THRESHOLDS)


def thresholds() -> jax.Array:
    return jnp.array(THRESHOLDS, jnp.int32)


BOXES = [
    ((1, 32, 512), (32, 256)),  # whole tiles
    ((2, 40, 320), (32, 256)),  # clipped below and at the right
    ((1, 7, 13), (7, 13)),  # one tile, far from any multiple
    ((2, 3, 200), (2, 128)),
    ((1, 1, 1), (1, 1)),
]


@pytest.mark.parametrize(("extents", "tile"), BOXES)
def test_tile_matrix_lists_each_tile_row_major_and_comes_back(extents, tile):
    box = np.random.default_rng(0).integers(0, 1 << 16, extents).astype(np.uint16)
    matrix = reference.tile_matrix(jnp.asarray(box), tile)
    assert matrix.shape[1:] == (reference.subblocks_of(tile), 256)
    for flat, elements in zip(
        np.asarray(matrix).reshape(len(matrix), -1), tiles_of(box, tile), strict=True
    ):
        np.testing.assert_array_equal(flat[: len(elements)], elements)
        assert not flat[len(elements) :].any()
    np.testing.assert_array_equal(reference.untile(matrix, extents, tile), box)


@pytest.mark.parametrize(("extents", "tile"), BOXES)
@pytest.mark.parametrize("density", [0.02, 1.0])
def test_pack_marks_and_counts_the_changed_elements(extents, tile, density):
    old, new = make_pair(1, extents, BF16, density)
    packed = jax.device_get(jax.jit(functools.partial(reference.pack, tile=tile))(old, new))
    mask = np.asarray(packed.mask)
    for t, (a, b) in enumerate(zip(tiles_of(old, tile), tiles_of(new, tile), strict=True)):
        counts = np.zeros(reference.subblocks_of(tile), np.int32)
        for e in range(len(a)):
            s, lane = divmod(e, 256)
            assert (mask[t, s // 32, lane] >> (s % 32)) & 1 == (a[e] != b[e])
            counts[s] += a[e] != b[e]
        np.testing.assert_array_equal(packed.counts[t], counts)
    assert int(np.bitwise_count(mask).sum()) == int((old != new).sum())
    unpacked = reference.untile(reference.unpack_mask(jnp.asarray(mask)), extents, tile)
    np.testing.assert_array_equal(unpacked, old != new)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("extents", "tile"), BOXES[1:])
def test_records_give_place_rank_class_and_bits_of_each_change(name, extents, tile):
    fmt = FORMATS[name]
    old, new = make_pair(2, extents, fmt, 0.02)
    compact = jax.jit(functools.partial(reference.compact, fmt=fmt, tile=tile, capacity=128))
    got = jax.device_get(compact(old, new, thresholds()))
    assert (got.new_values is None) == (fmt.width_bits < 32)
    for t, (a, b) in enumerate(zip(tiles_of(old, tile), tiles_of(new, tile), strict=True)):
        for start in range(0, len(a), 4096):
            block = start // 4096
            seen = [0] * 8
            wanted = []
            for offset, (x, y) in enumerate(
                zip(a[start : start + 4096].tolist(), b[start : start + 4096].tolist(), strict=True)
            ):
                k = class_of(x, fmt)
                if x != y:
                    place = offset | seen[k] << 12 | k << 24
                    wanted.append((place, x, y))
                seen[k] += 1
            seen[class_of(0, fmt)] += 4096 - min(4096, len(a) - start)
            assert int(got.counts[t, block]) == len(wanted) <= 128
            np.testing.assert_array_equal(got.class_counts[t, :, block], seen)
            values = [x if fmt.width_bits == 32 else x << 16 | y for _, x, y in wanted]
            rest = [0] * (128 - len(wanted))
            np.testing.assert_array_equal(got.places[t, block], [p for p, _, _ in wanted] + rest)
            np.testing.assert_array_equal(got.values[t, block], values + rest)
            if got.new_values is not None:
                new_values = [y for _, _, y in wanted] + rest
                np.testing.assert_array_equal(got.new_values[t, block], new_values)


def test_a_block_that_overflows_is_counted_and_left_empty_and_its_neighbours_are_whole():
    old, new = make_pair(3, (1, 64, 256), BF16, 0.01)
    new[0, 16:32] = ~old[0, 16:32]
    options = {"fmt": BF16, "tile": (64, 256), "capacity": 128}
    got = jax.jit(functools.partial(reference.compact, **options))(old, new, thresholds())
    np.testing.assert_array_equal(got.counts[0], (old != new).reshape(4, -1).sum(1))
    assert int(got.counts[0, 1]) == 4096
    filled = (np.asarray(got.values[0]) != 0).sum(1)
    np.testing.assert_array_equal(filled, np.where(np.arange(4) == 1, 0, got.counts[0]))


def slots_of(
    old: np.ndarray, new: np.ndarray, fmt: ElementFormat, tile: tuple[int, int], room: int
) -> reference.Slots:
    """What a decoder makes of a payload, element by element; the list of tiles ends in repeats."""
    touched, all_keys, all_changes = [], [], []
    for t, (a, b) in enumerate(zip(tiles_of(old, tile), tiles_of(new, tile), strict=True)):
        if not (a != b).any():
            continue
        keys = np.full((room, reference.subblocks_of(tile)), reference.EMPTY_SLOT, np.uint32)
        changes = np.zeros(keys.shape, np.uint32)
        for start in range(0, len(a), 256):
            s, used, seen = start // 256, 0, [0] * 8
            for x, y in zip(
                a[start : start + 256].tolist(), b[start : start + 256].tolist(), strict=True
            ):
                k = class_of(x, fmt)
                if x != y:
                    keys[used, s] = (k << 8 | seen[k]) << 16
                    changes[used, s] = change_of(x, y, fmt)
                    used += 1
                seen[k] += 1
        touched.append(t)
        all_keys.append(keys)
        all_changes.append(changes)
    used = len(touched)
    if not used:
        touched = [0]
        all_keys = [np.full((room, reference.subblocks_of(tile)), 2**32 - 1, np.uint32)]
        all_changes = [np.zeros_like(all_keys[0])]
    for rows in (touched, all_keys, all_changes):
        rows.extend([rows[-1]] * 2)
    keys, changes = jnp.asarray(np.stack(all_keys)), jnp.asarray(np.stack(all_changes))
    wide = fmt.width_bits == 32
    return reference.Slots(
        jnp.asarray(touched, jnp.int32),
        jnp.int32(used),
        keys if wide else keys | changes,  # all ones stay all ones
        changes if wide else None,
    )


def change_of(old: int, new: int, fmt: ElementFormat) -> int:
    """The contract's formula, in Python integers."""
    top, ones = fmt.sign_bit, (1 << fmt.width_bits) - 1

    def order(u: int) -> int:
        if fmt.kind == "float":
            return u ^ (ones if u & top else top)
        return u ^ top if fmt.kind == "signed" else u

    step = order(new) - order(old)
    return (-step if fmt.kind == "float" and old & top else step) & ones


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("extents", "tile"), BOXES[2:4])
def test_expand_finds_each_change_by_class_and_rank(name, extents, tile):
    fmt = FORMATS[name]
    old, new = make_pair(4, extents, fmt, 0.01)
    old[0, -1, -1], new[0, -1, -1] = 1, fmt.sign_bit  # across zero, in the last element
    slots = slots_of(old, new, fmt, tile, 24)
    got = jax.jit(functools.partial(reference.expand, fmt=fmt, tile=tile))(old, slots, thresholds())
    np.testing.assert_array_equal(got, new)


def test_expand_without_a_change_gives_the_old_bits():
    old, _ = make_pair(5, (1, 48, 300), BF16, 0.0)
    slots = slots_of(old, old, BF16, (32, 256), 8)
    expand = jax.jit(functools.partial(reference.expand, fmt=BF16, tile=(32, 256)))
    got = expand(old, slots, thresholds())
    np.testing.assert_array_equal(got, old)


@pytest.mark.parametrize(("extents", "tile"), BOXES)
def test_class_counts_survive_their_packing_into_bytes(extents, tile):
    old, _ = make_pair(6, extents, BF16, 0.0)
    old[0, 0, :256] = 0  # with a width of 256, a sub-block that is all of one class
    packed = reference.class_counts(jnp.asarray(old), thresholds(), fmt=BF16, tile=tile)
    table = reference.class_count_table(np.asarray(packed))
    assert (table.sum(2) == 256).all()
    for t, elements in enumerate(tiles_of(old, tile)):
        padded = np.zeros(reference.subblocks_of(tile) * 256, np.uint16)
        padded[: len(elements)] = elements
        for s, part in enumerate(padded.reshape(-1, 256)):
            classes = np.searchsorted(THRESHOLDS, (part & 0x7FFF) >> 7, side="right")
            wanted = np.bincount(classes, minlength=8)
            np.testing.assert_array_equal(table[t, s], wanted)


@pytest.mark.parametrize("position", range(8))
def test_a_count_of_255_differs_from_one_of_256(position):
    counts = np.zeros(8, int)
    counts[position] = 255
    counts[(position + 1) % 8] = 1
    for wanted in (counts, np.where(np.arange(8) == position, 256, 0)):
        stored = np.minimum(wanted, 255).astype(np.uint8)
        packed = stored.view("<u4").reshape(1, 2, 1)
        np.testing.assert_array_equal(reference.class_count_table(packed)[0, 0], wanted)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.data())
def test_changes_are_a_bijection_for_every_old_value(name, data):
    fmt = FORMATS[name]
    bits = st.lists(st.integers(0, (1 << fmt.width_bits) - 1), min_size=8, max_size=8)
    old, new = data.draw(bits), data.draw(bits)
    before, after = (jnp.asarray(np.array(part, fmt.bits_dtype)) for part in (old, new))
    change = reference.change_of(before, after, fmt)
    wanted = [change_of(x, y, fmt) for x, y in zip(old, new, strict=True)]
    np.testing.assert_array_equal(change, wanted)
    np.testing.assert_array_equal(reference.add_change(before, change, fmt), after)


def test_away_from_zero_is_positive_on_both_sides():
    old = jnp.asarray([0x3F80, 0xBF80, 0x3F7F], jnp.uint16)  # 1, −1 and the value below 1 in bf16
    new = jnp.asarray([0x3F81, 0xBF81, 0x3F80], jnp.uint16)
    np.testing.assert_array_equal(reference.change_of(old, new, BF16), [1, 1, 1])


def test_default_thresholds_are_octaves_below_the_upper_quartile():
    # 3/8 of the elements have exponent 120, the rest less: 120 is the highest that 1/4 reach.
    exponents = np.array([120] * 3 + [118, 117, 110, 100, 90]) << 7
    got = reference.default_thresholds(jnp.asarray(exponents, jnp.uint16), BF16)
    np.testing.assert_array_equal(got, [114, 115, 116, 117, 118, 119, 120])
    zeros = reference.default_thresholds(jnp.zeros(8, jnp.uint16), BF16)
    np.testing.assert_array_equal(zeros, 0)


def test_capacity_holds_the_binomial_tail():
    from scipy import stats

    for density in (0.001, 0.01, 0.05, 0.3):
        capacity = reference.capacity_for(density)
        assert capacity % 128 == 0
        assert stats.binom.sf(capacity, 4096, density) < 1e-8
    assert reference.capacity_for(1.0) == 4096


def test_epilogue_rounds_as_a_cast_does_and_packs_the_difference():
    rng = np.random.default_rng(7)
    master = rng.normal(size=(1, 32, 256)).astype(np.float32)
    old = np.asarray(jnp.asarray(master * (1 + 2.0**-9)).astype(jnp.bfloat16)).view(np.uint16)
    new, packed = jax.jit(functools.partial(reference.epilogue, tile=(32, 256)))(master, old)
    # Round to nearest, ties to even, in integers.
    bits = master.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(new, rounded)
    changed = np.asarray(reference.unpack_mask(packed.mask)).reshape(1, 32, 256)
    np.testing.assert_array_equal(changed, rounded != old)
    assert 0 < changed.sum() < changed.size
