"""Which bytes of a payload a receiver asks for, and what it makes of those it has."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import sparse_delta
from kernels.sparse_delta import host, needs, parse, wire
from kernels.sparse_delta.partial import PartialPayload
from kernels.sparse_delta.tiles import Piece

encode = functools.partial(sparse_delta.encode, threads=1)


@given(
    st.binary(min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=8),
    st.tuples(st.integers(0, 45), st.integers(0, 45)),
)
def test_pieces_in_any_order_make_up_what_they_cover(data, pieces, wanted):
    partial, have = PartialPayload(), set()
    for start, size in pieces:
        partial.add(start, data[start : start + size])
        have |= set(range(start, min(start + size, len(data))))
    start, stop = min(wanted), max(wanted)
    missing = partial.missing(start, stop)
    assert {at for gap in missing for at in gap} == set(range(start, stop)) - have
    assert all(a.stop < b.start for a, b in itertools.pairwise(missing))
    cut = partial.cut(start, stop)
    assert (cut is None) == bool(missing)
    if cut is not None:
        assert cut.tobytes() == data[start:stop]


def test_a_piece_before_the_payload_is_a_mistake():
    with pytest.raises(ValueError, match="from 0, got -1"):
        PartialPayload({-1: b"x"})


def sharded(tree, *spec):
    mesh = Mesh(np.asarray(jax.devices()), ("a",))
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec))), tree)


@pytest.fixture(scope="module")
def weights():
    """Rows over the trainer's devices, columns over the receiver's; buckets of few tiles."""
    rng = np.random.default_rng(0)
    shapes = {"w": (512, 2048), "v": (1024, 1024), "b": (4096,)}
    old = {
        name: rng.normal(0, 0.02, shape).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    new = {
        name: np.where(rng.random(x.shape) < 0.02, x.view("u2") + 1, x.view("u2"))
        .astype("u2")
        .view(x.dtype)
        for name, x in old.items()
    }
    receiver = {name: sharded(x, *(None,) * (x.ndim - 1), "a") for name, x in old.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "BUCKET_BYTES", 1000)
        payload = encode(sharded(old, "a"), sharded(new, "a"), receivers=[receiver])
    return old, new, receiver, payload


def held_by(device):
    """`host.held` of a process that has one device."""

    def held(leaf):
        return tuple(Piece(p.box, (device,), True) for p in host_held(leaf) if device in p.devices)

    host_held = host.held
    return held


def tiles_within(payload, receiver, device):
    """By brute force: the buckets of tiles of which the device holds an element."""
    parsed = parse.read(payload)
    wanted = set()
    for run, _, buckets in parsed.located():
        tensor = parsed.manifest.tensors[run.tensor]
        shape = tensor.grid.shape
        index = receiver[tensor.name].sharding.devices_indices_map(shape)[device]
        mine = np.zeros(shape, bool)
        mine[index] = True
        mine = mine.reshape(tensor.grid.extents)
        for tile, bucket in zip(run.tiles.ids, buckets, strict=True):
            lead, row, col = (int(at[0]) for at in tensor.grid.places(np.asarray([tile])))
            high, wide = tensor.grid.tile
            if mine[lead, row : row + high, col : col + wide].any():
                wanted.add(int(bucket))
    return wanted


def test_a_device_asks_for_the_buckets_of_its_tiles(weights, monkeypatch):
    _, _, receiver, payload = weights
    info = sparse_delta.inspect(payload)
    body = len(payload) - info.manifest_bytes
    asked = []
    for device in jax.devices():
        with monkeypatch.context() as patch:
            patch.setattr(needs.host, "held", held_by(device))
            ranges = sparse_delta.needed(receiver, payload[: info.manifest_bytes])
        inside = {
            k
            for k, (start, size) in enumerate(info.buckets)
            if any(r.start <= start and start + size <= r.stop for r in ranges)
        }
        assert inside == tiles_within(payload, receiver, device)
        assert sum(map(len, ranges)) == sum(info.buckets[k][1] for k in inside)
        # One stretch, an eighth of the payload and a bucket at either end.
        assert len(ranges) == 1
        assert len(ranges[0]) < body / 8 + 2 * 1200
        asked += ranges
    assert min(r.start for r in asked) == info.manifest_bytes
    assert max(r.stop for r in asked) == len(payload)


def test_cut_tiles_are_asked_for_whole(weights):
    """They are put together in the process."""
    old, new, *_ = weights
    payload = encode(old, new)
    rows = sharded({"w": old["w"], "v": old["v"]}, "a") | {"b": old["b"]}
    (asked,) = sparse_delta.needed(rows, payload[:20_000])
    assert asked.stop == len(payload)


def test_what_is_asked_for_is_enough(weights):
    _, new, receiver, payload = weights
    rounds = []
    partial = sparse_delta.PartialPayload()
    while missing := sparse_delta.needed(receiver, partial):
        rounds.append(missing)
        for wanted in missing:
            partial.add(wanted.start, payload[wanted.start : wanted.stop])
    assert rounds[0] == [range(32)]
    assert [len(ranges) for ranges in rounds] == [1, 1, 1]
    got = sparse_delta.apply(receiver, partial, threads=1)
    assert all(np.asarray(got[name]).tobytes() == new[name].tobytes() for name in new)
    assert sparse_delta.inspect(partial) == sparse_delta.inspect(payload)


def test_bytes_that_are_not_here_are_named(weights):
    _, _, receiver, payload = weights
    info = sparse_delta.inspect(payload)
    start, size = info.buckets[3]
    pieces = {0: payload[:start], start + size: payload[start + size :]}
    missing = PartialPayload(pieces)
    assert sparse_delta.needed(receiver, missing) == [range(start, start + size)]
    with pytest.raises(sparse_delta.Incomplete, match=f"bucket 3 .* {start} … ") as refusal:
        sparse_delta.apply(receiver, missing, threads=1)
    assert refusal.value.bucket == 3
    assert sparse_delta.inspect(missing).target_digest == info.target_digest
    with pytest.raises(sparse_delta.Incomplete, match="the manifest is not here"):
        sparse_delta.apply(receiver, PartialPayload({0: payload[:40]}), threads=1)


def test_every_bit_of_what_is_here_counts(weights):
    """A flipped bit of a bucket that is asked for, of the manifest and of the header."""
    _, _, receiver, payload = weights
    start, size = sparse_delta.inspect(payload).buckets[3]
    for at in (5, 20, 28, 90, start - 3, start, start + size - 1):
        flipped = bytearray(payload)
        flipped[at] ^= 4
        with pytest.raises(sparse_delta.CorruptPayload) as refusal:
            sparse_delta.apply(receiver, PartialPayload({0: bytes(flipped)}), threads=1)
        assert (refusal.value.bucket == 3) == (at >= start)


def test_a_header_cannot_promise_more_than_the_weights_warrant(weights):
    _, _, receiver, payload = weights
    huge = bytearray(payload[: sparse_delta.inspect(payload).manifest_bytes])
    wire.HEADER.pack_into(huge, 0, wire.MAGIC, wire.FORMAT_VERSION, len(huge) - 32, 1 << 60, 0)
    seal = xxhash.xxh3_64_intdigest(bytes(huge[:24] + huge[32:]))
    huge[24:32] = seal.to_bytes(8, "little")
    with pytest.raises(sparse_delta.Damaged, match="more than the receiver's tensors allow"):
        sparse_delta.needed(receiver, bytes(huge))
    with pytest.raises(sparse_delta.Damaged, match="more than the receiver's tensors allow"):
        sparse_delta.needed(receiver, bytes(huge[:32]))  # nor have its manifest fetched
