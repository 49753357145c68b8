"""The GPU kernels against the jnp definition, run by Mosaic GPU's interpreter on a CPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sparse_delta import gpu, gpu_store, reference
from kernels.sparse_delta.elements import ElementFormat, element_format
from kernels.sparse_delta.gpu_grid import fits
from kernels.sparse_delta.gpu_registers import supports

BF16 = element_format("bfloat16")
OCTAVES = (116, 117, 118, 119, 120, 121, 122)
UNEVEN = (3, 7, 7, 100, 117, 119, 255)

# Three ways to cut a box in place: rows of several sub-blocks, of one, of 32. One that is not.
IN_PLACE = ((2, 128, 512), (64, 512))
NARROW = ((1, 256, 256), (128, 256))
WIDE = ((1, 8, 8192), (4, 8192))
MOVED = ((1, 70, 90), (40, 60))
BOXES = [IN_PLACE, NARROW, WIDE, MOVED]
CASES = [(box, "bfloat16") for box in BOXES] + [(NARROW, "float8_e4m3fn"), (MOVED, "float32")]

cases = pytest.mark.parametrize(("box", "dtype"), CASES)


def make_pair(
    key: int, extents: tuple[int, ...], fmt: ElementFormat, density: float
) -> tuple[jax.Array, jax.Array]:
    """Weights of plausible exponents with one in ten of any bits, and a version with changes."""
    rng = np.random.default_rng(key)
    dtype = fmt.bits_dtype
    old = rng.integers(0, 1 << fmt.width_bits, extents, dtype=np.uint64).astype(dtype)
    if fmt.exponent_bits == 8:
        usual = rng.normal(0, 0.02, extents).astype(np.float32).view(np.uint32)
        usual = (usual >> np.uint32(32 - fmt.width_bits)).astype(dtype)
        old = np.where(rng.random(extents) < 0.9, usual, old)
    change = rng.integers(1, 1 << fmt.width_bits, extents, dtype=np.uint64).astype(dtype)
    change = np.where(rng.random(extents) < 0.8, dtype.type(1), change)
    return jnp.asarray(old), jnp.asarray(np.where(rng.random(extents) < density, old + change, old))


def run(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A kernel, and nothing beside it.

    The interpreter computes with JAX in callbacks of the program that runs; if the test computes
    at the same time, both may wait for the CPU's few threads for ever.
    """
    kernel = jax.jit(functools.partial(function, **options, interpret=True))
    return jax.block_until_ready(kernel(*args))


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def slots_for(
    old: jax.Array, new: jax.Array, limits: jax.Array, fmt: ElementFormat, tile: reference.Tile
) -> reference.Slots:
    """The changes of the touched tiles, each in a slot of its sub-block drawn at random."""
    before, after = (reference.tile_matrix(bits, tile) for bits in (old, new))
    classes = reference.classes_of(before, limits, fmt)
    keys = np.asarray(classes << 8 | reference._ranks(classes)).astype(np.uint32)
    changes = np.asarray(reference.change_of(before, after, fmt)).astype(np.uint32)
    differs = np.asarray(before != after)
    touched = np.flatnonzero(differs.any((1, 2)))
    room = int(differs.sum(2).max()) + 2
    # Two entries too many, which repeat the last tile and hold what must not be used.
    listed = np.append(touched, [touched[-1]] * 2).astype(np.int32)
    words = np.full((len(listed), room, before.shape[1]), reference.EMPTY_SLOT, np.uint32)
    wide = np.zeros_like(words)
    rng = np.random.default_rng(0)
    for entry, t in enumerate(listed):
        for s in range(before.shape[1]):
            places = np.flatnonzero(differs[t, s])
            slots = rng.permutation(room)[: len(places)]
            low = 0 if fmt.width_bits == 32 else changes[t, s, places] & 0xFFFF
            words[entry, slots, s] = keys[t, s, places] << 16 | low
            wide[entry, slots, s] = changes[t, s, places]
    return reference.Slots(
        jnp.asarray(listed),
        jnp.asarray(len(touched), jnp.int32),
        jnp.asarray(words),
        jnp.asarray(wide) if fmt.width_bits == 32 else None,
    )


@cases
def test_pack_gives_the_mask_and_the_counts(box, dtype):
    extents, tile = box
    old, new = make_pair(0, extents, element_format(dtype), 0.02)
    found = run(gpu.pack, old, new, tile=tile)
    assert_same(found, reference.pack(old, new, tile=tile))
    assert int(found.counts.sum()) == int((old != new).sum())


@pytest.mark.parametrize("box", [IN_PLACE, MOVED])
def test_epilogue_rounds_and_packs(box):
    extents, tile = box
    master = np.random.default_rng(1).normal(0, 0.02, extents).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x80000001, 0x00007FFF], np.uint32)
    nans = np.array([0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000], np.uint32)
    master[0, 0, :9] = np.concatenate([ties, nans]).view(np.float32)
    old = jnp.asarray((master.view(np.uint32) >> 16).astype(np.uint16))
    found = run(gpu.epilogue, jnp.asarray(master), old, tile=tile)
    assert_same(found, reference.epilogue(jnp.asarray(master), old, tile=tile))
    assert np.asarray(found[0][0, 0, :5]).tolist() == [0x3F80, 0x3F82, 0x7F80, 0x8000, 0x0000]


@cases
@pytest.mark.parametrize("thresholds", [OCTAVES, UNEVEN], ids=["octaves", "uneven"])
def test_class_counts(box, dtype, thresholds):
    extents, tile = box
    fmt, limits = element_format(dtype), jnp.array(thresholds, jnp.int32)
    old, _ = make_pair(2, extents, fmt, 0.0)
    old = old.at[0, :2].set(0)  # whole sub-blocks of one class: a count of 256
    found = run(gpu.class_counts, old, limits, fmt=fmt, tile=tile)
    assert_same(found, reference.class_counts(old, limits, fmt=fmt, tile=tile))


@cases
@pytest.mark.parametrize("thresholds", [OCTAVES, UNEVEN], ids=["octaves", "uneven"])
def test_compact_gives_the_records(box, dtype, thresholds):
    extents, tile = box
    fmt, limits = element_format(dtype), jnp.array(thresholds, jnp.int32)
    old, new = make_pair(3, extents, fmt, 0.01)
    # A block in which everything changes, and more than its slots.
    new = new.at[0, 0, : min(extents[2], 5000)].set(old[0, 0, : min(extents[2], 5000)] + 1)
    options = {"fmt": fmt, "tile": tile, "capacity": 128}
    found = run(gpu.compact, old, new, limits, **options)
    assert_same(found, reference.compact(old, new, limits, **options))
    assert int(found.counts.sum()) == int((old != new).sum())


@pytest.mark.parametrize(("box", "dtype"), [(NARROW, "bfloat16"), (MOVED, "float32")])
def test_compaction_by_stores_gives_the_same_records(box, dtype):
    extents, tile = box
    fmt, limits = element_format(dtype), jnp.array(UNEVEN, jnp.int32)
    old, new = make_pair(3, extents, fmt, 0.01)
    old = old.at[0, 10:14].set(0)  # whole sub-blocks of one class: a count of 256
    new = new.at[0, 0, :5000].set(old[0, 0, :5000] + 1).at[0, 20:36].set(old[0, 20:36] + 1)
    options = {"fmt": fmt, "tile": tile, "capacity": 128}
    expected = reference.compact(old, new, limits, **options)
    assert int(expected.counts.max()) > 128
    assert_same(run(gpu_store.compact, old, new, limits, **options), expected)


@cases
def test_expand_adds_the_changes(box, dtype):
    extents, tile = box
    fmt, limits = element_format(dtype), jnp.array(OCTAVES, jnp.int32)
    old, new = make_pair(4, extents, fmt, 0.01)
    new = new.at[:, : tile[0], : tile[1]].set(old[:, : tile[0], : tile[1]])  # an untouched tile
    slots = slots_for(old, new, limits, fmt, tile)
    found = run(gpu.expand, old, slots, limits, fmt=fmt, tile=tile)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(new))


@settings(max_examples=5, deadline=None)
@given(
    key=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0, 0.001, 0.3, 1.0]),
    thresholds=st.lists(st.integers(0, 255), min_size=7, max_size=7),
)
def test_records_of_any_bits_at_any_density(key, density, thresholds):
    old, new = any_pair(key, density)
    limits = jnp.asarray(sorted(thresholds), jnp.int32)
    options = {"fmt": BF16, "tile": NARROW[1], "capacity": 4096}
    found = jax.block_until_ready(compact(old, new, limits, **options))
    assert_same(found, reference.compact(old, new, limits, **options))


compact = functools.partial(
    jax.jit(gpu.compact, static_argnames=("fmt", "tile", "capacity", "interpret")), interpret=True
)


def any_pair(key: int, density: float) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(key)
    old, other = rng.integers(0, 1 << 16, (2, *NARROW[0])).astype(np.uint16)
    return jnp.asarray(old), jnp.asarray(np.where(rng.random(NARROW[0]) < density, other, old))


def test_expand_takes_a_change_of_every_element():
    old, new = any_pair(6, 1.0)
    new = new.at[:, :16].set(old[:, :16])
    limits = jnp.array(OCTAVES, jnp.int32)
    slots = slots_for(old, new, limits, BF16, NARROW[1])
    assert slots.keys.shape[1] >= 256
    found = run(gpu.expand, old, slots, limits, fmt=BF16, tile=NARROW[1])
    np.testing.assert_array_equal(np.asarray(found), np.asarray(new))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int16", "uint8", "float32"])
def test_adding_a_change_crosses_zero_as_the_definition_does(dtype):
    fmt = element_format(dtype)
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 1 << fmt.width_bits, (2, 1 << 16), dtype=np.uint64)
    bits[1, ::2] = rng.integers(0, 4, 1 << 15)  # small steps too
    sign, largest = fmt.sign_bit, fmt.sign_bit - 1
    bits[:, :6] = [[0, sign, 0, sign, largest, sign | largest], [sign, 0, 1, 1, 1, 1]]
    old, change = jnp.asarray(bits.astype(fmt.bits_dtype))
    found = gpu._add_change(old, change.astype(jnp.uint32), fmt)
    assert_same(found, reference.add_change(old, change, fmt))


def test_only_whole_tiles_of_four_groups_fit():
    assert all(fits(*box) for box in (IN_PLACE, NARROW, WIDE))
    assert not fits((1, 128, 512), (32, 512))  # two groups a tile
    assert not fits((1, 100, 512), (64, 512))  # a clipped tile
    assert not fits((1, 64, 768), (64, 768))  # three sub-blocks a row
    assert not fits((1, 64, 500), (64, 500))


def test_a_box_that_32_bit_offsets_cannot_index_is_left_to_the_definition():
    box = jax.ShapeDtypeStruct((1 << 12, 1 << 10, 1 << 9), jnp.uint16)
    with pytest.raises(NotImplementedError, match=r"fewer than 2\^31 elements"):
        jax.eval_shape(functools.partial(gpu.pack, tile=(64, 512), interpret=True), box, box)


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [("gpu", "9.0", True), ("gpu", "10.0", True), ("gpu", "8.0", False), ("gpu", "gfx942", False)],
)
def test_devices_that_mosaic_compiles_for(platform, capability, expected):
    class Device:
        pass

    device = Device()
    device.platform, device.compute_capability = platform, capability
    assert supports(device) is expected


def test_an_old_chip_is_refused_before_its_compiler_aborts(monkeypatch):
    from kernels.sparse_delta import gpu_registers

    class Device:
        platform, compute_capability = "gpu", "8.0"

    monkeypatch.setattr(gpu_registers.jax, "devices", lambda platform: [Device()])
    gpu_registers.check_devices.cache_clear()
    box = jnp.zeros(NARROW[0], jnp.uint16)
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
        gpu.pack(box, box, tile=NARROW[1])
    gpu_registers.check_devices.cache_clear()


def test_traffic_is_near_what_has_to_be_moved():
    fmt, tile, extents = BF16, (256, 512), (1, 4096, 4096)
    per_element = {
        name: gpu.traffic(name, extents, fmt=fmt, tile=tile) / 4096**2
        for name in ("pack", "epilogue", "class_counts", "compact_by_stores", "expand")
    }
    assert per_element == {
        "pack": 4 + 1 / 8 + 1 / 64,
        "epilogue": 8 + 1 / 8 + 1 / 64,
        "class_counts": 2 + 1 / 32,
        "compact_by_stores": 4 + 128 * 8 / 4096 + 20 / 4096,
        "expand": 4 + 2 * 16 * 4 / 256,
    }
    # Out of tile order, the box is read and written once more.
    moved = gpu.traffic("class_counts", (1, 4096, 4000), fmt=fmt, tile=(256, 500))
    assert moved > 3 * 2 * 4096 * 4000
    with pytest.raises(ValueError, match="no kernel of that name: 'unpack'"):
        gpu.traffic("unpack", extents, fmt=fmt, tile=tile)
