"""Round trips through the public functions; what comes out is compared by its bytes."""

import dataclasses
import itertools
import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import sparse_delta
from kernels.sparse_delta import tiles

DTYPES = [
    np.dtype(d)
    for d in (
        ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
        np.int8, np.uint8, np.int16, np.int32, np.uint32, np.bool_,
    )
]  # fmt: skip
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def raw(leaf):
    """Dtype, shape and bytes of an array."""
    array = np.asarray(leaf)
    return array.dtype, array.shape, array.tobytes()


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert raw(one) == raw(other)


def changed(rng, array, density, *, ulps=4):
    """A copy in which a share of the elements has other bits, most of them near the old ones."""
    bits = np.array(array).reshape(-1)
    if bits.dtype == np.bool_:
        flip = rng.random(bits.size) < density
        return jnp.asarray((bits ^ flip).reshape(np.shape(array)))
    words = bits.view(f"u{bits.dtype.itemsize}")
    where = rng.random(words.size) < density
    step = rng.integers(1, ulps + 1, words.size).astype(words.dtype)
    words[where] += step[where]
    return jnp.asarray(words.view(bits.dtype).reshape(np.shape(array)))


def weights(rng, shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.normal(scale=0.02, size=shape).astype(np.float32), dtype)


@st.composite
def pairs(draw):
    """Old and new bits of one tensor: any bits, and any share of them changed."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    words = np.dtype("u1") if dtype == np.bool_ else np.dtype(f"u{dtype.itemsize}")
    any_bits = st.integers(0, 1 if dtype == np.bool_ else (1 << 8 * dtype.itemsize) - 1)
    old = draw(hnp.arrays(words, shape, elements=any_bits))
    new = draw(hnp.arrays(words, shape, elements=any_bits))
    keep = draw(st.sampled_from(["all", "some", "none"]))
    if keep != "none":
        stay = draw(hnp.arrays(np.bool_, shape)) if keep == "some" else np.ones(shape, bool)
        new = np.where(stay, old, new).astype(words)
    return old.view(dtype), new.view(dtype)


@settings(max_examples=150, deadline=None)
@given(st.lists(pairs(), min_size=1, max_size=3))
def test_any_bits_come_back_and_the_size_is_bounded(several):
    old = {f"w{k}": pair[0] for k, pair in enumerate(several)}
    new = {f"w{k}": pair[1] for k, pair in enumerate(several)}
    payload = sparse_delta.encode(old, new, threads=1)
    assert_same(sparse_delta.apply(old, payload, threads=1), new)
    dense = sum(leaf.nbytes for leaf in new.values())
    assert len(payload) <= dense * 1.01 + 4096
    anchor = sparse_delta.encode(None, new, threads=1)
    assert_same(sparse_delta.apply(old, anchor, threads=1), new)
    assert len(anchor) <= dense * 1.01 + 4096


@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, FP8], ids=str)
def test_tensors_of_many_tiles(density, dtype):
    rng = np.random.default_rng(3)
    old = {"a": weights(rng, (3, 300, 700), dtype), "b": weights(rng, (70_000,), dtype)}
    new = jax.tree.map(lambda x: changed(rng, x, density), old)
    payload = sparse_delta.encode(old, new, threads=2)
    assert_same(sparse_delta.apply(old, payload, threads=2), new)
    dense = sum(leaf.nbytes for leaf in new.values())
    assert len(payload) <= dense * 1.01 + 4096
    # Random bits cannot be coded: all of them changed at random cost what they are.
    if density == 0.0:
        assert len(payload) < 400
    if density == 0.01:
        assert len(payload) < dense / 10


@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.3, 1.0])
def test_unconditional_payloads_are_the_same_format_and_somewhat_larger(density):
    rng = np.random.default_rng(4)
    shapes = {jnp.bfloat16: (256, 1024), jnp.float32: (300, 700), FP8: (3, 100, 512)}
    old = {str(dtype): weights(rng, shape, dtype) for dtype, shape in shapes.items()}
    new = jax.tree.map(lambda x: changed(rng, x, density), old)
    base = sparse_delta.digest(old)
    known = {"base_digest": base, "threads": 2}
    payload = sparse_delta.encode(old, new, conditional=False, **known)
    assert_same(sparse_delta.apply(old, payload, base, threads=2), new)
    twin = sparse_delta.inspect(sparse_delta.encode(old, new, **known))
    assert sparse_delta.inspect(payload).target_digest.root == twin.target_digest.root
    if density == 0.01:
        assert sparse_delta.inspect(payload).tensors[0].modes.keys() == {"entropy"}
        # Gaps alone: H(.01)/.01 = 8.1 bits; changes of either sign and 1 to 4 steps: 3 bits.
        assert 8 * len(payload) / twin.changed < 8.1 + 3 + 1.5


def test_zeros_with_signs_infinities_and_nans_are_values():
    bits = np.array([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFFF, 0x0001], np.uint16)
    every = np.stack(np.meshgrid(bits, bits)).reshape(2, -1)
    old, new = every.view(ml_dtypes.bfloat16)
    payload = sparse_delta.encode([old], [new])
    assert_same(sparse_delta.apply([old], payload), [new])
    info = sparse_delta.inspect(payload)
    if "dense" not in info.tensors[0].modes:
        assert info.changed == 56  # of 64 pairs, 8 are of equal bits


def test_huge_gaps():
    old = np.zeros(1 << 20, np.float16)
    new = old.copy()
    new[0], new[-1] = 1.0, -1.0
    payload = sparse_delta.encode(old, new)
    assert_same(sparse_delta.apply(old, payload), new)
    assert len(payload) < 1500  # of 2 MiB


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    kernel: jax.Array
    steps: jax.Array


def test_any_pytree():
    rng = np.random.default_rng(0)
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    old = {
        "list": [weights(rng, (4, 4)), jnp.int32(3)],
        "record": Record(weights(rng, (9,), jnp.float32), jnp.uint32(7)),
        "nnx": nnx.state(model),
        "none": None,
        "empty": {"nothing": jnp.zeros((0, 3), jnp.int8)},
        "numpy": np.arange(6, dtype=np.int16),
    }
    new = jax.tree.map(lambda x: changed(rng, x, 0.5), old)
    new["numpy"] = np.asarray(new["numpy"])
    got = sparse_delta.apply(old, sparse_delta.encode(old, new))
    assert_same(got, new)
    assert isinstance(got["numpy"], np.ndarray)
    names = [tensor.name for tensor in sparse_delta.inspect(sparse_delta.encode(old, new)).tensors]
    assert "record/kernel" in names
    assert any(name.startswith("nnx/kernel") for name in names)


def test_an_empty_tree():
    assert sparse_delta.apply({}, sparse_delta.encode({}, {})) == {}


def test_leaves_without_a_change_are_the_same_objects():
    rng = np.random.default_rng(0)
    old = {"hot": weights(rng, (64, 64)), "cold": weights(rng, (64, 64))}
    new = old | {"hot": changed(rng, old["hot"], 0.1)}
    got = sparse_delta.apply(old, sparse_delta.encode(old, new))
    assert got["cold"] is old["cold"]
    assert_same(got, new)


def test_tied_leaves_are_coded_once():
    rng = np.random.default_rng(0)
    old = weights(rng, (256, 300))
    new = changed(rng, old, 0.05)
    once = sparse_delta.encode({"embed": old}, {"embed": new})
    twice = sparse_delta.encode({"embed": old, "head": old}, {"embed": new, "head": new})
    assert len(twice) < len(once) + 100
    tied = {"embed": old, "head": old}
    got = sparse_delta.apply(tied, twice)
    assert_same(got, {"embed": new, "head": new})
    # A receiver may hold them apart.
    assert_same(sparse_delta.apply({"embed": old, "head": old + 0}, twice), got)
    assert sparse_delta.inspect(twice).tensors[1].tied_to == "embed"
    assert sparse_delta.inspect(twice).target_digest == sparse_delta.digest(got)


def test_an_anchor_needs_shapes_only():
    new = {"w": weights(np.random.default_rng(0), (40, 50)), "s": jnp.float32(2.0)}
    anchor = sparse_delta.encode(None, new, version=9)
    got = sparse_delta.apply(jax.eval_shape(lambda: new), anchor)
    assert_same(got, new)
    info = sparse_delta.inspect(anchor)
    assert (info.kind, info.version, info.base_digest) == ("anchor", 9, None)


def test_digests_chain_versions_without_reading_the_base_again():
    rng = np.random.default_rng(0)
    versions = [{"w": weights(rng, (300, 300)), "small": weights(rng, (5,))}]
    for _ in range(3):
        versions.append(jax.tree.map(lambda x: changed(rng, x, 0.05), versions[-1]))
    sender = receiver = None
    held = versions[0]
    for before, after in itertools.pairwise(versions):
        payload = sparse_delta.encode(before, after, base_digest=sender)
        assert payload == sparse_delta.encode(before, after)
        held = sparse_delta.apply(held, payload, base_digest=receiver)
        sender = receiver = sparse_delta.inspect(payload).target_digest
        assert receiver == sparse_delta.digest(after)
    assert_same(held, versions[-1])


def test_a_digest_of_other_weights_is_noticed():
    rng = np.random.default_rng(0)
    old, new = {"w": weights(rng, (64, 64))}, {"w": weights(rng, (64, 64))}
    payload = sparse_delta.encode(old, new)
    with pytest.raises(sparse_delta.WrongBase):
        sparse_delta.apply(old, payload, base_digest=sparse_delta.digest(new))


def test_threads_change_nothing():
    rng = np.random.default_rng(0)
    old = {"w": weights(rng, (1500, 1100))}
    new = {"w": changed(rng, old["w"], 0.02)}
    assert len({sparse_delta.encode(old, new, threads=threads) for threads in (1, 2, 5)}) == 1


def test_donated_weights_are_gone_and_those_that_stay_are_not():
    rng = np.random.default_rng(0)
    old = {"hot": weights(rng, (64, 64)), "cold": weights(rng, (64, 64))}
    new = old | {"hot": changed(rng, old["hot"], 0.1)}
    payload = sparse_delta.encode(old, new)
    want = raw(new["hot"])
    got = sparse_delta.apply(old, payload, donate=True)
    assert raw(got["hot"]) == want
    assert old["hot"].is_deleted()
    assert not got["cold"].is_deleted()


def test_inspect_reads_as_a_table():
    rng = np.random.default_rng(0)
    old = {"w": weights(rng, (512, 512)), "b": weights(rng, (7,))}
    new = old | {"w": changed(rng, old["w"], 0.01)}
    info = sparse_delta.inspect(sparse_delta.encode(old, new, version=7, base_version=6))
    differing = int((np.asarray(old["w"]).view("u2") != np.asarray(new["w"]).view("u2")).sum())
    assert (info.version, info.base_version, info.changed) == (7, 6, differing)
    assert info.tensors[1].density == differing / 512**2
    assert sum(size for _, size in info.buckets) + info.manifest_bytes == info.size_bytes
    assert info.bits_per_change == 8 * info.size_bytes / differing
    text = str(info)
    assert "versions 6 → 7" in text
    assert "512×512" in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.version = 8
    # An empty payload has no bits a change.
    assert math.isnan(sparse_delta.inspect(sparse_delta.encode(old, old)).bits_per_change)


def test_long_tables_name_the_largest_tensors():
    rng = np.random.default_rng(0)
    old = {f"w{k:03d}": weights(rng, (4,)) for k in range(60)}
    new = jax.tree.map(lambda x: changed(rng, x, 1.0), old)
    assert str(sparse_delta.inspect(sparse_delta.encode(old, new))).endswith("and 20 smaller ones")


# ---------------------------------------------------------------------------- what is no array


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (3.0, "leaf 'w/0' of new is a float, not an array"),
        (np.zeros(3, np.complex64), "leaf 'w/0' of new has dtype complex64"),
        (np.zeros(3, np.float64), "leaf 'w/0' of new has dtype float64"),
        (np.zeros(3, ml_dtypes.int4), "leaf 'w/0' of new has dtype int4"),
        (jax.random.key(0), "leaf 'w/0' of new has dtype key"),
    ],
    ids=str,
)
def test_leaves_that_are_no_words_are_named(leaf, message):
    with pytest.raises(TypeError, match=message):
        sparse_delta.encode({"w": [leaf]}, {"w": [leaf]})


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"w": np.zeros((3, 2), np.int8)}, r"'w' int8\[3, 2\] where new has 'w' int8\[2, 3\]"),
        ({"w": np.zeros((2, 3), np.int16)}, r"'w' int16\[2, 3\] where new has 'w' int8\[2, 3\]"),
        ({"v": np.zeros((2, 3), np.int8)}, "old has 'v'"),
        ({}, "they have 0 and 1 leaves"),
    ],
)
def test_trees_that_do_not_match_are_told(old, message):
    with pytest.raises(ValueError, match=message):
        sparse_delta.encode(old, {"w": np.zeros((2, 3), np.int8)})


def test_names_that_read_the_same_are_told():
    tree = {1: np.zeros(1, np.int8), "1": np.zeros(1, np.int8)}
    try:
        jax.tree.leaves(tree)
    except (TypeError, ValueError):
        tree = {"a/b": np.zeros(1, np.int8), "a": {"b": np.zeros(1, np.int8)}}
    with pytest.raises(ValueError, match="two leaves of new are both called"):
        sparse_delta.encode(None, tree)


@pytest.mark.parametrize("version", [-1, 1 << 63])
def test_versions_out_of_range(version):
    with pytest.raises(ValueError, match="version must be within"):
        sparse_delta.encode({}, {}, version=version)


# ------------------------------------------------------------------------------------ shardings


def mesh_of(*shape):
    return Mesh(np.asarray(jax.devices()).reshape(shape), ("a", "b")[: len(shape)])


SHARDINGS = {
    "replicated": ((8,), P()),
    "fsdp": ((8,), P("a")),
    "tensor": ((8,), P(None, "a")),
    "both": ((2, 4), P("a", "b")),
    "swapped": ((2, 4), P("b", "a")),
    "partly": ((2, 4), P(None, "b")),
    "three": ((2, 4), P("a", None, "b")),
    "last": ((8,), P(None, None, "a")),
}


def placed(tree, name):
    shape, spec = SHARDINGS[name]
    mesh = mesh_of(*shape)
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim]))), tree)


@pytest.mark.parametrize("receiver", ["fsdp", "tensor", "swapped", "last", "replicated", "one"])
@pytest.mark.parametrize("trainer", ["fsdp", "tensor", "both", "partly", "three", "last"])
def test_resharding(trainer, receiver):
    rng = np.random.default_rng(0)
    old = {"m": weights(rng, (64, 128)), "t": weights(rng, (16, 24, 8)), "s": jnp.float32(1.0)}
    new = jax.tree.map(lambda x: changed(rng, x, 0.2), old)
    payload = sparse_delta.encode(placed(old, trainer), placed(new, trainer), threads=1)
    theirs = old if receiver == "one" else placed(old, receiver)
    got = sparse_delta.apply(theirs, payload, threads=1)
    assert_same(got, new)
    for mine, was in zip(jax.tree.leaves(got), jax.tree.leaves(theirs), strict=True):
        assert mine.sharding == was.sharding
    # Where it lies has no say in what is in it.
    info = sparse_delta.inspect(payload)
    assert info.target_digest == sparse_delta.digest(new)
    assert info.base_digest == sparse_delta.digest(theirs).root


def test_tiles_divide_the_shards_of_trainer_and_receivers():
    mesh = AbstractMesh((8,), ("model",), axis_types=(AxisType.Auto,))
    receiver = {"w": NamedSharding(mesh, P(None, "model"))}
    old = placed({"w": weights(np.random.default_rng(0), (64, 192))}, "fsdp")
    new = jax.tree.map(lambda x: x * 2, old)
    info = sparse_delta.inspect(sparse_delta.encode(old, new, receivers=[receiver]))
    rows, cols = info.tensors[0].tile
    assert 8 % rows == 0
    assert 24 % cols == 0
    with pytest.raises(ValueError, match=r"receivers\[0\] must have the structure of new"):
        sparse_delta.encode(old, new, receivers=[{}])
    with pytest.raises(TypeError, match=r"leaf 'w' of receivers\[0\] is a \w+, not a sharding"):
        sparse_delta.encode(old, new, receivers=[{"w": P("model")}])


def test_shards_of_the_receiver_may_cut_tiles():
    rng = np.random.default_rng(0)
    old = {"w": weights(rng, (24, 40))}
    new = {"w": changed(rng, old["w"], 0.3)}
    payload = sparse_delta.encode(old, new)
    assert sparse_delta.inspect(payload).tensors[0].tile == (24, 40)
    assert_same(sparse_delta.apply(placed(old, "both"), payload), new)


def test_no_tensor_is_gathered(monkeypatch):
    """Encoding reads each shard once; applying to a sharding that tiles fit does so too."""
    rng = np.random.default_rng(0)
    old = placed({"w": weights(rng, (64, 128))}, "both")
    new = placed({"w": changed(rng, old["w"], 0.2)}, "both")
    largest = 0
    plain = np.asarray

    def watched(value, *args, **kwargs):
        nonlocal largest
        if isinstance(value, jax.Array):
            largest = max(largest, value.size)
        return plain(value, *args, **kwargs)

    monkeypatch.setattr(np, "asarray", watched)
    receivers = placed(old, "tensor")
    payload = sparse_delta.encode(old, new, receivers=[receivers])
    got = sparse_delta.apply(receivers, payload)
    monkeypatch.undo()
    assert largest == 64 * 128 // 8
    assert_same(got, new)


def test_old_may_lie_elsewhere_than_new():
    rng = np.random.default_rng(0)
    old = {"w": weights(rng, (64, 128))}
    new = {"w": changed(rng, old["w"], 0.2)}
    payload = sparse_delta.encode(jax.tree.map(np.asarray, old), placed(new, "both"))
    assert_same(sparse_delta.apply(old, payload), new)
    payload = sparse_delta.encode(placed(old, "tensor"), placed(new, "fsdp"))
    assert_same(sparse_delta.apply(old, payload), new)


def test_each_shard_codes_its_own_tiles_once():
    """Replicas do not speak: the payload of a replicated tree is that of a single copy."""
    rng = np.random.default_rng(0)
    old = {"w": weights(rng, (64, 128))}
    new = {"w": changed(rng, old["w"], 0.2)}
    whole = sparse_delta.encode(old, new)
    assert sparse_delta.encode(placed(old, "replicated"), placed(new, "replicated")) == whole
    info = sparse_delta.inspect(sparse_delta.encode(placed(old, "both"), placed(new, "both")))
    grid = tiles.choose_grid((64, 128), ((32, 32),))
    assert sum(info.tensors[0].modes.values()) == grid.n_tiles
