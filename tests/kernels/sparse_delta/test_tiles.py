"""Tiles against brute force: every element's tile is worked out one by one."""

import math

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.sparse_delta import gpu_grid, tiles, tpu_layout
from kernels.sparse_delta.tiles import TileGrid, choose_grid


def tile_of_every_element(grid):
    """Number of the tile of each element, in the shape of the tensor; by the definition."""
    _, rows, cols = grid.extents
    _, down, across = grid.counts
    flat = np.arange(math.prod(grid.shape))
    lead, row, col = flat // (rows * cols), flat // cols % rows, flat % cols
    ids = (lead * down + row // grid.tile[0]) * across + col // grid.tile[1]
    return ids.reshape(grid.shape)


@st.composite
def grids_and_boxes(draw):
    """Arguments of a grid (the type checker of the tests may not run in a strategy), and a box."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    first = draw(st.integers(0, len(shape)))
    second = draw(st.integers(first, len(shape)))
    arguments = shape, (first, second), (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    box = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        box.append((start, draw(st.integers(start + 1, size))))
    return arguments, tuple(box)


@settings(deadline=None)  # machines that run several tests are slow at times
@given(grids_and_boxes())
def test_sizes_and_origins_are_those_of_the_elements(case):
    grid = TileGrid(*case[0])
    ids = np.arange(grid.n_tiles)
    flat = tile_of_every_element(grid).reshape(-1)
    assert grid.sizes(ids).tolist() == np.bincount(flat, minlength=grid.n_tiles).tolist()
    first = [int(np.flatnonzero(flat == tile)[0]) for tile in ids]
    assert grid.origins(ids).tolist() == first


@settings(deadline=None)
@given(grids_and_boxes())
def test_parts_make_up_the_shard_with_the_tensors_own_tiles(case):
    grid, box = TileGrid(*case[0]), case[1]
    of_element = tile_of_every_element(grid)
    cut = tuple(slice(*edges) for edges in box)
    tile, index = (
        of_element[cut].reshape(tiles.box_view(grid, of_element[cut].shape)),
        np.arange(of_element.size).reshape(grid.shape)[cut].reshape(-1),
    )
    index = index.reshape(tile.shape)
    seen = np.zeros(tile.shape, int)
    _, rows, cols = grid.extents
    inside = np.bincount(tile.reshape(-1), minlength=grid.n_tiles)
    whole = np.bincount(of_element.reshape(-1), minlength=grid.n_tiles)
    for part in tiles.parts(grid, box):
        seen[part.cut] += 1
        own = index[part.cut]
        lead, row, col = np.indices(own.shape)
        assert np.array_equal(own, part.origin + (lead * rows + row) * cols + col)
        if part.ids is None:
            cut_tiles = (inside > 0) & (inside < whole)
            assert cut_tiles.any() or len(tiles.parts(grid, box)) > 1
            continue
        # The part's own grid, worked out on its own array, has these numbers in this order.
        own_grid = TileGrid(own.shape, (1, 2), grid.tile)
        assert len(part.ids) == own_grid.n_tiles
        assert np.array_equal(part.ids[tile_of_every_element(own_grid)], tile[part.cut])
    assert np.all(seen == 1)


@settings(deadline=None)
@given(grids_and_boxes())
def test_coverage_counts_the_elements_in_a_box(case):
    grid, box = TileGrid(*case[0]), case[1]
    of_element = tile_of_every_element(grid)
    cut = tuple(slice(*edges) for edges in box)
    want = np.bincount(of_element[cut].reshape(-1), minlength=grid.n_tiles)
    assert tiles.coverage(grid, [box], np.arange(grid.n_tiles)).tolist() == want.tolist()


@settings(deadline=None)
@given(grids_and_boxes(), st.data())
def test_coverage_adds_over_disjoint_boxes(case, data):
    grid = TileGrid(*case[0])
    if not grid.shape:
        return
    axis = data.draw(st.integers(0, len(grid.shape) - 1))
    cut = data.draw(st.integers(0, grid.shape[axis]))
    whole = tiles.whole_box(grid.shape)
    halves = [
        (*whole[:axis], edges, *whole[axis + 1 :]) for edges in ((0, cut), (cut, whole[axis][1]))
    ]
    ids = np.arange(grid.n_tiles)
    halves = [box for box in halves if box[axis][0] < box[axis][1]]
    assert tiles.coverage(grid, halves, ids).tolist() == grid.sizes(ids).tolist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chosen_tiles_are_cut_by_no_sharding(data):
    ndim = data.draw(st.integers(1, 4))
    cuts = [data.draw(st.sampled_from([1, 2, 3, 4])) for _ in range(ndim)]
    others = [data.draw(st.sampled_from([1, 2, 3, 4])) for _ in range(ndim)]
    shape = tuple(a * b * data.draw(st.integers(1, 5)) for a, b in zip(cuts, others, strict=True))
    shards = [
        tuple(size // ways for size, ways in zip(shape, split, strict=True))
        for split in (cuts, others)
    ]
    grid = choose_grid(shape, tuple(shards))
    for shard in shards:
        for corner in np.ndindex(*(size // own for size, own in zip(shape, shard, strict=True))):
            box = tuple((at * own, (at + 1) * own) for at, own in zip(corner, shard, strict=True))
            assert all(part.ids is not None for part in tiles.parts(grid, box))


@pytest.mark.parametrize(
    ("shape", "splits", "tile"),
    [
        ((), (0, 0), (1, 1)),
        ((0, 5), (0, 0), (1, 1)),
        ((1 << 33,), (0, 0), (1, 131072)),
        ((4096, 4096), (0, 1), (256, 512)),
        # Stacked attention weights: layers lead, then model width, then heads × head width.
        ((32, 4096, 32, 128), (1, 2), (256, 512)),
        ((32, 32, 128, 4096), (1, 3), (256, 512)),
    ],
)
def test_the_usual_tensors(shape, splits, tile):
    grid = choose_grid(shape)
    assert (grid.splits, grid.tile) == (splits, tile)


LLAMA = {
    "q": (4096, 4096),
    "gate": (4096, 14336),
    "down": (14336, 4096),
    "embed": (128256, 4096),
    "k, two layers": (2, 4096, 8, 128),
}


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("receiver", ["rows over 16", "columns over 4", "one device"])
def test_kernels_read_the_usual_tensors_where_they_lie(name, receiver):
    """From rows over 16 to another sharding, by the kernels' own judgement."""
    shape = LLAMA[name]
    row, col = (0, 1) if len(shape) == 2 else (1, 2)

    def split(axis, ways):
        return tuple(size // ways if k == axis else size for k, size in enumerate(shape))

    shards = [split(row, 16)]
    if receiver == "columns over 4" and name != "embed":
        shards.append(split(col, 4))
    elif receiver == "columns over 4":
        shards.append(split(row, 4))
    elif receiver == "one device":
        shards = []
    grid = choose_grid(shape, tuple(shards))
    assert grid.tile[0] * grid.tile[1] >= tiles.TILE_ELEMENTS // 4
    for shard in shards or [shape]:
        box = tiles.box_view(grid, shard)
        assert not tpu_layout.layout(box, grid.tile, 16).matrix
        assert gpu_grid.fits(box, grid.tile)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 8, 16, 32]),
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from([128, 256, 300]),
)
def test_what_is_read_in_place_is_known(streams, sixteens, down, lanes):
    """`choose_grid` judges by tiles alone what the kernels find out from a box."""
    tile = 16 * sixteens, streams * lanes
    box = 1, down * tile[0], 2 * tile[1]
    if tile[0] * tile[1] > 1 << 18:
        return
    found = tpu_layout.layout(box, tile, 16).matrix + (not gpu_grid.fits(box, tile))
    assert tiles._relayouts(box[1], box[2], tile) == found


def test_shard_shapes_of_an_abstract_mesh_are_enough():
    mesh = AbstractMesh((4, 8), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shape = (4096, 11008)
    shards = tuple(
        NamedSharding(mesh, spec).shard_shape(shape) for spec in (P("data"), P(None, "model"))
    )
    rows, cols = choose_grid(shape, shards).tile
    assert 1024 % rows == 0
    assert 1376 % cols == 0
    assert rows * cols > 1 << 15


def test_pieces_speak_once_for_every_element():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("a", "b"))
    found = tiles.pieces(NamedSharding(mesh, P(None, "a")), (3, 8))
    assert [piece.box for piece in found] == [((0, 3), (0, 4)), ((0, 3), (4, 8))]
    assert all(piece.owned and len(piece.devices) == 4 for piece in found)
    assert [device.id for device in found[1].devices] == [4, 5, 6, 7]


@pytest.mark.parametrize("tile", [(0, 1), (1, 0), (1 << 11, 1 << 10)])
def test_a_tile_out_of_bounds_is_refused(tile):
    with pytest.raises(ValueError, match="a tile has 1 to 1048576 elements"):
        TileGrid((4, 4), (0, 1), tile)
