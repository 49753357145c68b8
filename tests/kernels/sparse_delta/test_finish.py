"""The device half and the host half together, against the direct way over the host."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import sparse_delta
from kernels.sparse_delta import codec, host, records, trees
from kernels.sparse_delta.elements import element_format


def raw(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def pair(density, dtype=ml_dtypes.bfloat16, shape=(300, 520)):
    rng = np.random.default_rng(1)
    old = rng.normal(scale=0.02, size=shape).astype(dtype)
    words = np.array(old).view(f"u{old.dtype.itemsize}")
    where = rng.random(shape) < density
    words[where] += rng.geometric(0.7, where.sum()).astype(words.dtype)
    return old, words.view(dtype)


@pytest.mark.parametrize("density", [0.0, 0.0005, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, ml_dtypes.float8_e4m3fn])
def test_finish_after_diff_rebuilds_the_weights(density, dtype):
    old, new = pair(density, dtype)
    old, new = ({"w": jnp.asarray(x), "b": jnp.asarray(x[0, :7])} for x in (old, new))
    payload = sparse_delta.finish(sparse_delta.diff(old, new), version=2, base_version=1)
    assert raw(sparse_delta.apply(old, payload)) == raw(new)
    info = sparse_delta.inspect(payload)
    assert (info.version, info.base_version) == (2, 1)
    assert info.target_digest == sparse_delta.digest(new)
    direct = sparse_delta.encode(old, new, version=2, base_version=1)
    assert sparse_delta.inspect(direct).changed == info.changed or density == 1.0
    # The device chooses classes from a sample; the host from a survey of all.
    assert len(payload) < 1.1 * len(direct) + 100


def test_with_the_hosts_classes_the_bytes_are_the_hosts():
    old, new = pair(0.01)
    fmt = element_format(old.dtype)
    boxes = [tuple(x.view(np.uint16).reshape(1, *x.shape) for x in (old, new))]
    tables = codec.make_tables(fmt, boxes, (256, 512))
    thresholds = {"bfloat16": tables.thresholds.tolist()}
    trees = {"w": jnp.asarray(old)}, {"w": jnp.asarray(new)}
    delta = sparse_delta.diff(*trees, thresholds=thresholds)
    assert sparse_delta.finish(delta) == sparse_delta.encode(*trees)


def test_sharded_under_jit():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("a", "b"))
    old, new = pair(0.02, shape=(64, 256))
    split = NamedSharding(mesh, P("a", "b"))
    trees = [{"w": jax.device_put(x, split), "s": jnp.float32(x[0, 0])} for x in (old, new)]
    delta = sparse_delta.diff(*trees)
    payload = sparse_delta.finish(delta)
    assert raw(sparse_delta.apply({"w": old, "s": np.asarray(trees[0]["s"])}, payload)) == raw(
        trees[1]
    )
    assert sparse_delta.inspect(payload).tensors[1].tile == (32, 64)


def test_blocks_that_overflow_their_slots():
    old, new = pair(0.0005)
    burst = np.array(new)
    burst.view(np.uint16)[:20] ^= 3
    trees = {"w": jnp.asarray(old)}, {"w": jnp.asarray(burst)}
    delta = sparse_delta.diff(*trees, density=0.001)
    payload = sparse_delta.finish(delta)
    assert raw(sparse_delta.apply(trees[0], payload)) == raw(trees[1])
    known = sparse_delta.digest(trees[0])
    assert sparse_delta.finish(delta, base_digest=known) == payload


def test_a_tile_that_is_smallest_dense_has_no_records():
    rng = np.random.default_rng(0)
    n = 300
    rows = [np.arange(n), np.zeros(n), np.arange(n), rng.integers(0, 65535, n)]
    found = np.stack(rows).astype(np.uint32)
    totals = np.array([n, 0, 0, 0, 0, 0, 0, 0])
    fmt = element_format(ml_dtypes.bfloat16)
    assert records.encode_records(found, totals, n, fmt, codec.make_tables(fmt, [], (1, 1))) is None


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.int8, np.bool_])
def test_digests_of_devices_are_those_of_the_host(dtype):
    rng = np.random.default_rng(0)
    tensor = rng.integers(0, 2, (5, 6, 7)).astype(dtype)
    leaf = trees.named_leaves([jnp.asarray(tensor)], role="new")[0][0]
    whole = host.digest_sums(leaf, host.grid_of(leaf), spread=False)
    boxes = [((0, 5), (0, 4), (0, 7)), ((0, 5), (4, 6), (0, 3)), ((0, 5), (4, 6), (3, 7))]
    parts = [
        host.device_sums(jnp.asarray(tensor[tuple(slice(*edges) for edges in box)]), leaf, box)
        for box in boxes
    ]
    assert trees.add(*parts) == whole


def test_encode_takes_the_device_half_on_accelerators(monkeypatch):
    """No accelerator is at hand here; what is tested is the way, on arrays of a CPU."""
    old, new = pair(0.01)
    pairs = {"w": jnp.asarray(old)}, {"w": jnp.asarray(new)}
    direct = sparse_delta.encode(*pairs, version=1)
    monkeypatch.setattr(host, "on_accelerators", lambda leaves: True)
    assert sparse_delta.encode(*pairs, version=1) == sparse_delta.finish(
        sparse_delta.diff(*pairs), version=1
    )
    assert sparse_delta.encode(*pairs, version=1) != direct  # the device chose the classes
