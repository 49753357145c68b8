"""Weights rebuilt where they lie, on fake devices, against what the host decodes."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import sparse_delta
from kernels.sparse_delta import backends, codec, expand, gpu, resident, tiles, tpu, trees
from kernels.sparse_delta.codec import Mode
from kernels.sparse_delta.resident import ResidentLeaf
from kernels.sparse_delta.unpack import Unpacker

_FUZZ = Path(__file__).parent / "fuzz" / "target.py"
_spec = importlib.util.spec_from_file_location("sparse_delta_fuzz_target", _FUZZ)
assert _spec is not None
assert _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "bool": np.dtype(np.bool_),
}
apply = functools.partial(sparse_delta.apply, backend="reference", threads=1)
encode = functools.partial(sparse_delta.encode, threads=1)


def pair(shape, density, dtype=DTYPES["bfloat16"], seed=0):
    """Old and new values as NumPy arrays."""
    rng = np.random.default_rng(seed)
    old = rng.normal(0, 20 if dtype.kind == "i" else 0.02, shape).astype(dtype)
    if dtype == np.bool_:
        return old, old ^ (rng.random(shape) < density)
    bits = old.view(f"u{dtype.itemsize}")
    return old, np.where(rng.random(shape) < density, bits + 1, bits).astype(bits.dtype).view(dtype)


def sharding(*spec, shape=(8,)):
    mesh = Mesh(np.asarray(jax.devices()).reshape(shape), ("a", "b")[: len(shape)])
    return NamedSharding(mesh, P(*spec))


def placed(tree, where):
    """NumPy arrays in memory of XLA's own, which it may write over; theirs it may not."""
    flipped_twice = jax.jit(lambda x: jnp.flip(jnp.flip(x, 0), 0), out_shardings=where)
    return jax.block_until_ready(jax.tree.map(flipped_twice, tree))


def raw(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in tree.items()}


def pointers(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def modes(payload, name="w"):
    (tensor,) = [t for t in sparse_delta.inspect(payload).tensors if t.name == name]
    return set(tensor.modes)


@pytest.fixture(autouse=True)
def weights_stay_on_their_devices(monkeypatch):
    """The base digest apart, none of these leaves may be read on the host."""

    def read(*_):
        raise AssertionError("a box of weights was brought to the host")

    monkeypatch.setattr(Unpacker, "_box", read)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("density", [0.003, 0.06, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_densities(dtype, density):
    old, new = pair((160, 512), density, DTYPES[dtype])
    got = apply(placed({"w": old}, None), encode({"w": old}, {"w": new}))
    assert got["w"].dtype == old.dtype
    assert raw(got) == raw({"w": new})


def test_every_mode():
    old, new = pair((3 * 256, 1024), 0.0)
    bits = new.view(np.uint16)
    rng = np.random.default_rng(1)
    bits[:256][rng.random((256, 1024)) < 0.01] += 1
    bits[256:512] = rng.integers(0, 1 << 16, (256, 1024))
    bits[512, :3] += 1
    for conditional in (True, False):
        payload = encode({"w": old}, {"w": new}, conditional=conditional)
        assert {"dense", "entropy"} <= modes(payload)
        got = apply(placed({"w": old}, None), payload)
        assert raw(got) == raw({"w": new})


@pytest.mark.parametrize("mode", [Mode.BLOCK_OFFSET, Mode.BITMAP])
def test_tiles_that_name_positions(mode, monkeypatch):
    """Tables without frequencies leave the modes of fixed width only."""
    monkeypatch.setattr(codec, "make_tables", lambda fmt, *_: codec._no_tables(fmt))
    density = 0.02 if mode == Mode.BLOCK_OFFSET else 0.3
    old, new = pair((256, 512), density)
    payload = encode({"w": old}, {"w": new})
    assert modes(payload) == {mode.name.lower().replace("_", "-")}
    assert raw(apply(placed({"w": old}, None), payload)) == raw({"w": new})


def test_crowded_tiles_come_to_the_host_and_no_others(monkeypatch):
    old, new = pair((1024, 512), 0.002)
    new.view(np.uint16)[300, :60] += 1  # more than there are slots in a sub-block
    read = []
    whole = expand.read_tiles
    monkeypatch.setattr(
        resident.expand, "read_tiles", lambda *a, **k: read.append(a[1]) or whole(*a, **k)
    )
    got = apply(placed({"w": old}, None), encode({"w": old}, {"w": new}))
    assert raw(got) == raw({"w": new})
    assert [starts.tolist() for starts in read] == [[[0, 256, 0]]]


@pytest.mark.parametrize("kernels", ["tpu", "gpu"])
def test_the_kernels_of_accelerators(kernels, monkeypatch):
    for name in ("class_counts", "expand"):
        module = {"tpu": tpu, "gpu": gpu}[kernels]
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    old, new = pair((64, 512), 0.01)
    payload = encode({"w": old}, {"w": new})
    for donate in (False, True):
        got = apply(placed({"w": old}, None), payload, backend=kernels, donate=donate)
        assert raw(got) == raw({"w": new})


# --------------------------------------------------------------------------------------- shardings

RECEIVERS = {
    "one device": (None, False),
    "rows": (sharding("a"), False),
    "columns": (sharding(None, "a"), False),
    "both": (sharding("b", "a", shape=(2, 4)), False),
    "copies": (sharding(), False),
    "copies of columns": (sharding(None, "a", shape=(2, 4)), False),
    "rows that cut tiles": (sharding("a"), True),
    "columns that cut tiles": (sharding(None, "a"), True),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("receiver", RECEIVERS)
def test_from_fsdp_to_other_shardings(receiver, donate):
    where, cut = RECEIVERS[receiver]
    shapes = {"w": (256, 1024), "t": (8, 64, 512), "merged": (16, 8, 8, 256)}
    pairs = {name: pair(shape, 0.02, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    old, new = ({name: both[k] for name, both in pairs.items()} for k in (0, 1))
    receivers = None if cut or where is None else [jax.tree.map(lambda _: where, old)]
    fsdp = sharding("a")
    payload = encode(placed(old, fsdp), placed(new, fsdp), receivers=receivers)
    theirs = placed(old, where)
    before = {name: (pointers(leaf), leaf.sharding) for name, leaf in theirs.items()}
    got = apply(theirs, payload, donate=donate)
    assert raw(got) == raw(new)
    for name, leaf in got.items():
        assert leaf.sharding == before[name][1]
        assert theirs[name].is_deleted() == donate
        if donate and not cut:
            assert pointers(leaf) == before[name][0]


def test_a_donated_tree_is_never_there_twice():
    """Most that ever lives beside the weights: what changes, and one tensor of the rehearsal."""
    old, new = ({f"w{k}": pair((512, 512), 0.01, seed=k)[i] for k in range(6)} for i in (0, 1))
    theirs = placed(old, sharding("a"))
    payload = encode(old, new, receivers=[jax.tree.map(lambda x: x.sharding, theirs)])
    base = sparse_delta.digest(theirs)

    def living():
        return sum(array.nbytes for array in jax.live_arrays())

    before, most = living(), []
    rehearse = ResidentLeaf.rehearse
    write = ResidentLeaf.array

    def watched(self):
        sums = rehearse(self)
        most.append(living())
        return sums

    def written(self):
        array = write(self)
        most.append(living())
        return array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidentLeaf, "rehearse", watched)
        patch.setattr(ResidentLeaf, "array", written)
        got = apply(theirs, payload, base, donate=True)
    assert len(most) == 12
    dense = sum(leaf.nbytes for leaf in old.values())
    # 16 slots of 4 bytes for each 256 elements are an eighth of bf16 weights.
    assert max(most) - before < 0.2 * dense
    assert living() - before < 0.01 * dense
    assert raw(got) == raw(new)


def test_tied_and_shared_weights():
    old, new = pair((256, 512), 0.02)
    other = pair((256, 512), 0.02, seed=1)[1]
    (array,) = placed([old], None)
    tied = {"embed": array, "head": array}
    payload = encode({"embed": old, "head": old}, {"embed": new, "head": new})
    got = apply(tied, payload)
    assert got["embed"] is got["head"]
    assert raw(got) == raw({"embed": new, "head": new})
    # Two tensors that the receiver holds as one array: neither is written over for the other.
    for target in (other, old):
        (array,) = placed([old], None)
        shared = {"a": array, "b": array}
        payload = encode({"a": old, "b": old.copy()}, {"a": new, "b": target})
        got = apply(shared, payload, donate=True)
        assert raw(got) == raw({"a": new, "b": target})


def test_what_did_not_change_and_what_is_small_is_left_alone():
    old, new = pair((256, 512), 0.02)
    small = np.arange(6, dtype=np.float32)
    tree = placed({"hot": old, "cold": old + 1, "small": small}, None)
    payload = encode(
        {"hot": old, "cold": old + 1, "small": small}, {"hot": new, "cold": old + 1, "small": small}
    )
    got = apply(tree, payload, donate=True)
    assert got["cold"] is tree["cold"]
    assert got["small"] is tree["small"]
    assert raw({"hot": got["hot"]}) == raw({"hot": new})


# ---------------------------------------------------------------------------------------- refusals


def forged(payload, at, value=0x55):
    """The payload with one byte of its body changed behind right checksums."""
    start = sparse_delta.inspect(payload).manifest_bytes
    data = bytearray(payload)
    data[start + at] ^= value
    return fuzz.resealed(bytes(data))


@pytest.mark.parametrize("donate", [False, True])
def test_a_refused_payload_leaves_the_weights(donate):
    old, new = pair((256, 512), 0.02)
    payload = encode({"w": old}, {"w": new})
    tree = placed({"w": old}, sharding("a"))
    base = sparse_delta.digest(tree)
    size = sparse_delta.inspect(payload).tensors[0].coded_bytes
    seen = set()
    for at in range(0, size, size // 25):
        with pytest.raises(sparse_delta.CorruptPayload) as refusal:
            apply(tree, forged(payload, at), base, donate=donate)
        seen.add(type(refusal.value).__name__)
        if isinstance(refusal.value, sparse_delta.Damaged):
            assert "bucket 0" in str(refusal.value)
            assert refusal.value.tensor == "w"
    # A changed stream ends otherwise than it should, or makes other values.
    assert seen == {"Damaged", "WrongTarget"}
    assert not tree["w"].is_deleted()
    assert raw(tree) == raw({"w": old})
    with pytest.raises(sparse_delta.WrongBase):
        apply(placed({"w": new}, None), payload, donate=donate)
    assert raw(apply(tree, payload, base, donate=donate)) == raw({"w": new})


def test_the_host_decodes_what_no_kernel_takes():
    old, _ = pair((256, 512), 0.02)
    leaf = trees.named_leaves(placed({"w": old}, None), role="old")[0][0]
    grid = tiles.choose_grid(old.shape)
    assert backends.backend_of(leaf, grid, "tpu") == "tpu"
    assert backends.backend_of(leaf, grid, None) is None  # a CPU
    huge = tiles.TileGrid((1 << 20,), (0, 0), (1, 1 << 19))
    assert backends.backend_of(leaf, huge, "tpu") is None
    numpy_leaf = trees.named_leaves({"w": old}, role="old")[0][0]
    assert backends.backend_of(numpy_leaf, grid, "tpu") is None
