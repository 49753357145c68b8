"""The device half on whole trees: sharded, jitted, any dtype, and back by the receiver's half."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.sparse_delta import delta as deltas
from kernels.sparse_delta import tpu
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.epilogue import cast_diff
from kernels.sparse_delta.tiles import choose_grid

BF16 = np.dtype(ml_dtypes.bfloat16)


def pair(shape, dtype=BF16, density=0.01, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Two versions of an array, most changes by one step in the bits."""
    rng = np.random.default_rng(seed)
    old = rng.normal(0, 0.02, shape).astype(np.float32)
    fmt = element_format(dtype)
    if fmt.kind != "float":
        old = rng.integers(0, 100, shape)
    old = np.asarray(old).astype(dtype)
    bits = old.view(fmt.bits_dtype) if old.ndim else old.reshape(1).view(fmt.bits_dtype).reshape(())
    new = np.where(rng.random(shape) < density, bits ^ fmt.bits_dtype.type(1), bits)
    return old, np.asarray(new, fmt.bits_dtype).view(dtype).reshape(shape)


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels in the interpreter, wherever the dispatch calls one."""
    for name in ("compact", "epilogue_compact", "class_counts", "expand"):
        kernel = functools.partial(getattr(tpu, name), interpret=True)
        monkeypatch.setattr(tpu, name, kernel)


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return np.atleast_1d(array).view(element_format(array.dtype).bits_dtype)


def rebuilt(delta: deltas.Delta, place: int) -> np.ndarray:
    """The new bits from the old ones and the host's records alone."""
    old = jax.tree.leaves(delta.old)[place]
    grid = delta.grids[place]
    view = bits(old).reshape(grid.extents).copy()
    flat = view.reshape(-1)
    seen = np.zeros(grid.n_tiles, int)
    for shard in deltas.shard_records(delta, place):
        leads, rows, cols = grid.places(shard.ids)
        for t, (lead, row, col) in enumerate(zip(leads, rows, cols, strict=True)):
            seen[shard.ids[t]] += 1
            span = slice(shard.starts[t], shard.starts[t + 1])
            wide = min(grid.tile[1], grid.extents[2] - col)
            down, across = np.divmod(shard.position[span].astype(int), wide)
            at = (lead * grid.extents[1] + row + down) * grid.extents[2] + col + across
            np.testing.assert_array_equal(flat[at], shard.old[span])
            assert (np.diff(shard.position[span].astype(int)) > 0).all()
            flat[at] = shard.new[span]
            if shard.dense[t]:
                assert span.start == span.stop
                block = (slice(lead, lead + 1), slice(row, row + grid.tile[0]))
                block = (*block, slice(col, col + wide))
                new = bits(jax.tree.leaves(delta.new)[place]).reshape(grid.extents)
                view[block] = new[block]
    assert (seen == 1).all()  # each tile once, by its one owner
    return flat


TREE = {
    "scale": ((300,), BF16),
    "w": ((96, 640), BF16),
    "f32": ((40, 130), np.float32),
    "i8": ((3, 7, 11), np.int8),
    "flags": ((50,), np.bool_),
    "f8": ((64, 64), np.dtype(ml_dtypes.float8_e4m3fn)),
    "scalar": ((), BF16),
    "empty": ((0, 4), BF16),
}


@pytest.fixture(scope="module")
def tree() -> tuple[dict, dict]:
    made = {name: pair(shape, dtype, 0.02) for name, (shape, dtype) in TREE.items()}
    return {n: jnp.asarray(p[0]) for n, p in made.items()}, {
        n: jnp.asarray(p[1]) for n, p in made.items()
    }


def test_records_of_a_tree_rebuild_it(tree):
    delta = deltas.diff(*tree)
    for place, new in enumerate(jax.tree.leaves(tree[1])):
        if new.size:
            np.testing.assert_array_equal(rebuilt(delta, place), bits(new).reshape(-1))
        else:
            assert delta.records[place] is None
            assert not list(deltas.shard_records(delta, place))


def test_diff_under_jit_gives_what_it_gives_outside(tree):
    outside = deltas.diff(*tree)
    inside = jax.jit(deltas.diff)(*tree)
    assert jax.tree.structure(inside) == jax.tree.structure(outside)
    jax.tree.map(np.testing.assert_array_equal, inside.records, outside.records)


def test_ranks_count_the_earlier_elements_of_the_class_in_the_tile():
    old, new = pair((256, 256), density=0.01)
    delta = deltas.diff(jnp.asarray(old), jnp.asarray(new))
    (shard,) = deltas.shard_records(delta, 0)
    assert delta.grids[0].n_tiles == 1
    thresholds = np.asarray(delta.thresholds[0])
    exponents = (bits(old).reshape(-1) & 0x7FFF) >> 7
    classes = np.searchsorted(thresholds, exponents, side="right")
    ranks = np.zeros(classes.size, int)
    for k in range(8):
        ranks[classes == k] = np.arange((classes == k).sum())
    changed = np.flatnonzero(bits(old).reshape(-1) != bits(new).reshape(-1))
    np.testing.assert_array_equal(shard.position, changed)
    np.testing.assert_array_equal(shard.class_, classes[changed])
    np.testing.assert_array_equal(shard.rank, ranks[changed])


SPECS = [
    ("data", "model"),
    (None, "model"),
    (("data", "model"), None),
    (None, None),
]


@pytest.mark.parametrize("spec", SPECS)
def test_shards_are_compared_where_they_lie(spec):
    old, new = pair((64, 2, 256))
    sharding = NamedSharding(mesh(), PartitionSpec(spec[0], None, spec[1]))
    placed = [jax.device_put(x, sharding) for x in (old, new)]
    delta = deltas.diff(*placed)
    assert delta.shardings == (sharding,)
    np.testing.assert_array_equal(rebuilt(delta, 0), bits(new).reshape(-1))


def test_nothing_but_counters_leaves_a_device():
    sharding = NamedSharding(mesh(), PartitionSpec("data", "model"))
    shapes = jax.ShapeDtypeStruct((256, 2048), BF16, sharding=sharding)
    tree = {"a": shapes, "b": shapes}
    placed = {"a": sharding, "b": sharding}
    compiled = jax.jit(functools.partial(deltas.diff, shardings=placed)).lower(tree, tree).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text
    # The thresholds' counters are summed; nothing larger is.
    sums = re.findall(r"= (\S+) all-reduce", text)
    assert sums
    assert all(re.fullmatch(r"f32\[(1,)?256\]\S*", shape) for shape in sums), sums


def test_several_meshes_and_single_devices_in_one_tree():
    old, new = pair((32, 256))
    other = Mesh(np.array(jax.devices()[:2]), ("x",))
    shardings = {
        "a": NamedSharding(mesh(), PartitionSpec("model")),
        "b": NamedSharding(other, PartitionSpec("x")),
        "c": jax.sharding.SingleDeviceSharding(jax.devices()[3]),
        "d": jax.sharding.SingleDeviceSharding(jax.devices()[5]),
    }
    olds = {name: jax.device_put(old, s) for name, s in shardings.items()}
    news = {name: jax.device_put(new, s) for name, s in shardings.items()}
    delta = deltas.diff(olds, news)
    for place in range(4):
        np.testing.assert_array_equal(rebuilt(delta, place), bits(new).reshape(-1))


def test_tiles_respect_the_receivers():
    old, new = pair((64, 768))
    sharding = NamedSharding(mesh(), PartitionSpec(None, "model"))
    delta = deltas.diff(jnp.asarray(old), jnp.asarray(new), receivers=[sharding])
    assert delta.grids == (choose_grid((64, 768), ((64, 192),)),)
    np.testing.assert_array_equal(rebuilt(delta, 0), bits(new).reshape(-1))


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_tiles_that_do_not_fit_their_slots_are_dense(density):
    old, new = pair((64, 256), density=0.005)
    far, near = pair((64, 256), density=density, seed=1)
    old, new = np.concatenate([old] * 16 + [far]), np.concatenate([new] * 16 + [near])
    delta = deltas.diff(jnp.asarray(old), jnp.asarray(new))
    (shard,) = deltas.shard_records(delta, 0)
    assert shard.dense.any() == (density > 0.05)
    assert not shard.dense.all()
    np.testing.assert_array_equal(rebuilt(delta, 0), bits(new).reshape(-1))


def test_given_thresholds_are_used():
    old, new = pair((32, 256))
    limits = [100, 110, 112, 114, 116, 118, 120]
    delta = deltas.diff(jnp.asarray(old), jnp.asarray(new), thresholds={"bfloat16": limits})
    np.testing.assert_array_equal(delta.thresholds[0], limits)


@pytest.mark.parametrize("spec", [None, ("data", "model")])
@pytest.mark.parametrize("backend", ["reference", "tpu"])
def test_cast_and_difference_in_one_pass_are_both_of_them(spec, backend, interpreted):
    rng = np.random.default_rng(3)
    master = {"w": rng.normal(size=(64, 1024)), "odd": rng.normal(size=(8, 12)), "empty": [[], []]}
    master = {name: jnp.asarray(x, jnp.float32) for name, x in master.items()}
    old = jax.tree.map(lambda x: (x * (1 + 2.0**-13)).astype(jnp.bfloat16), master)
    if spec:
        sharding = NamedSharding(mesh(), PartitionSpec(*spec))
        master, old = (
            {n: jax.device_put(x, sharding) for n, x in t.items() if n != "empty"}
            for t in (master, old)
        )
    new = jax.tree.map(lambda x: x.astype(jnp.bfloat16), master)
    got = cast_diff(master, old, backend=backend, density=0.08)
    wanted = deltas.diff(old, new, density=0.08)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    place = sorted(master).index("w")
    changed = sum(len(shard.position) for shard in deltas.shard_records(got, place))
    assert changed == int((bits(old["w"]) != bits(new["w"])).sum()) > 0


def test_cast_wants_float32_and_bf16():
    ones = jnp.ones((4, 4), jnp.float32)
    with pytest.raises(TypeError, match="'a' must be bfloat16 in old and float32 in master"):
        cast_diff({"a": ones}, {"a": ones})


def test_misuse_names_the_leaf():
    old, new = (jnp.asarray(x) for x in pair((32, 256)))
    with pytest.raises(ValueError, match="'a' must have one shape"):
        deltas.diff({"a": old[:3]}, {"a": new})
    with pytest.raises(ValueError, match="one structure"):
        deltas.diff({"a": old}, {"b": new})
    spread = NamedSharding(mesh(), PartitionSpec("data"))
    with pytest.raises(ValueError, match=r"'a' must lie alike.*device_put"):
        deltas.diff({"a": old}, {"a": jax.device_put(new, spread)})
    with pytest.raises(TypeError, match="complex64"):
        deltas.diff({"a": jnp.zeros(3, jnp.complex64)}, {"a": jnp.zeros(3, jnp.complex64)})
