"""What `apply` and `diff` ask of devices, as programs of shapes: for compilers and planners.

`resident` runs the functions of `apply` leaf by leaf, with what it read in a payload; here every
tile of a leaf changes by as much as a density says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from kernels.sparse_delta import expand, locate
from kernels.sparse_delta.backends import Backend, takes
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.reference import SUBBLOCK, Slots, capacity_for, subblocks_of
from kernels.sparse_delta.slices import slices
from kernels.sparse_delta.tiles import TileGrid, box_view, choose_grid
from kernels.sparse_delta.trees import named_leaves

DEVICE_AXIS = expand.AXIS
"""Of the mesh on which stacks of shards lie."""


@dataclass(frozen=True, kw_only=True)
class LeafProgram:
    """The device half of `apply` for leaves that are alike, one at a time.

    The leading axis of every array that it takes or gives is divided over a mesh of all devices in
    a row, whose axis is `DEVICE_AXIS`.

    Attributes:
      leaves: names of those that have this shape and sharding.
      run: the function; gives class counts, new weights and their digest sums.
      args: its arguments as shapes: the old weights as a stack of shards, what changes in them,
        where the shards begin.
      shard_bytes: of one version of one leaf, on one device.
      working_bytes: of a device, beside arguments and results: `Slices.working_bytes`.
    """

    leaves: tuple[str, ...]
    run: Callable[..., Any]
    args: tuple[Any, ...]
    shard_bytes: int
    working_bytes: int


def applying(
    weights: Any, shardings: Any, *, density: float, backend: Backend
) -> list[LeafProgram]:
    """The device half of `apply`, which keeps the old weights beside the new ones.

    Args:
      weights: pytree of `jax.ShapeDtypeStruct`s.
      shardings: a tree like it of `NamedSharding`s; their mesh may be abstract.
      density: share of the elements that change.
      backend: which kernels.

    Returns:
      Programs that differ, that of the largest shards first. Leaves that no kernel takes
      (`backends.takes`) go by the host and are in none.
    """
    placed = jax.tree.leaves(shardings)
    devices, kind = placed[0].num_devices, placed[0].mesh.abstract_mesh.abstract_device
    mesh = AbstractMesh(
        (devices,), (DEVICE_AXIS,), abstract_device=kind, axis_types=(AxisType.Auto,)
    )
    alike: dict[tuple[Any, ...], list[str]] = {}
    for leaf in named_leaves(weights, role="weights")[0]:
        shard = placed[leaf.place].shard_shape(leaf.shape)
        if takes(shard, choose_grid(leaf.shape, (shard,))):
            alike.setdefault((leaf.shape, shard, leaf.dtype), []).append(leaf.name)
    found = [
        _program(tuple(names), *key, density=density, backend=backend, mesh=mesh)
        for key, names in alike.items()
    ]
    return sorted(found, key=lambda program: -program.shard_bytes)


def comparing_bytes(
    weights: Any, shardings: Any, *, backend: Backend, density: float = 0.01
) -> int:
    """Bytes of a device that `diff` takes beside the two trees and its records.

    Its leaves are worked on one after the other, so that it is what one of them takes: a slice of
    each version as it comes and as it is laid out, and on GPUs what the slots search in.

    Args:
      weights: pytree of `jax.ShapeDtypeStruct`s.
      shardings: a tree like it of `NamedSharding`s; their mesh may be abstract.
      backend: which kernels; not "reference", for which XLA decides.
      density: what `diff` is told.
    """
    placed, most = jax.tree.leaves(shardings), 0
    for leaf in named_leaves(weights, role="weights")[0]:
        if 0 in leaf.shape:  # of which `diff` makes no records
            continue
        shard = placed[leaf.place].shard_shape(leaf.shape)
        grid, width = choose_grid(leaf.shape, (shard,)), element_format(leaf.dtype).width_bits
        own = slices(shard, grid, width, backend)
        working = 2 * own.working_bytes
        if backend == "gpu":
            from kernels.sparse_delta import gpu_compact

            elements = math.prod(shard) * own.tiles // own.total
            working += gpu_compact.working_bytes(elements, capacity_for(density))
        most = max(most, working)
    return most


def _program(
    leaves: tuple[str, ...],
    shape: tuple[int, ...],
    shard: tuple[int, ...],
    dtype: np.dtype,
    *,
    density: float,
    backend: Backend,
    mesh: AbstractMesh,
) -> LeafProgram:
    def stacked(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((mesh.size * shape[0], *shape[1:]), dtype)

    grid, width = choose_grid(shape, (shard,)), element_format(dtype).width_bits
    slots = _slots(grid, shard, density, wide=width == 32)
    changes = jax.tree.map(lambda x: stacked(x.shape, x.dtype), slots)
    thresholds = np.zeros(len(locate.LONE), np.int32)

    def apply(old: Any, changes: Any, origins: Any) -> Any:
        edits = expand.Edits(((changes, thresholds),), ())
        # Compilers lower it on a mesh alike of their own devices. Another one is the caller's for
        # other programs, and `shard_map` takes no mesh but that of its context.
        here = jax.sharding.get_abstract_mesh()
        where = here if here.shape_tuple == mesh.shape_tuple else mesh
        with jax.sharding.use_abstract_mesh(where):
            return expand.rebuilt(old, edits, origins, mesh=where, grid=grid, backend=backend)

    return LeafProgram(
        leaves=leaves,
        run=apply,
        args=(stacked(shard, dtype), changes, stacked((1, 2), jnp.uint32)),
        shard_bytes=math.prod(shard) * dtype.itemsize,
        working_bytes=slices(shard, grid, width, backend).working_bytes,
    )


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
