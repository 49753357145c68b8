"""Damage, mix-ups and hostile payloads: all are refused by name, and weights stay as they are."""

import dataclasses
import importlib.util
import itertools
import random
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import zstandard

from kernels import sparse_delta
from kernels.sparse_delta import parse, wire
from kernels.sparse_delta.tiles import TileGrid
from kernels.sparse_delta.wire import Manifest, Run, Tensor, Tiles

_FUZZ = Path(__file__).parent / "fuzz" / "target.py"
_spec = importlib.util.spec_from_file_location("sparse_delta_fuzz_target", _FUZZ)
assert _spec is not None
assert _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)


@pytest.fixture(scope="module")
def small():
    """Old and new weights of a few hundred bytes, and the payload between."""
    old = {
        "w": (np.arange(96, dtype=np.uint16) * 37 + 0x3C00).view(ml_dtypes.bfloat16).reshape(8, 12),
        "b": np.arange(5, dtype=np.float32),
    }
    new = {name: leaf.copy() for name, leaf in old.items()}
    new["w"].view(np.uint16)[::3, ::2] += 1
    new["b"][1] = -0.0
    return old, new, sparse_delta.encode(old, new, version=3, base_version=2)


def tree_bytes(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in tree.items()}


def refused_or_right(old, new, payload):
    """The refusal, or None where the result is what it should be."""
    try:
        got = sparse_delta.apply(old, payload, threads=1)
    except sparse_delta.CorruptPayload as refusal:
        return refusal
    assert tree_bytes(got) == tree_bytes(new)
    return None


def test_truncation_at_every_byte(small):
    old, new, payload = small
    for size in range(len(payload)):
        assert refused_or_right(old, new, payload[:size]) is not None, size
    assert refused_or_right(old, new, payload + b"\0") is not None


def test_every_single_bit_flip(small):
    old, new, payload = small
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        assert refused_or_right(old, new, bytes(flipped)) is not None, bit


def test_every_single_bit_flip_behind_right_checksums(small):
    """What a bug or an attacker that knows the checksums could write."""
    old, new, payload = small
    before = tree_bytes(old)
    reasons = set()
    for bit in range(8 * wire.HEADER.size, 8 * len(payload), 3):  # all bits of a byte by turns
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        refusal = refused_or_right(old, new, fuzz.resealed(bytes(flipped)))
        reasons.add(type(refusal).__name__)
    assert tree_bytes(old) == before
    # The versions are the caller's own, so a flip there changes nothing.
    assert {"NoneType", "Damaged", "WrongBase", "WrongTarget", "WrongModel"} <= reasons


def test_truncation_of_the_body_behind_right_checksums(small):
    old, new, payload = small
    start = sparse_delta.inspect(payload).manifest_bytes
    for size in range(start, len(payload)):
        assert refused_or_right(old, new, fuzz.resealed(payload[:size])) is not None


def test_random_damage_of_the_corpus():
    rng = random.Random(5)
    corpus = [path.read_bytes() for path in sorted(fuzz.CORPUS.glob("*.bin"))]
    assert len(corpus) >= 8
    outcomes = {fuzz.attempt(fuzz.mutated(rng.choice(corpus), rng)) for _ in range(500)}
    assert {"applied", "Damaged", "UnknownFormat", "WrongBase", "WrongModel"} <= outcomes


@pytest.mark.parametrize("path", sorted(fuzz.CORPUS.glob("*.bin")), ids=lambda path: path.stem)
def test_the_corpus_is_of_this_format(path):
    """A change of the format has to change its version: payloads of this one stay readable."""
    outcome = fuzz.attempt(path.read_bytes())
    assert outcome == ("WrongBase" if path.stem == "wrong_base" else "applied")


def test_a_damaged_bucket_is_named_and_weights_stay(monkeypatch):
    monkeypatch.setattr(wire, "BUCKET_BYTES", 20_000)
    rng = np.random.default_rng(0)
    old = {"a": rng.integers(0, 256, (300, 300), np.uint8), "b": np.arange(70_000, dtype=np.int16)}
    new = {"a": rng.integers(0, 256, (300, 300), np.uint8), "b": old["b"] + 1}
    payload = bytearray(sparse_delta.encode(old, new))
    buckets = sparse_delta.inspect(payload).buckets
    assert len(buckets) > 1
    payload[buckets[1][0] + 5] ^= 16
    before = tree_bytes(old)
    with pytest.raises(sparse_delta.Damaged, match="bucket 1 is damaged") as refusal:
        sparse_delta.apply(old, payload)
    assert refusal.value.bucket == 1
    assert tree_bytes(old) == before
    with pytest.raises(sparse_delta.Damaged, match="bucket 1 is damaged"):
        sparse_delta.inspect(payload)


def test_delivery_out_of_order_and_twice():
    versions = [{"w": np.full((30, 30), value, np.float16)} for value in (1.0, 1.5, 1.25)]
    first, second = (
        sparse_delta.encode(old, new, base_version=k, version=k + 1)
        for k, (old, new) in enumerate(itertools.pairwise(versions))
    )
    with pytest.raises(sparse_delta.WrongBase, match=r"\(version 1\).*apply the versions in order"):
        sparse_delta.apply(versions[0], second)
    held = sparse_delta.apply(versions[0], first)
    with pytest.raises(sparse_delta.WrongBase):
        sparse_delta.apply(held, first)
    assert tree_bytes(sparse_delta.apply(held, second)) == tree_bytes(versions[2])


@pytest.mark.parametrize(
    ("receiver", "message"),
    [
        ({"w": np.zeros((3, 4), np.int8)}, r"'w' int8\[4, 3\] where the receiver has"),
        ({"w": np.zeros((4, 3), np.uint8)}, r"where the receiver has 'w' uint8\[4, 3\]"),
        ({"v": np.zeros((4, 3), np.int8)}, r"the payload has 'w'"),
        ({}, "1 tensors are more than the receiver's tensors allow"),
        (
            {"w": np.zeros((4, 3), np.int8), "x": np.zeros(3, np.int8)},
            "the payload is of 1 tensors, the receiver has 2",
        ),
    ],
)
def test_a_payload_of_another_model(receiver, message):
    payload = sparse_delta.encode(None, {"w": np.ones((4, 3), np.int8)})
    with pytest.raises(sparse_delta.CorruptPayload, match=message):
        sparse_delta.apply(receiver, payload)


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 32, b"PK\3\4" + bytes(100), bytes(5000)])
def test_what_is_no_payload(data):
    with pytest.raises(sparse_delta.CorruptPayload):
        sparse_delta.apply({}, data)
    with pytest.raises(sparse_delta.CorruptPayload):
        sparse_delta.inspect(data)


def test_a_newer_format_is_named(small):
    old, _, payload = small
    newer = payload[:8] + struct.pack("<I", 3) + payload[12:]
    with pytest.raises(sparse_delta.UnknownFormat, match=r"format version 3; this code reads 2"):
        sparse_delta.apply(old, newer)


# ------------------------------------------------------------------ manifests that nobody writes


def forged(change, data=b"\1\2\3\4", **fields):
    """A whole anchor of one int8 tensor (4,) whose manifest was tampered with before sealing."""
    tensor = Tensor(name="w", dtype="int8", grid=TileGrid((4,), (0, 0), (1, 4)), same=0)
    tiles = Tiles(*(np.asarray([x], t) for x, t in ((0, "i8"), (4, "u1"), (4, "u4"), (4, "u4"))))
    table = sparse_delta_tables()
    manifest = Manifest(
        kind=wire.ANCHOR,
        part=None,
        version=None,
        base_version=None,
        base_root=bytes(16),
        target_root=sparse_delta.digest({"w": np.frombuffer(data, np.int8)}).root,
        tensors=(tensor,),
        tables=(("int8", table),),
        runs=(Run(0, 0, tiles),),
    )
    return wire.write(change(dataclasses.replace(manifest, **fields)), [memoryview(data)])


def sparse_delta_tables():
    payload = sparse_delta.encode(None, {"w": np.asarray([1, 2, 3, 4], np.int8)})
    return parse.read(payload).manifest.tables[0][1]


def with_tiles(**columns):
    def change(manifest):
        run = manifest.runs[0]
        arrays = {
            name: np.asarray(value, getattr(run.tiles, name).dtype)
            for name, value in columns.items()
        }
        tiles = dataclasses.replace(run.tiles, **arrays)
        return dataclasses.replace(manifest, runs=(dataclasses.replace(run, tiles=tiles),))

    return change


def with_tensor(**fields):
    def change(manifest):
        tensor = dataclasses.replace(manifest.tensors[0], **fields)
        return dataclasses.replace(manifest, tensors=(tensor,))

    return change


def test_the_forger_can_also_be_honest():
    got = sparse_delta.apply({"w": np.zeros(4, np.int8)}, forged(lambda manifest: manifest))
    assert np.asarray(got["w"]).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_tiles(ids=[1]), "tile 1 is beyond its grid"),
        (with_tiles(modes=[77]), "bucket 0 is damaged: w, tile 0 of the tensor"),
        (with_tiles(nnz=[1 << 21]), "more changes than 1048576"),
        (with_tiles(modes=[3]), "bucket 0 is damaged: w, tile 0 of the tensor"),
        (with_tensor(same=-1), "tied to a tensor before the first one"),
        (with_tensor(grid=TileGrid((2, 2), (0, 0), (1, 4))), "where the receiver has"),
        (with_tensor(grid=TileGrid((4,), (0, 0), (1, 1))), "an anchor has to hold all 4 tiles"),
        (with_tensor(grid=TileGrid((1 << 40,), (0, 0), (1, 4))), "more tiles than can be"),
        (with_tensor(target=(1, 2)), "what came out is not what went in"),
        (lambda m: dataclasses.replace(m, target_root=bytes(16)), "what came out is not"),
        (lambda m: dataclasses.replace(with_tensor(base=(0, 0))(m), part=(0, 1)), "out of bounds"),
        (lambda m: dataclasses.replace(m, tables=(("int8", b""),)), "coder's tables 0"),
        (lambda m: dataclasses.replace(m, tables=m.tables * 2), "contradict each other"),
    ],
)
def test_forged_fields_are_refused(change, message):
    old = {"w": np.arange(4, dtype=np.int8)}
    payload = forged(change)
    with pytest.raises(sparse_delta.CorruptPayload, match=message):
        sparse_delta.apply(old, payload)
    assert old["w"].tolist() == [0, 1, 2, 3]


def test_a_tile_that_is_there_twice(monkeypatch):
    def twice(manifest):
        return dataclasses.replace(manifest, runs=manifest.runs * 2)

    run = forged(lambda m: m)
    manifest = twice(parse.read(run).manifest)
    payload = wire.write(manifest, [memoryview(b"\1\2\3\4"), memoryview(b"\1\2\3\4")])
    with pytest.raises(sparse_delta.Damaged, match="w: a tile is there twice"):
        sparse_delta.inspect(payload)


def with_tensor_table(payload, compressed, raw_size):
    """A payload whose first section is another one, resealed."""
    manifest_size = struct.unpack_from("<I", payload, 12)[0]
    manifest = payload[wire.HEADER.size : wire.HEADER.size + manifest_size]
    first = wire.FIXED.size
    _, _, stored = wire.SECTION.unpack_from(manifest, first)
    rest = manifest[first + wire.SECTION.size + stored :]
    section = wire.SECTION.pack(wire.ZSTD, raw_size, len(compressed)) + compressed
    grown = manifest[:first] + section + rest
    head = wire.HEADER.pack(wire.MAGIC, wire.FORMAT_VERSION, len(grown), 0, 0)
    return fuzz.resealed(head + grown + payload[wire.HEADER.size + manifest_size :])


@pytest.mark.parametrize("named", [False, True])
def test_a_bomb_is_not_inflated(monkeypatch, named):
    """A section that would grow beyond what payload and receiver warrant is never decompressed."""
    bomb = zstandard.ZstdCompressor(write_content_size=named).compress(bytes(1 << 28))
    data = with_tensor_table(forged(lambda manifest: manifest), bomb, 1 << 28)
    lying = with_tensor_table(forged(lambda manifest: manifest), bomb, 60)
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: pytest.fail("inflated"))
    with pytest.raises(sparse_delta.Damaged, match="bytes of tensor table are more than"):
        sparse_delta.apply({"w": np.zeros(4, np.int8)}, data)
    with pytest.raises(sparse_delta.Damaged, match="more than the payload warrants"):
        sparse_delta.inspect(data)
    if named:
        with pytest.raises(sparse_delta.Damaged, match="268435456 bytes by their frame, not 60"):
            sparse_delta.inspect(lying)
        return
    monkeypatch.undo()
    with pytest.raises(sparse_delta.Damaged):
        sparse_delta.inspect(lying)


def test_a_frame_with_a_huge_window_is_refused():
    window = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=window).compressobj()
    frame = compressor.compress(bytes(40)) + compressor.flush()
    with pytest.raises(sparse_delta.Damaged, match="want a window of 134217728 bytes"):
        sparse_delta.inspect(with_tensor_table(forged(lambda manifest: manifest), frame, 40))


def test_parts_are_not_applied_and_merge_wants_all_of_them():
    old = {"w": jnp.zeros((4, 4), jnp.int8)}
    whole = sparse_delta.encode(old, jax.tree.map(lambda x: x + 1, old))
    with pytest.raises(ValueError, match="merge joins parts"):
        sparse_delta.merge([whole])
    with pytest.raises(ValueError, match="merge joins parts"):
        sparse_delta.merge([])
