"""The bytes of payloads: what FORMAT.md shows, cutting into buckets, and what manifests cost."""

import re
from pathlib import Path

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from kernels import sparse_delta
from kernels.sparse_delta import parse, wire
from kernels.sparse_delta.tiles import TileGrid
from kernels.sparse_delta.wire import Manifest, Run, Tensor, Tiles

_FORMAT = Path(sparse_delta.__file__).parent / "FORMAT.md"


def test_the_example_of_the_specification():
    block = _FORMAT.read_text().split("## An example")[1].split("```")[1]
    example = bytearray()
    for line in block.strip("\n").splitlines():
        offset, data = re.fullmatch(r" *(\d+)  ((?:[0-9a-f]{2} ?)+) .*", line).groups()
        assert int(offset) == len(example)
        example += bytes.fromhex(data)
    bits = np.array([[1.0, 2.0, -3.0], [-0.0, 5.0, 6.0]], ml_dtypes.bfloat16)
    old, new = {"w": bits}, {"w": bits.copy()}
    new["w"][0, 1], new["w"][1, 0] = 2.015625, 0.0
    got = sparse_delta.apply(old, example)
    assert got["w"].tobytes() == new["w"].tobytes()
    info = sparse_delta.inspect(example)
    assert (info.version, info.base_version, info.changed) == (7, 6, 2)
    assert dict(info.tensors[0].modes) == {"bitmap": 1}
    # Nothing in it is compressed, so that it does not hang on a version of zstd.
    assert sparse_delta.encode(old, new, version=7, base_version=6) == example
    assert sparse_delta.digest(old).sums == {"w": (741444657, 877939985)}
    assert sparse_delta.digest(new).sums == {"w": (418228183, 1212689693)}


@st.composite
def manifests(draw):
    """Arguments of manifests that hold together, with the bytes of their runs."""
    n = draw(st.integers(1, 4))
    names = sorted(draw(st.sets(st.text(max_size=5), min_size=n, max_size=n)), key=str.encode)
    dtypes = draw(st.lists(st.sampled_from(["bfloat16", "int8"]), min_size=n, max_size=n))
    shapes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=n, max_size=n))
    tile = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    runs = []
    for index, shape in enumerate(shapes):
        count = -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])
        ids = sorted(draw(st.sets(st.integers(0, count - 1), max_size=6)))
        cut = draw(st.integers(0, len(ids)))
        # Tiles that rise are one run when they are read.
        runs += [(index, part) for part in (ids[cut:], ids[:cut]) if part]
    sizes = [draw(st.lists(st.integers(0, 40), min_size=len(i), max_size=len(i))) for _, i in runs]
    versions = draw(st.tuples(*[st.one_of(st.none(), st.integers(0, (1 << 63) - 1))] * 2))
    part = draw(st.sampled_from([None, (0, 1), (2, 5)]))
    sums = draw(st.lists(st.tuples(*[st.integers(0, (1 << 32) - 1)] * 4), min_size=n, max_size=n))
    return (
        names,
        dtypes,
        shapes,
        tile,
        runs,
        sizes,
        versions,
        part,
        sums,
        draw(st.binary(max_size=30)),
    )


@settings(max_examples=80, deadline=None)
@given(manifests(), st.integers(1, 100))
def test_manifests_read_as_they_were_written(case, bucket_bytes):
    names, dtypes, shapes, tile, runs, sizes, versions, part, sums, table = case
    rng = np.random.default_rng(0)
    tensors = tuple(
        Tensor(
            name=names[k],
            dtype=dtypes[k],
            grid=TileGrid(shapes[k], (0, 1), tile),
            same=k,
            target=sums[k][:2] if part or k % 2 else None,
            base=sums[k][2:] if part else None,
        )
        for k in range(len(names))
    )
    used = sorted({dtypes[index] for index, _ in runs})
    written_runs = []
    for (index, ids), own in zip(runs, sizes, strict=True):
        columns = (
            np.asarray(ids, np.int64),
            rng.integers(0, 255, len(ids)).astype(np.uint8),
            rng.integers(0, 1 << 20, len(ids)).astype(np.uint32),
            np.asarray(own, np.uint32),
        )
        written_runs.append(Run(index, used.index(dtypes[index]), Tiles(*columns)))
    manifest = Manifest(
        kind=wire.DELTA,
        part=part,
        version=versions[0],
        base_version=versions[1],
        base_root=rng.bytes(16),
        target_root=rng.bytes(16),
        tensors=tensors,
        tables=tuple((dtype, table) for dtype in used),
        runs=tuple(written_runs),
    )
    chunks = [rng.bytes(sum(own)) for own in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "BUCKET_BYTES", bucket_bytes)
        payload = wire.write(manifest, [memoryview(chunk) for chunk in chunks])
    parsed = parse.read(payload)
    parsed.verify()
    for field in ("kind", "part", "version", "base_version", "base_root", "target_root"):
        assert getattr(parsed.manifest, field) == getattr(manifest, field)
    assert parsed.manifest.tensors == tensors
    assert parsed.manifest.tables == manifest.tables
    for run, want, (_, starts, buckets), chunk in zip(
        parsed.manifest.runs, written_runs, parsed.located(), chunks, strict=True
    ):
        assert (run.tensor, run.table) == (want.tensor, want.table)
        for column in ("ids", "modes", "nnz", "sizes"):
            assert np.array_equal(getattr(run.tiles, column), getattr(want.tiles, column))
        if chunk:
            assert payload[int(starts[0]) :].startswith(chunk)
        # No tile lies in two buckets, and none but a lone one is larger than asked for.
        ends = starts + run.tiles.sizes
        assert np.all(starts >= parsed.offsets[buckets])
        assert np.all(ends <= parsed.offsets[buckets + 1])
    for count, size in zip(parsed.buckets["tiles"], parsed.buckets["size"], strict=True):
        assert size <= bucket_bytes or count == 1
    assert parsed.offsets[-1] == len(payload)


def test_the_directory_costs_few_bytes_a_tile():
    """About 3 of 13 bytes are left of an entry: tiles follow one another and sizes are alike."""
    rng = np.random.default_rng(0)
    n = 20_000
    grid = TileGrid((n * 256, 512), (0, 1), (256, 512))
    nnz = rng.binomial(131_072, 0.0062, n).astype(np.uint32)
    tiles = Tiles(
        np.arange(n), np.full(n, 3, np.uint8), nnz, nnz + rng.integers(-20, 20, n).astype("u4")
    )
    manifest = Manifest(
        kind=wire.DELTA,
        part=None,
        version=1,
        base_version=0,
        base_root=bytes(16),
        target_root=bytes(16),
        tensors=(Tensor(name="w", dtype="bfloat16", grid=grid, same=0),),
        tables=(("bfloat16", b""),),
        runs=(Run(0, 0, tiles),),
    )
    body = bytes(int(tiles.sizes.sum()))
    payload = wire.write(manifest, [memoryview(body)])
    assert len(payload) - len(body) < 3.2 * n
    assert np.array_equal(parse.read(payload).manifest.runs[0].tiles.nnz, nnz)


def test_thousands_of_small_leaves_cost_few_bytes_each():
    rng = np.random.default_rng(0)
    old = {
        f"layers/{k // 20}/block/{k % 20}/scale": rng.normal(size=16).astype(np.float16)
        for k in range(300)
    }
    new = {name: leaf * np.float16(1.5) for name, leaf in old.items()}
    payload = sparse_delta.encode(old, new, threads=1)
    got = sparse_delta.apply(old, payload, threads=1)
    assert all(got[name].tobytes() == new[name].tobytes() for name in new)
    assert sparse_delta.inspect(payload).manifest_bytes < 10 * len(old)
    nothing = sparse_delta.encode(old, old)
    assert len(nothing) < 4 * len(old) + 200


def test_a_name_that_is_too_long_is_told():
    tree = {"n" * (1 << 14): np.zeros(1, np.int8)}
    with pytest.raises(ValueError, match="a leaf's name must be below 16384 bytes"):
        sparse_delta.encode(None, tree)
