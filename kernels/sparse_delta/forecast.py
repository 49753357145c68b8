"""What `apply` asks of devices, as one program of shapes: for compilers and planners.

`resident` runs these functions leaf by leaf, with what it read in a payload. Here all leaves are
one program, and every tile of them changes by as much as a density says.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from kernels.sparse_delta import expand, locate
from kernels.sparse_delta.backends import Backend, is_small
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.reference import SUBBLOCK, Slots, subblocks_of
from kernels.sparse_delta.tiles import TileGrid, box_view, choose_grid
from kernels.sparse_delta.trees import named_leaves

DEVICE_AXIS = expand.AXIS
"""Of the mesh on which stacks of shards lie."""


def applying(
    weights: Any, shardings: Any, *, density: float, backend: Backend
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The device half of `apply`, which keeps the old weights beside the new ones.

    Args:
      weights: pytree of `jax.ShapeDtypeStruct`s.
      shardings: a tree like it of `NamedSharding`s; their mesh may be abstract.
      density: share of the elements that change.
      backend: which kernels.

    Returns:
      The function and its arguments as shapes: the old weights of each leaf that does not go by
      the host, as a stack of shards; what changes in them; where the shards begin. It gives class
      counts, new weights and their digest sums. The leading axis of every array that it takes or
      gives is divided over a mesh of all devices in a row, whose axis is `DEVICE_AXIS`.
    """
    placed = jax.tree.leaves(shardings)
    devices, kind = placed[0].num_devices, placed[0].mesh.abstract_mesh.abstract_device
    mesh = AbstractMesh((devices,), (DEVICE_AXIS,), abstract_device=kind)

    def stacked(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((devices * shape[0], *shape[1:]), dtype)

    olds, changes, grids = {}, {}, {}
    for leaf in named_leaves(weights, role="weights")[0]:
        shard = placed[leaf.place].shard_shape(leaf.shape)
        if is_small(shard):
            continue
        grid = choose_grid(leaf.shape, (shard,))
        wide = element_format(leaf.dtype).width_bits == 32
        own = _slots(grid, shard, density, wide=wide)
        grids[leaf.name], olds[leaf.name] = grid, stacked(shard, leaf.dtype)
        changes[leaf.name] = jax.tree.map(lambda x: stacked(x.shape, x.dtype), own)
    origins = stacked((1, 2), jnp.uint32)
    thresholds = np.zeros(len(locate.LONE), np.int32)

    def apply(olds: Any, changes: Any, origins: Any) -> Any:
        return {
            name: expand.rebuilt(
                old, expand.Edits(((changes[name], thresholds),), ()), origins,
                mesh=mesh, grid=grids[name], backend=backend,
            )
            for name, old in olds.items()
        }  # fmt: skip

    return apply, (olds, changes, origins)


def _slots(grid: TileGrid, shard: tuple[int, ...], density: float, *, wide: bool) -> Slots:
    """Shapes of the changes of one shard, each of whose tiles has some."""
    tiles = TileGrid(box_view(grid, shard), (1, 2), grid.tile).n_tiles
    mean = density * SUBBLOCK
    # Of many sub-blocks the fullest is some deviations above the mean.
    fullest = np.asarray([min(SUBBLOCK, mean + 8 * math.sqrt(mean))])

    def spec(*shape: int, dtype: Any = jnp.uint32) -> Any:  # stands in a field for an array
        return jax.ShapeDtypeStruct(shape, dtype)

    keys = spec(tiles, locate.room_for(fullest), subblocks_of(grid.tile))
    return Slots(
        spec(tiles, dtype=jnp.int32), spec(1, dtype=jnp.int32), keys, keys if wide else None
    )
