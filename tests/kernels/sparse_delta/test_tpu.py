"""TPU kernels in the interpreter against the jnp definition, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.sparse_delta import reference, tpu
from kernels.sparse_delta.elements import element_format, order
from kernels.sparse_delta.tpu_layout import layout

THRESHOLDS = [110, 112, 114, 116, 118, 120, 122]
FORMATS = {name: element_format(name) for name in ("bfloat16", "float32", "int8", "float16")}
# extents, tile and dtype: every number of words a row, chunk and way to lay out.
CASES = {
    "two sub-blocks a row": ((1, 64, 1024), (64, 512), "bfloat16"),
    "one sub-block a row, lead": ((2, 64, 256), (64, 256), "bfloat16"),
    "four sub-blocks a row": ((1, 32, 1024), (32, 1024), "bfloat16"),
    "clipped, so laid out": ((1, 40, 300), (32, 256), "bfloat16"),
    "odd, so laid out": ((1, 7, 13), (7, 13), "float16"),
    "32 bits, two chunks": ((1, 256, 256), (256, 256), "float32"),
    "8 bits": ((1, 64, 256), (64, 256), "int8"),
}


def make_pair(extents, fmt, density, seed=0):
    rng = np.random.default_rng(seed)
    dtype = fmt.bits_dtype
    usual = rng.normal(0, 0.02, extents).astype(np.float32).view(np.uint32)
    usual = (usual >> np.uint32(32 - fmt.width_bits)).astype(dtype)
    any_bits = rng.integers(0, 1 << fmt.width_bits, extents, dtype=np.uint64).astype(dtype)
    old = np.where(rng.random(extents) < 0.9, usual, any_bits)
    change = rng.integers(1, 1 << fmt.width_bits, extents, dtype=np.uint64).astype(dtype)
    new = np.where(rng.random(extents) < density, old + change, old)
    return jnp.asarray(old), jnp.asarray(new)


def thresholds() -> jax.Array:
    return jnp.array(THRESHOLDS, jnp.int32)


def check(name: str, *args, interpret: bool | pltpu.InterpretParams = True, **options) -> None:
    kernel = functools.partial(getattr(tpu, name), interpret=interpret, **options)
    got = jax.block_until_ready(jax.jit(kernel)(*args))  # an interpreter is not to be disturbed
    wanted = jax.jit(functools.partial(getattr(reference, name), **options))(*args)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_pack(case):
    extents, tile, dtype = CASES[case]
    check("pack", *make_pair(extents, FORMATS[dtype], 0.05), tile=tile)


@pytest.mark.parametrize("case", CASES)
def test_class_counts(case):
    extents, tile, dtype = CASES[case]
    old, _ = make_pair(extents, FORMATS[dtype], 0.0)
    old = old.at[0, 0].set(0)  # sub-blocks of a single class, too
    check("class_counts", old, thresholds(), fmt=FORMATS[dtype], tile=tile)


@pytest.mark.parametrize("case", CASES)
def test_compact(case):
    extents, tile, dtype = CASES[case]
    pair = make_pair(extents, FORMATS[dtype], 0.015)
    check("compact", *pair, thresholds(), fmt=FORMATS[dtype], tile=tile, capacity=128)


@pytest.mark.parametrize("density", [0.0, 0.06])
def test_compact_at_any_density(density):
    old, new = make_pair((1, 64, 256), FORMATS["bfloat16"], density)
    new = new.at[0, 16:32].set(~old[0, 16:32])  # a block that overflows
    new = new.at[0, 40].set(~old[0, 40])  # a sub-block that is full beside ones that are not
    options = {"fmt": FORMATS["bfloat16"], "tile": (64, 256), "capacity": 384}
    check("compact", old, new, thresholds(), **options)


def slots_for(old, new, fmt, tile, room, spare):
    """Slots from the definition's own records, each sub-block's in reverse order."""
    options = {"fmt": fmt, "tile": tile}
    records, packed = jax.device_get(
        jax.jit(
            lambda old, new, limits: (
                reference.compact(old, new, limits, capacity=4096, **options),
                reference.class_counts(old, limits, **options),
            )
        )(old, new, thresholds())
    )
    counts = reference.class_count_table(packed).astype(int)
    n_subblocks = reference.subblocks_of(tile)
    touched = np.flatnonzero(records.counts.sum(1))
    listed = [*touched, *[touched[-1] if len(touched) else 0] * spare]
    keys = np.full((len(listed), room, n_subblocks), reference.EMPTY_SLOT, np.uint32)
    changes = np.zeros(keys.shape, np.uint32)
    for row, t in enumerate(touched):
        used = np.full(n_subblocks, room - 1)
        for block in range(records.counts.shape[1]):
            for r in range(records.counts[t, block]):
                place, value = (int(x[t, block, r]) for x in records[:2])
                s, k = block * 16 + (place >> 8 & 15), place >> 24
                inside = (place >> 12 & 4095) - counts[t, block * 16 : s, k].sum()
                before, after = value >> 16, value & 0xFFFF
                if records.new_values is not None:
                    before, after = value, int(records.new_values[t, block, r])
                keys[row, used[s], s] = (k << 8 | int(inside)) << 16
                step = int(order(np.array([after]), fmt)[0] - order(np.array([before]), fmt)[0])
                negative = fmt.kind == "float" and before & fmt.sign_bit
                changes[row, used[s], s] = (-step if negative else step) % (1 << fmt.width_bits)
                used[s] -= 1
    keys[len(touched) :] = 5 << 16  # what stands behind the list is to be ignored
    wide = fmt.width_bits == 32
    return reference.Slots(
        jnp.asarray(listed, jnp.int32),
        jnp.int32(len(touched)),
        jnp.asarray(keys if wide else keys | changes),
        jnp.asarray(changes) if wide else None,
    )


@pytest.mark.parametrize("case", CASES)
def test_expand(case):
    extents, tile, dtype = CASES[case]
    fmt = FORMATS[dtype]
    old, new = make_pair(extents, fmt, 0.004)
    new = new.at[0, 0, 0].set(~old[0, 0, 0])
    # 11 slots: no multiple of a register's rows.
    slots = slots_for(old, new, fmt, tile, 11, spare=2)
    expand = jax.jit(functools.partial(tpu.expand, fmt=fmt, tile=tile, interpret=True))
    np.testing.assert_array_equal(expand(old, slots, thresholds()), new)


def test_expand_leaves_unlisted_tiles_alone():
    fmt = FORMATS["bfloat16"]
    old, new = make_pair((1, 192, 512), fmt, 0.01)
    new = old.at[0, 70:90, :200].set(new[0, 70:90, :200])  # the second tile down, first across
    slots = slots_for(old, new, fmt, (64, 256), 16, spare=3)
    assert slots.tiles.tolist() == [2] * 4
    expand = jax.jit(functools.partial(tpu.expand, fmt=fmt, tile=(64, 256), interpret=True))
    np.testing.assert_array_equal(expand(old, slots, thresholds()), new)
    nothing = slots._replace(used=jnp.int32(0))
    np.testing.assert_array_equal(expand(old, nothing, thresholds()), old)


def test_epilogue():
    rng = np.random.default_rng(1)
    master = jnp.asarray(rng.normal(size=(2, 64, 512)).astype(np.float32))
    old = (master * (1 + 2.0**-13)).astype(jnp.bfloat16)
    old = jax.lax.bitcast_convert_type(old, jnp.uint16)
    check("epilogue", master, old, tile=(64, 512))
    own = {"fmt": FORMATS["bfloat16"], "tile": (64, 512), "capacity": 384}
    check("epilogue_compact", master, old, thresholds(), **own)
    with pytest.raises(NotImplementedError, match="256·k columns"):
        tpu.epilogue(master[:, :, :300], old[:, :, :300], tile=(64, 300), interpret=True)


@pytest.mark.parametrize("name", ["pack", "compact", "class_counts", "expand"])
def test_no_races_between_copies_and_kernels(name):
    fmt = FORMATS["bfloat16"]
    old, new = make_pair((1, 128, 512), fmt, 0.01)
    arguments = {
        "pack": (old, new),
        "compact": (old, new, thresholds()),
        "class_counts": (old, thresholds()),
        "expand": (old, slots_for(old, new, fmt, (64, 256), 16, spare=1), thresholds()),
    }[name]
    options = {"tile": (64, 256)}
    if name != "pack":
        options["fmt"] = fmt
    if name == "compact":
        options["capacity"] = 128
    params = pltpu.InterpretParams(detect_races=True)
    check(name, *arguments, interpret=params, **options)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert not interpreter.races.races_found


def test_what_does_not_fit_is_not_implemented():
    old, new = make_pair((1, 32, 256), FORMATS["bfloat16"], 0.0)
    options = {"fmt": FORMATS["bfloat16"], "tile": (32, 256), "interpret": True}
    with pytest.raises(NotImplementedError, match="capacity"):
        tpu.compact(old, new, thresholds(), capacity=4096, **options)
    with pytest.raises(NotImplementedError, match="elements"):
        layout((1, 1024, 512), (1024, 512), 16)


def test_traffic_of_whole_tiles_is_that_of_the_roofline():
    fmt = FORMATS["bfloat16"]
    extents, tile = (1, 4096, 4096), (256, 512)
    n = 4096 * 4096
    of = functools.partial(tpu.traffic, extents=extents, fmt=fmt, tile=tile)
    # Both versions, one bit an element, a count of 4 bytes every 256 elements.
    assert of("pack") == 4 * n + n // 8 + n // 64
    # Two words in each of 128 slots every 4096 elements, 8 + 1 counters of 4 bytes.
    assert of("compact") == 4 * n + n // 4096 * (8 * 128 + 36)
    # Float32 read, bf16 read and written, mask and counts.
    assert of("epilogue") == 8 * n + n // 8 + n // 64
    assert of("epilogue_compact") == of("compact") + 4 * n
    # Two bytes read, two words every 256 elements written.
    assert of("class_counts") == 2 * n + n // 32
    # In place: the listed tiles only, with 16 words for every 256 elements.
    assert of("expand", touched=64) == 64 * 256 * 512 * (4 + 16 * 4 // 256) + 64 * 512 * 64
    # Clipped tiles are laid out first: read and written once more.
    assert tpu.traffic("pack", (1, 4096, 4000), fmt=fmt, tile=tile) > 2 * 4.1 * 4096 * 4000
    with pytest.raises(NotImplementedError, match="256·k columns"):
        tpu.traffic("epilogue", (1, 4096, 4000), fmt=fmt, tile=tile)
    with pytest.raises(ValueError, match="no kernel"):
        tpu.traffic("cast", extents, fmt=fmt, tile=tile)
