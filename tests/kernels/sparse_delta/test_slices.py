"""Shards worked through slice by slice give what they give as a whole."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import sparse_delta
from kernels.sparse_delta import expand, gpu, gpu_compact, reference, slices, tpu
from kernels.sparse_delta.delta import _reached, diff
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.reference import Slots
from kernels.sparse_delta.tiles import TileGrid, box_view, choose_grid

BF16 = element_format("bfloat16")
LIMITS = np.arange(120, 127, dtype=np.int32)
# Name: shape, grid; each is cut along another dimension.
LEAVES = {
    "layers": ((6, 64, 4, 128), TileGrid((6, 64, 4, 128), (1, 2), (32, 256))),
    "a layer of several dimensions": ((1, 5, 64, 72), TileGrid((1, 5, 64, 72), (2, 3), (64, 24))),
    "rows": ((96, 300), TileGrid((96, 300), (0, 1), (16, 100))),
    "rows of several indices": ((12, 8, 300), TileGrid((12, 8, 300), (0, 2), (16, 100))),
    "columns": ((64, 300), TileGrid((64, 300), (0, 1), (64, 20))),
    "a clipped tile at the end": ((100, 300), TileGrid((100, 300), (0, 1), (16, 300))),
    "a vector of two dimensions": ((150, 90), TileGrid((150, 90), (0, 0), (1, 360))),
    "clipped tiles in each": ((6, 70, 90), TileGrid((6, 70, 90), (1, 2), (32, 40))),
}


def pair(shape, density=0.02, seed=0):
    """Old and new values as NumPy arrays."""
    rng = np.random.default_rng(seed)
    old = rng.normal(0, 0.02, shape).astype(ml_dtypes.bfloat16)
    bits = old.view(np.uint16)
    return old, np.where(rng.random(shape) < density, bits + 1, bits).view(old.dtype)


@pytest.fixture(params=[1, 1 << 14])
def sliced(request, monkeypatch):
    """Slices as small as they may be, or of some tiles; no program made before is used again."""
    jax.clear_caches()
    monkeypatch.setattr(slices, "_SLICE_BYTES", request.param)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", LEAVES)
def test_slices_are_all_tiles_once_and_in_their_order(name, sliced):
    shape, grid = LEAVES[name]
    own = slices.slices(shape, grid, 16, "reference")
    assert not own.whole
    # Elements are numbered by their tile, of the whole and of each slice.
    number = np.arange(grid.n_tiles, dtype=np.uint32)[:, None]
    width = reference.subblocks_of(grid.tile) * reference.SUBBLOCK
    tiled = jnp.asarray(np.broadcast_to(number, (grid.n_tiles, width)))
    whole = reference.untile(tiled.reshape(grid.n_tiles, -1, 256), grid.extents, grid.tile)
    ahead = 0
    for piece in own:
        part = piece.take(whole.reshape(shape))
        view = part.reshape(box_view(grid, part.shape))
        tiles = np.asarray(reference.tile_matrix(view, grid.tile))
        assert piece.first_tile == ahead
        assert np.array_equal(tiles[:, 0, 0], np.arange(ahead, ahead + piece.tiles))
        ahead += piece.tiles
    assert ahead == grid.n_tiles


@pytest.mark.parametrize("name", LEAVES)
def test_classes_counted_by_slices(name, sliced):
    shape, grid = LEAVES[name]
    old, _ = pair(shape)
    view = jnp.asarray(old.view(np.uint16)).reshape(grid.extents)
    wanted = reference.class_counts(view, jnp.asarray(LIMITS), fmt=BF16, tile=grid.tile)
    mesh = expand.mesh_of(jax.devices()[:1])
    stacked = expand.stack(mesh, [jnp.asarray(old)])
    chosen = jnp.asarray([0, grid.n_tiles - 1], jnp.int32)
    options = {"grid": grid, "backend": "reference"}
    everything = expand.class_counts(stacked, None, LIMITS, **options)
    assert np.array_equal(everything, wanted)
    assert np.array_equal(expand.class_counts(stacked, chosen, LIMITS, **options), wanted[chosen])


@pytest.mark.parametrize("backend", ["reference", "tpu"])
@pytest.mark.parametrize("name", LEAVES)
def test_exponents_are_sampled_at_the_same_elements(name, backend, sliced):
    """Those at every fourth part of the lead, and every 64th part of rows and of columns."""
    shape, grid = LEAVES[name]
    old, _ = pair(shape)
    view = old.view(np.uint16).reshape(grid.extents)
    lead, rows, cols = (
        max(1, n // parts) for n, parts in zip(view.shape, (4, 64, 64), strict=True)
    )
    exponents = (view[::lead, ::rows, ::cols].reshape(-1, 1) >> 7) & 0xFF
    wanted = np.mean(exponents >= np.arange(256), axis=0)
    got = _reached(jnp.asarray(old), grid, BF16, backend) / old.size
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "gpu"])
def test_a_sample_of_many_slices_is_a_short_program(backend, sliced):
    """The vocabulary of Qwen3 by its width, whose view is no copy of it there."""
    shape = (151936, 2048)
    grid = choose_grid(shape, (shape,))
    shard = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    run = functools.partial(_reached, grid=grid, fmt=BF16, backend=backend)
    assert len(list(slices.slices(shape, grid, 16, "reference"))) > 100
    assert len(jax.make_jaxpr(run)(shard).eqns) < 30


@pytest.mark.parametrize("name", LEAVES)
@given(data=st.data())
@settings(max_examples=3, deadline=None)
def test_changes_and_whole_tiles_reach_their_slices(name, sliced_once, data):
    """Any tiles change by slots and any others come whole; the end of both lists is unused."""
    shape, grid = LEAVES[name]
    old, _ = pair(shape)
    kinds = data.draw(st.lists(st.integers(0, 2), min_size=grid.n_tiles, max_size=grid.n_tiles))
    by_slots, by_tile = (np.flatnonzero(np.asarray(kinds) == kind) for kind in (1, 2))
    view = old.view(np.uint16).reshape(grid.extents)
    keys = np.full((grid.n_tiles, 8, reference.subblocks_of(grid.tile)), 0xFFFFFFFF, np.uint32)
    # The first element of class 7 of each first sub-block, if there is one, grows by a step.
    keys[:, 0, 0] = 7 << 24 | 1
    listed = np.zeros(grid.n_tiles, np.int32)
    listed[: len(by_slots)] = by_slots
    listed[len(by_slots) :] = by_slots[-1] if len(by_slots) else 0
    slots = Slots(jnp.asarray(listed), jnp.int32(len(by_slots)), jnp.asarray(keys))
    wanted = np.array(
        reference.expand(jnp.asarray(view), slots, jnp.asarray(LIMITS), fmt=BF16, tile=grid.tile)
    )
    groups = {}
    for tile in by_tile.tolist():
        start = [int(place[0]) for place in grid.places(np.asarray([tile]))]
        high, wide = (
            min(size, extent - begin)
            for size, extent, begin in zip(grid.tile, grid.extents[1:], start[1:], strict=True)
        )
        wanted[start[0], start[1] : start[1] + high, start[2] : start[2] + wide] = tile
        groups.setdefault((high, wide), []).append((start, tile))
    patches = tuple(
        expand.Patches(
            jnp.asarray([start for start, _ in own] + [[0, 0, 0]], jnp.int32),
            jnp.asarray([len(own)], jnp.int32),
            jnp.stack([jnp.full(size, tile, jnp.uint16) for _, tile in own]
                      + [jnp.zeros(size, jnp.uint16)]),
        )
        for size, own in groups.items()
    )  # fmt: skip
    edits = expand.Edits(((slots._replace(used=slots.used[None]), LIMITS),), patches)
    stacked = expand.stack(expand.mesh_of(jax.devices()[:1]), [jnp.asarray(old)])
    got = expand.rewrite(stacked, edits, grid=grid, backend="reference")
    assert np.array_equal(np.asarray(got).view(np.uint16).reshape(grid.extents), wanted)


@pytest.fixture(scope="module")
def sliced_once():
    """As `sliced`, for all examples of a property."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_SLICE_BYTES", 1 << 13)
        yield
    jax.clear_caches()


@pytest.mark.parametrize("shape", [(4, 512, 256), (1000, 300), (4, 300, 513)])
def test_records_and_thresholds_are_those_of_the_whole(shape, monkeypatch):
    old, new = pair(shape, seed=1)
    jax.clear_caches()
    whole = diff({"w": old}, {"w": new}, backend="reference")
    monkeypatch.setattr(slices, "_SLICE_BYTES", 1 << 13)
    jax.clear_caches()
    own = slices.slices(shape, choose_grid(shape, (shape,)), 16, "reference")
    cut = diff({"w": old}, {"w": new}, backend="reference")
    jax.clear_caches()
    assert not own.whole
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        assert np.array_equal(one, other)


def test_the_tpu_kernels_in_slices(monkeypatch, sliced_once):
    """There and back through the kernels, whose register layout wants this leaf laid out anew."""
    for name in ("class_counts", "expand", "compact"):
        kernel = functools.partial(getattr(tpu, name), interpret=True)
        monkeypatch.setattr(tpu, name, kernel)
    old, new = pair((2, 256, 4, 128))
    grid = choose_grid(old.shape, (old.shape,))
    assert not slices.slices(old.shape, grid, 16, "tpu").whole
    payload = sparse_delta.finish(diff({"w": old}, {"w": new}, backend="tpu"))
    got = sparse_delta.apply({"w": jnp.asarray(old)}, payload, backend="tpu")
    assert np.asarray(got["w"]).tobytes() == new.tobytes()


def test_slots_of_a_gpu_search_some_tiles_at_a_time(monkeypatch):
    """Five tiles by twos: the last two are one and one again."""
    monkeypatch.setattr(gpu_compact, "_SLOTS_AT_ONCE", 2 * 8 * 128)
    old, new = (jnp.asarray(x.view(np.uint16)) for x in pair((1, 5 * 64, 512)))
    options = {"fmt": BF16, "tile": (64, 512), "capacity": 128}
    got = gpu.compact(old, new, jnp.asarray(LIMITS), **options, interpret=True)
    jax.block_until_ready(got)  # the interpreter is not to be disturbed
    wanted = reference.compact(old, new, jnp.asarray(LIMITS), **options)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.array_equal(one, other)
