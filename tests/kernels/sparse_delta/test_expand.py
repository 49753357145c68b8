"""The receiver's device half: from classes and ranks back to the new bits."""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels.sparse_delta import expand as receiver
from kernels.sparse_delta import reference, tpu
from kernels.sparse_delta.delta import diff, shard_records
from kernels.sparse_delta.elements import element_format

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "bool": np.dtype(np.bool_),
}
BF16 = element_format("bfloat16")


def pair(shape, dtype, density, seed=0):
    rng = np.random.default_rng(seed)
    fmt = element_format(dtype)
    old = rng.normal(0, 20 if fmt.kind != "float" else 0.02, shape).astype(dtype)
    bits = old.view(fmt.bits_dtype)
    new = np.where(rng.random(shape) < density, bits ^ fmt.bits_dtype.type(1), bits)
    return jnp.asarray(old), jnp.asarray(new.view(dtype))


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(element_format(array.dtype).bits_dtype)


def received(old, new, *, backend="reference", donate=False, **options):
    """What a receiver makes of the sender's records, and which tiles it could not."""
    delta = diff(old, new)
    (shard,) = shard_records(delta, 0)
    fmt = element_format(old.dtype)
    own = {"grid": delta.grids[0], "backend": backend}
    packed = receiver.class_counts(old, delta.thresholds[0], **own)
    change = reference.change_of(jnp.asarray(shard.old), jnp.asarray(shard.new), fmt)
    slots, dense = receiver.make_slots(
        reference.class_count_table(np.asarray(packed)),
        shard.starts,
        shard.class_,
        shard.rank,
        np.asarray(change),
        fmt=fmt,
        **options,
    )
    return receiver.expand(old, slots, delta.thresholds[0], donate=donate, **own), slots, dense


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_receiver_rebuilds_a_shard_from_classes_and_ranks(dtype):
    old, new = pair((96, 640), DTYPES[dtype], 0.01)
    got, _, dense = received(old, new)
    assert got.dtype == new.dtype
    assert not dense.any()
    np.testing.assert_array_equal(bits(got), bits(new))


def test_the_same_with_the_kernels_of_a_tpu(monkeypatch):
    for name in ("class_counts", "expand"):
        monkeypatch.setattr(tpu, name, functools.partial(getattr(tpu, name), interpret=True))
    old, new = pair((64, 512), DTYPES["bfloat16"], 0.01)
    got, _, _ = received(old, new, backend="tpu")
    np.testing.assert_array_equal(bits(got), bits(new))


def test_old_is_given_up_when_donated_only():
    old, new = pair((32, 256), DTYPES["bfloat16"], 0.01)
    kept, _, _ = received(old, new)
    assert not old.is_deleted()
    got, _, _ = received(old, new, donate=True)
    assert old.is_deleted()
    np.testing.assert_array_equal(bits(got), bits(kept))


def test_crowded_tiles_are_left_to_the_host():
    old, new = pair((1024, 512), DTYPES["bfloat16"], 0.002)
    new = new.at[300, :60].set(-old[300, :60])  # more than 32 changes in a sub-block
    got, slots, dense = received(old, new)
    assert dense.tolist() == [False, True, False, False]
    assert slots.tiles.tolist() == [0, 2, 3]
    np.testing.assert_array_equal(bits(got)[:256], bits(new)[:256])
    np.testing.assert_array_equal(bits(got)[256:512], bits(old)[256:512])
    np.testing.assert_array_equal(bits(got)[512:], bits(new)[512:])


def test_nothing_changed():
    old, _ = pair((32, 256), DTYPES["bfloat16"], 0.0)
    got, slots, dense = received(old, old)
    assert int(slots.used) == 0
    assert not dense.any()
    np.testing.assert_array_equal(bits(got), bits(old))


def test_a_rank_that_the_class_has_not_is_refused():
    counts = np.zeros((1, 32, 8), np.uint16)
    counts[:, :, 3] = 256
    options = {"fmt": BF16, "change": np.array([1], np.uint16), "starts": np.array([0, 1])}
    last = np.array([32 * 256 - 1], np.uint32)
    slots, _ = receiver.make_slots(counts, class_=np.array([3], np.uint8), rank=last, **options)
    assert np.asarray(slots.keys)[0, 0, 31] == (3 << 8 | 255) << 16 | 1
    for class_, rank in ((3, last + 1), (2, last * 0)):
        with pytest.raises(ValueError, match="rank"):
            receiver.make_slots(counts, class_=np.array([class_], np.uint8), rank=rank, **options)
